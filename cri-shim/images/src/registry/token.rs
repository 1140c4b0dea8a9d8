//! Answers the challenges of a registry, with the credentials or with a token of the registry's token
//! server (distribution project, "Token Authentication Specification").

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::{RequestBuilder, Url};
use serde::Deserialize;

use super::{Registry, host_of, secret};
use crate::auth::Credential;
use crate::challenge::Challenge;
use crate::error::{ImageError, Kind};
use crate::failure::{RequestFailure, clean};
use crate::pace::RateWatch;

/// The maximum number of bytes of a token server's answer. A pull keeps its token until it ends.
const TOKEN_BYTES: u64 = 64 << 10;

impl Registry {
    /// Returns the `Authorization` header that answers `challenge`. Returns `None` if the
    /// credentials can't answer the challenge, or if the credentials were already rejected.
    pub(super) async fn answer_challenge(
        &self,
        challenge: Option<Challenge>,
        watch: &RateWatch,
    ) -> Result<Option<HeaderValue>, RequestFailure> {
        match (challenge, &self.credential) {
            (Some(Challenge::Basic), Some(Credential::Basic { username, password })) => {
                Ok(Some(basic(username, password)))
            }
            (Some(Challenge::Bearer { .. }), Some(Credential::Bearer(_))) => Ok(None),
            (
                Some(Challenge::Bearer {
                    realm,
                    service,
                    scope,
                }),
                _,
            ) => self.token(&realm, service, scope, watch).await.map(Some),
            _ => Ok(None),
        }
    }

    async fn token(
        &self,
        realm: &str,
        service: Option<String>,
        scope: Option<String>,
        watch: &RateWatch,
    ) -> Result<HeaderValue, RequestFailure> {
        let url = self.token_server(realm)?;
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        let mut fields = vec![("scope", scope.as_str())];
        if let Some(service) = &service {
            fields.push(("service", service));
        }
        let host = clean(url.host_str().unwrap_or_default());
        let named = |failure: RequestFailure| RequestFailure {
            error: failure
                .error
                .context(format_args!("the token server {host}")),
            ..failure
        };
        let request = self.token_request(url, fields)?;
        let response = self.send(request, watch).await.map_err(named)?;
        let quoted = self.is_at_home(response.url());
        let response = self.accepted(response, quoted).await.map_err(named)?;
        let body = self.receive(response, TOKEN_BYTES, "the token", watch);
        let body = body.await.map_err(named)?;
        token_of(&body)
    }

    /// Parses the address of the token server, and checks that a request to it does not expose the
    /// credentials.
    fn token_server(&self, realm: &str) -> Result<Url, RequestFailure> {
        let url = Url::parse(realm).map_err(|_| token_server_failed("has an invalid address"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(token_server_failed(
                "has an address that is neither http nor https",
            ));
        }
        if !self.is_at_home(&url) {
            let host = host_of(&url);
            self.reach
                .check(&url)
                .map_err(|why| token_server_failed(&format!("has the address {host}, {why}")))?;
        }
        // The credentials must not be sent without TLS if the registry uses TLS, or if they would
        // reach another host. Only the registry chooses this host.
        let exposed = url.scheme() == "http"
            && (self.endpoint.base.starts_with("https:") || !self.is_same_host(&url));
        if exposed && self.credential.is_some() && !self.plain_token_servers {
            return Err(token_server_failed(
                "has an address without TLS, so the credentials are not sent (image.plain_token_servers is not set)",
            ));
        }
        Ok(url)
    }

    fn token_request<'a>(
        &'a self,
        mut url: Url,
        mut fields: Vec<(&'a str, &'a str)>,
    ) -> Result<RequestBuilder, RequestFailure> {
        let client = if self.is_at_home(&url) {
            &self.clients.home
        } else {
            &self.clients.elsewhere
        };
        match &self.credential {
            // RFC 6749, section 6, and the distribution project's OAuth2 token specification define
            // this request.
            Some(Credential::Identity(token)) => {
                fields.extend([
                    ("grant_type", "refresh_token"),
                    ("client_id", "rrun"),
                    ("refresh_token", token),
                ]);
                let body = form(&fields).ok_or_else(|| {
                    token_server_failed(
                        "can't be queried, because the form fields can't be encoded",
                    )
                })?;
                Ok(client
                    .post(url)
                    .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(body))
            }
            other => {
                url.query_pairs_mut().extend_pairs(&fields);
                Ok(match other {
                    Some(Credential::Basic { username, password }) => client
                        .get(url)
                        .header(AUTHORIZATION, basic(username, password)),
                    _ => client.get(url),
                })
            }
        }
    }
}

fn token_server_failed(what: &str) -> RequestFailure {
    ImageError::new(Kind::Unavailable, format!("the token server {what}")).into()
}

/// Parses a token server's answer. Returns the token as an `Authorization` header.
pub(crate) fn token_of(body: &[u8]) -> Result<HeaderValue, RequestFailure> {
    #[derive(Deserialize)]
    struct TokenAnswer {
        token: Option<String>,
        access_token: Option<String>,
    }
    let malformed = || token_server_failed("sent an answer without a valid token");
    // The parser's own message is dropped, because it could quote the token.
    let answer: TokenAnswer = serde_json::from_slice(body).map_err(|_| malformed())?;
    answer
        .token
        .or(answer.access_token)
        .and_then(|token| secret(&format!("Bearer {token}")))
        .ok_or_else(malformed)
}

fn basic(username: &str, password: &str) -> HeaderValue {
    let encoded = STANDARD.encode(format!("{username}:{password}"));
    // Base64 text is always a valid header value, so the fallback is never used.
    secret(&format!("Basic {encoded}")).unwrap_or_else(|| HeaderValue::from_static("Basic"))
}

/// Encodes `fields` as the body of a request with a URL-encoded form.
fn form(fields: &[(&str, &str)]) -> Option<String> {
    let mut url = Url::parse("http://form/").ok()?;
    url.query_pairs_mut().extend_pairs(fields);
    url.query().map(str::to_owned)
}
