//! Credentials as the CRI hands them over.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

use super::error::{ImageError, Kind};

/// How to prove to a registry who is asking. Never printed.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Auth {
    Basic {
        username: String,
        password: String,
    },
    /// A bearer token that goes to the registry as it is (`registry_token`).
    Bearer(String),
}

impl Auth {
    /// From the fields of the CRI's `AuthConfig`, in the order in which containerd looks at them;
    /// `None` if all are empty.
    pub fn from_cri(
        username: &str,
        password: &str,
        auth: &str,
        identity_token: &str,
        registry_token: &str,
    ) -> Result<Option<Self>, ImageError> {
        if !username.is_empty() {
            return Ok(Some(Auth::Basic {
                username: username.to_owned(),
                password: password.to_owned(),
            }));
        }
        if !identity_token.is_empty() {
            return Err(ImageError::new(
                Kind::Unimplemented,
                "the registry credential is an identity token, which rrun can't use yet: give a user name and password or a registry token",
            ));
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
            return Ok(Some(Auth::Basic {
                username: username.to_owned(),
                // Docker's own tools pad with NULs.
                password: password.trim_end_matches('\0').to_owned(),
            }));
        }
        if !registry_token.is_empty() {
            return Ok(Some(Auth::Bearer(registry_token.to_owned())));
        }
        Ok(None)
    }
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Auth::Basic { .. } => "Basic(…)",
            Auth::Bearer(_) => "Bearer(…)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_auth_field_is_base64_of_user_and_password() {
        let auth = Auth::from_cri("", "", "bWU6c2VjOnJldA==", "", "");
        assert_eq!(
            auth.ok().flatten(),
            Some(Auth::Basic {
                username: "me".into(),
                password: "sec:ret".into()
            })
        );
        let refused = Auth::from_cri("", "", "c2VjcmV0", "", "").map_err(|e| e.to_string());
        assert!(refused.is_err_and(|e| !e.contains("secret")));
    }

    #[test]
    fn nothing_given_is_anonymous() {
        assert!(matches!(Auth::from_cri("", "", "", "", ""), Ok(None)));
    }

    #[test]
    fn credentials_are_not_printed() {
        let auth = Auth::Basic {
            username: "me".into(),
            password: "secret".into(),
        };
        assert_eq!(format!("{auth:?}"), "Basic(…)");
    }
}
