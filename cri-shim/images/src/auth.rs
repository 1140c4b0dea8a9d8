//! Registry credentials from CRI requests.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

use crate::error::{ImageError, Kind};

/// Credentials for a registry, and the server that may receive them. Credentials are never printed.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Auth {
    pub(super) credential: Credential,
    /// The only host that may receive the credentials. `None` allows every endpoint of the
    /// registry.
    server: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) enum Credential {
    Basic {
        username: String,
        password: String,
    },
    /// An OAuth2 refresh token (`identity_token`), which is sent only to the token server.
    Identity(String),
    /// A bearer token (`registry_token`), which is sent to the registry unchanged.
    Bearer(String),
}

impl Auth {
    /// Creates credentials from a bearer token, which is sent to the registry unchanged.
    pub fn bearer(token: &str) -> Self {
        Auth {
            credential: Credential::Bearer(token.to_owned()),
            server: None,
        }
    }

    /// Creates credentials from the fields of the CRI's `AuthConfig`, in containerd's order of
    /// precedence. Returns `None` if the fields contain no credentials.
    pub fn from_cri(
        username: &str,
        password: &str,
        auth: &str,
        identity_token: &str,
        registry_token: &str,
        server_address: &str,
    ) -> Result<Option<Self>, ImageError> {
        let credential =
            Credential::from_cri(username, password, auth, identity_token, registry_token)?;
        Ok(credential.map(|credential| Auth {
            credential,
            server: Some(host_of(server_address)).filter(|host| !host.is_empty()),
        }))
    }

    /// Returns whether the endpoint `endpoint` of the registry `registry` may receive these
    /// credentials. Credentials for a certain server are sent only if this server is the endpoint
    /// or the registry.
    pub(super) fn is_for(&self, endpoint: &str, registry: &str) -> bool {
        let Some(server) = &self.server else {
            return true;
        };
        let server = normal(server);
        server == normal(endpoint) || server == normal(registry)
    }
}

/// Maps the three host names of Docker Hub to `docker.io`.
fn normal(host: &str) -> &str {
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        other => other,
    }
}

/// Returns the host in a server address. For example, the addresses `https://index.docker.io/v1/`
/// and `index.docker.io` have the same host.
fn host_of(address: &str) -> String {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    rest.split('/').next().unwrap_or_default().to_owned()
}

impl Credential {
    fn from_cri(
        username: &str,
        password: &str,
        auth: &str,
        identity_token: &str,
        registry_token: &str,
    ) -> Result<Option<Self>, ImageError> {
        // Some token brokers send an identity token together with a placeholder as the user name. A
        // user name without a password is therefore ignored if the request also contains an
        // identity token.
        if !username.is_empty() && (!password.is_empty() || identity_token.is_empty()) {
            return Ok(Some(Credential::Basic {
                username: username.to_owned(),
                password: password.to_owned(),
            }));
        }
        if !identity_token.is_empty() {
            return Ok(Some(Credential::Identity(identity_token.to_owned())));
        }
        if !auth.is_empty() {
            let unreadable = || {
                ImageError::new(
                    Kind::InvalidArgument,
                    "the registry credential's auth field is not base64 of USER:PASSWORD",
                )
            };
            let decoded = STANDARD
                .decode(auth)
                .or_else(|_| STANDARD_NO_PAD.decode(auth))
                .map_err(|_| unreadable())?;
            let decoded = String::from_utf8(decoded).map_err(|_| unreadable())?;
            let (username, password) = decoded.split_once(':').ok_or_else(unreadable)?;
            return Ok(Some(Credential::Basic {
                username: username.to_owned(),
                // Docker's own tools pad the password with NULs, so the NULs at the end are
                // removed.
                password: password.trim_end_matches('\0').to_owned(),
            }));
        }
        if !registry_token.is_empty() {
            return Ok(Some(Credential::Bearer(registry_token.to_owned())));
        }
        Ok(None)
    }
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.credential.fmt(f)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Credential::Basic { .. } => "Basic(…)",
            Credential::Identity(_) => "Identity(…)",
            Credential::Bearer(_) => "Bearer(…)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credential(fields: [&str; 5]) -> Option<Credential> {
        let [username, password, auth, identity, registry] = fields;
        Credential::from_cri(username, password, auth, identity, registry)
            .ok()
            .flatten()
    }

    #[test]
    fn the_auth_field_is_base64_of_user_and_password() {
        assert_eq!(
            credential(["", "", "bWU6c2VjOnJldA==", "", ""]),
            Some(Credential::Basic {
                username: "me".into(),
                password: "sec:ret".into()
            })
        );
        let refused = Auth::from_cri("", "", "c2VjcmV0", "", "", "").map_err(|e| e.to_string());
        assert!(refused.is_err_and(|e| !e.contains("secret")));
    }

    #[test]
    fn empty_fields_mean_an_anonymous_pull() {
        assert!(matches!(Auth::from_cri("", "", "", "", "", ""), Ok(None)));
        assert!(matches!(
            Auth::from_cri("", "", "", "", "", "https://r.example"),
            Ok(None)
        ));
    }

    #[test]
    fn an_identity_token_takes_precedence_over_a_user_name_without_password() {
        let identity = Some(Credential::Identity("t".into()));
        assert_eq!(credential(["<token>", "", "", "t", ""]), identity);
        assert_eq!(credential(["", "", "", "t", "r"]), identity);
    }

    #[test]
    fn credentials_are_sent_only_to_the_server_that_they_name() -> Result<(), ImageError> {
        let auth = |server| Auth::from_cri("me", "x", "", "", "", server);
        let is_for = |server, endpoint: &str, registry: &str| {
            auth(server).map(|auth| auth.is_some_and(|auth| auth.is_for(endpoint, registry)))
        };
        assert!(is_for("", "m.example", "r.example")?);
        assert!(is_for("https://r.example/v2/", "m.example", "r.example")?);
        assert!(is_for("m.example:5000", "m.example:5000", "r.example")?);
        assert!(is_for(
            "https://index.docker.io/v1/",
            "registry-1.docker.io",
            "docker.io"
        )?);
        assert!(!is_for("other.example", "m.example", "r.example")?);
        Ok(())
    }

    #[test]
    fn credentials_are_not_printed() {
        let auth = Auth::bearer("secret");
        assert_eq!(format!("{auth:?}"), "Bearer(…)");
    }
}
