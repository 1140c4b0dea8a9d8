//! The wire: one endpoint of a registry (OCI distribution specification, "Pulling").
//!
//! Everything that comes from there is a stranger's: every document is bounded, no text of it
//! reaches a log but shortened and cleaned, and no token or password does.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use reqwest::header::{
    ACCEPT, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;

use super::auth::Auth;
use super::challenge::{self, Challenge};
use super::error::{ImageError, Kind};
use super::hosts::Endpoint;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may be silent in the middle of an answer.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);

/// The most bytes of a token server's answer, and of a failure's explanation.
const TOKEN_BYTES: u64 = 1 << 20;
const EXPLANATION_BYTES: u64 = 16 << 10;

/// The longest that a registry may ask us to wait.
const RETRY_AFTER_MOST: Duration = Duration::from_secs(10);

/// Why a request failed, and whether the same may succeed later.
#[derive(Debug)]
pub struct Failure {
    pub error: ImageError,
    pub retry: bool,
    /// What the registry asks for by `Retry-After`, bounded.
    pub wait: Option<Duration>,
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Failure {
            error,
            retry: false,
            wait: None,
        }
    }
}

/// One repository at one endpoint, for the time of one pull.
pub struct Registry {
    client: Client,
    endpoint: Endpoint,
    repository: String,
    /// The registry that a mirror is to answer for.
    namespace: Option<String>,
    headers: HeaderMap,
    auth: Option<Auth>,
    /// What was last accepted; found out at the first challenge.
    authorization: std::sync::Mutex<Option<HeaderValue>>,
}

impl Registry {
    /// Blocks on the disk for certificates.
    pub fn new(
        endpoint: Endpoint,
        registry: &str,
        repository: &str,
        auth: Option<Auth>,
    ) -> Result<Self, ImageError> {
        // Who installed one before us chose the same or knew better.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let refuse = |what: String| ImageError::new(Kind::InvalidArgument, what);
        let client = build_client(&endpoint)?;
        let mut headers = HeaderMap::new();
        for (name, value) in &endpoint.headers {
            let (Ok(key), Ok(mut value)) = (
                HeaderName::from_bytes(name.as_bytes()),
                HeaderValue::from_str(value),
            ) else {
                return Err(refuse(format!(
                    "the header {name:?} that hosts.toml gives {} can't be sent",
                    endpoint.host
                )));
            };
            value.set_sensitive(true);
            headers.append(key, value);
        }
        let authorization = match &auth {
            Some(Auth::Bearer(token)) => {
                Some(secret(&format!("Bearer {token}")).ok_or_else(|| {
                    refuse("the registry token holds characters that can't be sent".into())
                })?)
            }
            _ => None,
        };
        Ok(Registry {
            client,
            namespace: endpoint.mirror.then(|| registry.to_owned()),
            endpoint,
            repository: repository.to_owned(),
            headers,
            auth,
            authorization: std::sync::Mutex::new(authorization),
        })
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// A manifest by tag or digest.
    pub async fn manifest(&self, target: &str, most: u64) -> Result<Bytes, Failure> {
        let url = self.url("manifests", target)?;
        let response = self.get(url, Some(super::manifest::ACCEPT), 0).await?;
        bounded(response, most, "the manifest")
            .await
            .map_err(|failure| self.named(failure))
    }

    /// A blob from `offset` on; what comes back says where it really begins.
    pub async fn blob(&self, digest: &str, offset: u64) -> Result<Blob, Failure> {
        let url = self.url("blobs", digest)?;
        let response = self.get(url, None, offset).await?;
        let begins = match response.status() {
            StatusCode::PARTIAL_CONTENT if offset > 0 => offset,
            _ => 0,
        };
        Ok(Blob {
            response,
            begins,
            host: self.endpoint.host.clone(),
        })
    }

    /// A small blob as a whole.
    pub async fn document(&self, digest: &str, most: u64) -> Result<Bytes, Failure> {
        let blob = self.blob(digest, 0).await?;
        bounded(blob.response, most, "the image's configuration")
            .await
            .map_err(|failure| self.named(failure))
    }

    fn url(&self, kind: &str, what: &str) -> Result<Url, Failure> {
        let text = format!("{}/{}/{kind}/{what}", self.endpoint.base, self.repository);
        let mut url = Url::parse(&text).map_err(|error| {
            ImageError::new(
                Kind::InvalidArgument,
                format!("the address {text} of the registry: {error}"),
            )
        })?;
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }

    fn named(&self, failure: Failure) -> Failure {
        Failure {
            error: failure
                .error
                .context(format_args!("registry {}", self.endpoint.host)),
            ..failure
        }
    }

    async fn get(
        &self,
        url: Url,
        accept: Option<&'static str>,
        offset: u64,
    ) -> Result<Response, Failure> {
        let answer = self.try_get(url, accept, offset).await;
        answer.map_err(|failure| self.named(failure))
    }

    async fn try_get(
        &self,
        url: Url,
        accept: Option<&'static str>,
        offset: u64,
    ) -> Result<Response, Failure> {
        let request = || -> RequestBuilder {
            let mut request = self.client.get(url.clone()).headers(self.headers.clone());
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            if offset > 0 {
                request = request.header(RANGE, format!("bytes={offset}-"));
            }
            request
        };
        let known = self.authorization.lock().ok().and_then(|auth| auth.clone());
        let mut first = request();
        if let Some(known) = known {
            first = first.header(AUTHORIZATION, known);
        }
        let response = first.send().await.map_err(transport)?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return accepted(response).await;
        }
        let asked = challenge::choose(
            response
                .headers()
                .get_all(WWW_AUTHENTICATE)
                .iter()
                .filter_map(|value| value.to_str().ok()),
        );
        let Some(authorization) = self.meet(asked).await? else {
            return accepted(response).await;
        };
        if let Ok(mut known) = self.authorization.lock() {
            *known = Some(authorization.clone());
        }
        let second = request().header(AUTHORIZATION, authorization);
        accepted(second.send().await.map_err(transport)?).await
    }

    /// What to send to a registry that asks `challenge`; `None` if we have nothing for it.
    async fn meet(&self, challenge: Option<Challenge>) -> Result<Option<HeaderValue>, Failure> {
        match (challenge, &self.auth) {
            (Some(Challenge::Basic), Some(Auth::Basic { username, password })) => {
                Ok(Some(basic(username, password)))
            }
            (
                Some(Challenge::Bearer {
                    realm,
                    service,
                    scope,
                }),
                None | Some(Auth::Basic { .. }),
            ) => self.token(&realm, service, scope).await.map(Some),
            _ => Ok(None),
        }
    }

    async fn token(
        &self,
        realm: &str,
        service: Option<String>,
        scope: Option<String>,
    ) -> Result<HeaderValue, Failure> {
        let broken = |what: &str| {
            Failure::from(ImageError::new(
                Kind::Unavailable,
                format!("its token server {what}"),
            ))
        };
        let mut url = Url::parse(realm).map_err(|_| broken("has no address that can be read"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(broken("is reached neither by http nor https"));
        }
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &service {
                query.append_pair("service", service);
            }
            query.append_pair("scope", &scope);
        }
        let mut request = self.client.get(url.clone());
        if let Some(Auth::Basic { username, password }) = &self.auth {
            // Over TLS we were given the credentials, over TLS they go on.
            if url.scheme() == "http" && self.endpoint.base.starts_with("https:") {
                return Err(broken("is reached without TLS and would see the password"));
            }
            request = request.header(AUTHORIZATION, basic(username, password));
        }
        let named = |failure: Failure| Failure {
            error: failure.error.context(format_args!(
                "its token server {}",
                clean(url.host_str().unwrap_or_default())
            )),
            ..failure
        };
        let response = request.send().await.map_err(transport).map_err(named)?;
        let response = accepted(response).await.map_err(named)?;
        let body = bounded(response, TOKEN_BYTES, "the token")
            .await
            .map_err(named)?;
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        // The parser's message could quote what it read.
        let answer: Answer =
            serde_json::from_slice(&body).map_err(|_| broken("sent an answer that is no token"))?;
        answer
            .token
            .or(answer.access_token)
            .and_then(|token| secret(&format!("Bearer {token}")))
            .ok_or_else(|| broken("sent an answer that is no token"))
    }
}

/// A blob as it arrives.
pub struct Blob {
    response: Response,
    /// The offset of the first byte that comes.
    pub begins: u64,
    host: String,
}

impl Blob {
    /// The next bytes, `None` at the end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Failure> {
        self.response.chunk().await.map_err(|error| {
            let failure = transport(error);
            Failure {
                error: failure
                    .error
                    .context(format_args!("registry {}", self.host)),
                ..failure
            }
        })
    }
}

fn build_client(endpoint: &Endpoint) -> Result<Client, ImageError> {
    let read = |path: &std::path::Path| {
        std::fs::read(path).map_err(|error| {
            ImageError::new(
                Kind::InvalidArgument,
                format!(
                    "read {} for registry {}: {error}",
                    path.display(),
                    endpoint.host
                ),
            )
        })
    };
    let bad = |path: &std::path::Path, what: &str| {
        ImageError::new(
            Kind::InvalidArgument,
            format!("{} for registry {}: {what}", path.display(), endpoint.host),
        )
    };
    let mut builder = Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(SILENCE_TIMEOUT)
        .user_agent(concat!("rrun/", env!("CARGO_PKG_VERSION")));
    let mut authorities = Vec::new();
    for path in &endpoint.ca {
        let bundle = reqwest::Certificate::from_pem_bundle(&read(path)?)
            .map_err(|_| bad(path, "holds no certificate in PEM form"))?;
        authorities.extend(bundle);
    }
    if endpoint.base.starts_with("http:") {
        // No TLS, no need for the system's authorities, which may not be there.
        builder = builder.tls_certs_only(authorities);
    } else if !authorities.is_empty() {
        builder = builder.tls_certs_merge(authorities);
    }
    if endpoint.skip_verify {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    if let Some((certificate, key)) = endpoint.client.first() {
        let mut pem = read(certificate)?;
        if let Some(key) = key {
            pem.push(b'\n');
            pem.extend(read(key)?);
        }
        let identity = reqwest::Identity::from_pem(&pem)
            .map_err(|_| bad(certificate, "holds no certificate and key in PEM form"))?;
        builder = builder.identity(identity);
    }
    builder.build().map_err(|error| {
        ImageError::new(
            Kind::Internal,
            format!("prepare for registry {}: {}", endpoint.host, cause(&error)),
        )
    })
}

/// Makes a header value that is not shown in any debug output.
fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn basic(username: &str, password: &str) -> HeaderValue {
    let encoded = STANDARD.encode(format!("{username}:{password}"));
    // Base64 can always be sent.
    secret(&format!("Basic {encoded}")).unwrap_or_else(|| HeaderValue::from_static("Basic"))
}

/// Passes a success on and makes a sentence of everything else.
async fn accepted(response: Response) -> Result<Response, Failure> {
    let status = response.status();
    if matches!(status, StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
        return Ok(response);
    }
    let kind = match status.as_u16() {
        401 => Kind::Unauthenticated,
        403 => Kind::PermissionDenied,
        404 => Kind::NotFound,
        408 | 429 | 500.. => Kind::Unavailable,
        _ => Kind::Internal,
    };
    let wait = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.trim().parse().ok())
        .map(|seconds| Duration::from_secs(seconds).min(RETRY_AFTER_MOST));
    let body = bounded(response, EXPLANATION_BYTES, "an explanation").await;
    let said = body.map(|body| explanation(&body)).unwrap_or_default();
    let reason = status.canonical_reason().unwrap_or("no known status");
    let colon = if said.is_empty() { "" } else { ": " };
    Err(Failure {
        error: ImageError::new(
            kind,
            format!("it answered {} {reason}{colon}{said}", status.as_u16()),
        ),
        retry: kind == Kind::Unavailable,
        wait,
    })
}

/// What a registry says of a failure (distribution specification, "Error Codes").
fn explanation(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Envelope {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    match serde_json::from_slice::<Envelope>(body) {
        Ok(Envelope { errors }) => match errors.into_iter().next() {
            Some(first) if first.message.is_empty() => clean(&first.code),
            Some(first) => clean(&first.message),
            None => String::new(),
        },
        Err(_) => String::new(),
    }
}

/// A stranger's text for a message: one short line.
fn clean(text: &str) -> String {
    text.chars()
        .take(200)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// Reads a body that may have `most` bytes.
async fn bounded(mut response: Response, most: u64, what: &str) -> Result<Bytes, Failure> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(transport)? {
        if body.len() as u64 + chunk.len() as u64 > most {
            return Err(ImageError::new(
                Kind::DataLoss,
                format!("{what} is longer than {most} bytes, the most that is read"),
            )
            .into());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.into())
}

/// A failure below HTTP. The address is left out: behind a redirection it can hold a signature.
fn transport(error: reqwest::Error) -> Failure {
    let what = if error.is_connect() {
        "connect"
    } else if error.is_body() || error.is_decode() {
        "the answer broke off"
    } else {
        "ask"
    };
    let why = if error.is_timeout() && error.is_connect() {
        format!("no connection within {} s", CONNECT_TIMEOUT.as_secs())
    } else if error.is_timeout() {
        format!("nothing came for {} s", SILENCE_TIMEOUT.as_secs())
    } else {
        cause(&error)
    };
    Failure {
        retry: !error.is_builder() && !error.is_redirect(),
        error: ImageError::new(Kind::Unavailable, format!("{what}: {why}")),
        wait: None,
    }
}

/// The innermost reason, which is the kernel's or the TLS library's.
fn cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    if std::ptr::eq(innermost, error) {
        return "it can't be done".into();
    }
    clean(&innermost.to_string())
}
