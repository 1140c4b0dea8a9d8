//! The wire: one endpoint of a registry (OCI distribution specification, "Pulling").
//!
//! Everything that comes from there is a stranger's: every document is bounded, no text of it
//! reaches a log but shortened and cleaned, and no token or password does.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE,
    RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;

use crate::auth::Credential;
use crate::challenge::{self, Challenge};
use crate::client;
use crate::error::{ImageError, Kind};
use crate::failure::{RequestFailure, cause, clean};
use crate::hosts::Endpoint;
use crate::limits::{MinRate, RegistryLimits};
use crate::manifest;
use crate::pace::{Phase, RateWatch};
use rrun_calls::lock::lock;

/// Redirections that are followed for one answer.
const MAX_REDIRECTIONS: usize = 10;

/// The most bytes of a token server's answer, and of a failure's explanation.
const TOKEN_BYTES: u64 = 1 << 20;
const EXPLANATION_BYTES: u64 = 16 << 10;

/// How long an explanation may take to arrive.
const EXPLANATION_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest that a registry may ask us to wait.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10);

/// How long is waited: for a connection, and for the next bytes of it.
#[derive(Clone, Copy)]
struct Timeouts {
    connect: Duration,
    silence: Duration,
}

/// One repository at one endpoint, for the time of one pull.
pub(crate) struct Registry {
    client: Client,
    /// For other servers that the registry sends us to: without the certificate that says who we
    /// are.
    elsewhere: Client,
    timeouts: Timeouts,
    min_rate: MinRate,
    /// The reason why this endpoint is not used any more.
    slowness: Mutex<Option<ImageError>>,
    /// The host that the registry last redirected a request to, if it did.
    sends_to: Mutex<Option<String>>,
    endpoint: Endpoint,
    repository: String,
    /// The registry that a mirror is to answer for.
    namespace: Option<String>,
    headers: HeaderMap,
    credential: Option<Credential>,
    /// What was last accepted; found out at the first challenge.
    authorization: Mutex<Option<HeaderValue>>,
}

impl Registry {
    /// Blocks on the disk for certificates.
    pub(crate) fn new(
        endpoint: Endpoint,
        registry: &str,
        repository: &str,
        credential: Option<Credential>,
        limits: RegistryLimits,
    ) -> Result<Self, ImageError> {
        let silence = limits.silence;
        // Who installed one before us chose the same or knew better.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let refuse = |what: String| ImageError::new(Kind::InvalidArgument, what);
        let client = client::build(&endpoint, silence, true)?;
        let elsewhere = if endpoint.client.is_empty() {
            client.clone()
        } else {
            client::build(&endpoint, silence, false)?
        };
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
        let authorization = match &credential {
            Some(Credential::Bearer(token)) => {
                Some(secret(&format!("Bearer {token}")).ok_or_else(|| {
                    refuse("the registry token holds characters that can't be sent".into())
                })?)
            }
            _ => None,
        };
        Ok(Registry {
            client,
            elsewhere,
            timeouts: Timeouts {
                connect: endpoint.dial_timeout,
                silence,
            },
            min_rate: limits.min_rate,
            slowness: Mutex::default(),
            sends_to: Mutex::default(),
            namespace: endpoint.mirror.then(|| registry.to_owned()),
            endpoint,
            repository: repository.to_owned(),
            headers,
            credential,
            authorization: Mutex::new(authorization),
        })
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// A manifest by tag or digest.
    pub(crate) async fn manifest(&self, target: &str, most: u64) -> Result<Bytes, RequestFailure> {
        let url = self.url("manifests", target)?;
        let watch = self.watch();
        let response = self.get(url, Some(manifest::ACCEPT), 0, &watch).await?;
        bounded(response, most, "the manifest", self.timeouts, &watch)
            .await
            .map_err(|failure| self.named(failure))
    }

    /// A blob from `offset` on; what comes back says where it really begins.
    pub(crate) async fn blob(
        &self,
        digest: &str,
        offset: u64,
        watch: Arc<RateWatch>,
    ) -> Result<Blob, RequestFailure> {
        let url = self.url("blobs", digest)?;
        watch.comes_from(&self.layers_come_from())?;
        let response = self.get(url, None, offset, &watch).await?;
        // After a redirection, the bytes come from that host.
        let elsewhere = self.elsewhere_of(&response);
        lock(&self.sends_to).clone_from(&elsewhere);
        let begins = match response.status() {
            StatusCode::PARTIAL_CONTENT if offset > 0 => offset,
            _ => 0,
        };
        Ok(Blob {
            response,
            begins,
            timeouts: self.timeouts,
            host: match elsewhere {
                Some(elsewhere) => format!("{}, at {elsewhere}", self.endpoint.host),
                None => self.endpoint.host.clone(),
            },
            watch,
        })
    }

    /// The host that layers come from, as far as is known: this one, or one it redirects to.
    pub(crate) fn layers_come_from(&self) -> String {
        let elsewhere = lock(&self.sends_to).clone();
        elsewhere.unwrap_or_else(|| self.endpoint.host.clone())
    }

    /// The host that answered instead of this endpoint, after a redirection.
    fn elsewhere_of(&self, response: &Response) -> Option<String> {
        let url = response.url();
        let base = Url::parse(&self.endpoint.base).ok()?;
        if base.origin() == url.origin() {
            return None;
        }
        Some(host_of(url))
    }

    /// A watch for a small answer, which needs no slot.
    fn watch(&self) -> Arc<RateWatch> {
        Arc::new(RateWatch::new(self.min_rate, None))
    }

    /// The reason why this pull must not use this endpoint again.
    pub(crate) fn slowness(&self) -> Option<ImageError> {
        lock(&self.slowness).clone()
    }

    pub(crate) fn is_too_slow(&self, error: &ImageError) {
        *lock(&self.slowness) = Some(error.clone());
    }

    /// A small blob as a whole.
    pub(crate) async fn document(&self, digest: &str, most: u64) -> Result<Bytes, RequestFailure> {
        let blob = self.blob(digest, 0, self.watch()).await?;
        let what = "the image's configuration";
        bounded(blob.response, most, what, self.timeouts, &blob.watch)
            .await
            .map_err(|failure| self.named(failure))
    }

    fn url(&self, kind: &str, what: &str) -> Result<Url, RequestFailure> {
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

    fn named(&self, failure: RequestFailure) -> RequestFailure {
        RequestFailure {
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
        watch: &RateWatch,
    ) -> Result<Response, RequestFailure> {
        let answer = self.try_get(url, accept, offset, watch).await;
        answer.map_err(|failure| self.named(failure))
    }

    async fn try_get(
        &self,
        url: Url,
        accept: Option<&'static str>,
        offset: u64,
        watch: &RateWatch,
    ) -> Result<Response, RequestFailure> {
        let mut public = HeaderMap::new();
        if let Some(accept) = accept {
            public.insert(ACCEPT, HeaderValue::from_static(accept));
        }
        if offset > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={offset}-"))
        {
            public.insert(RANGE, range);
        }
        let mut private = self.headers.clone();
        let known = lock(&self.authorization).clone();
        if let Some(known) = known {
            private.insert(AUTHORIZATION, known);
        }
        let (response, at_home) = self.follow(&url, &public, &private, watch).await?;
        // Whoever we were sent to has no claim to our credentials.
        if response.status() != StatusCode::UNAUTHORIZED || !at_home {
            return accepted(response, self.min_rate).await;
        }
        let challenge = challenge::choose(
            response
                .headers()
                .get_all(WWW_AUTHENTICATE)
                .iter()
                .filter_map(|value| value.to_str().ok()),
        );
        let Some(authorization) = self.answer_challenge(challenge, watch).await? else {
            return accepted(response, self.min_rate).await;
        };
        *lock(&self.authorization) = Some(authorization.clone());
        private.insert(AUTHORIZATION, authorization);
        let (response, _) = self.follow(&url, &public, &private, watch).await?;
        accepted(response, self.min_rate).await
    }

    /// Asks, and goes where the registry sends us. `private` headers, which may prove who we are,
    /// go to this endpoint alone; once elsewhere there is no way back to them. Tells besides
    /// whether it was this endpoint that answered.
    async fn follow(
        &self,
        url: &Url,
        public: &HeaderMap,
        private: &HeaderMap,
        watch: &RateWatch,
    ) -> Result<(Response, bool), RequestFailure> {
        let mut at = url.clone();
        let mut at_home = true;
        for _ in 0..=MAX_REDIRECTIONS {
            let request = if at_home {
                self.client.get(at.clone()).headers(private.clone())
            } else {
                self.elsewhere.get(at.clone())
            };
            let response = watch
                .wait(Phase::Head, request.headers(public.clone()).send())
                .await?
                .map_err(|error| transport(error, self.timeouts))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, at_home));
            }
            let next = response
                .headers()
                .get(LOCATION)
                .and_then(|location| location.to_str().ok())
                .and_then(|location| at.join(location).ok())
                .filter(|next| matches!(next.scheme(), "http" | "https"))
                .ok_or_else(|| astray("it sends us to an address that can't be read"))?;
            if at.scheme() == "https" && next.scheme() == "http" {
                return Err(astray("it sends us from https to plain http"));
            }
            at_home &= next.origin() == url.origin();
            if !at_home {
                let host = host_of(&next);
                *lock(&self.sends_to) = Some(host.clone());
                watch.comes_from(&host)?;
            }
            at = next;
        }
        Err(astray("it sends us from one address to the next"))
    }

    /// What to send to a registry with this challenge; `None` if we have nothing for it.
    async fn answer_challenge(
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
                .context(format_args!("its token server {host}")),
            ..failure
        };
        let request = self.token_request(url, fields)?;
        let response = watch
            .wait(Phase::Head, request.send())
            .await
            .map_err(named)?
            .map_err(|error| named(transport(error, self.timeouts)))?;
        let response = accepted(response, self.min_rate).await.map_err(named)?;
        let body = bounded(response, TOKEN_BYTES, "the token", self.timeouts, watch)
            .await
            .map_err(named)?;
        token_of(&body)
    }

    /// The address of the token server, which must not endanger the credentials.
    fn token_server(&self, realm: &str) -> Result<Url, RequestFailure> {
        let url = Url::parse(realm)
            .map_err(|_| token_server_failed("has no address that can be read"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(token_server_failed("is reached neither by http nor https"));
        }
        // Over TLS we were given the credentials, over TLS they go on.
        let exposed = url.scheme() == "http" && self.endpoint.base.starts_with("https:");
        if exposed && self.credential.is_some() {
            return Err(token_server_failed(
                "is reached without TLS and would see the password",
            ));
        }
        Ok(url)
    }

    fn token_request<'a>(
        &'a self,
        mut url: Url,
        mut fields: Vec<(&'a str, &'a str)>,
    ) -> Result<RequestBuilder, RequestFailure> {
        let at_home =
            Url::parse(&self.endpoint.base).is_ok_and(|base| base.origin() == url.origin());
        let client = if at_home {
            &self.client
        } else {
            &self.elsewhere
        };
        match &self.credential {
            // RFC 6749, section 6; the distribution project's OAuth2 token specification.
            Some(Credential::Identity(token)) => {
                fields.extend([
                    ("grant_type", "refresh_token"),
                    ("client_id", "rrun"),
                    ("refresh_token", token),
                ]);
                let body = form(&fields).ok_or_else(|| token_server_failed("can't be asked"))?;
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
    ImageError::new(Kind::Unavailable, format!("its token server {what}")).into()
}

/// The token in a token server's answer, as the header that it is sent in.
fn token_of(body: &[u8]) -> Result<HeaderValue, RequestFailure> {
    #[derive(Deserialize)]
    struct TokenAnswer {
        token: Option<String>,
        access_token: Option<String>,
    }
    let broken = || token_server_failed("sent an answer that is no token");
    // The parser's message could quote what it read.
    let answer: TokenAnswer = serde_json::from_slice(body).map_err(|_| broken())?;
    answer
        .token
        .or(answer.access_token)
        .and_then(|token| secret(&format!("Bearer {token}")))
        .ok_or_else(broken)
}

/// A blob as it arrives.
pub(crate) struct Blob {
    response: Response,
    /// The offset of the first byte that comes.
    pub begins: u64,
    timeouts: Timeouts,
    /// The host that answers.
    host: String,
    watch: Arc<RateWatch>,
}

impl Blob {
    /// The next bytes, `None` at the end.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, RequestFailure> {
        next(&mut self.response, self.timeouts, &self.watch)
            .await
            .map_err(|failure| RequestFailure {
                error: failure
                    .error
                    .context(format_args!("registry {}", self.host)),
                ..failure
            })
    }
}

/// The next bytes of an answer, `None` at its end.
async fn next(
    response: &mut Response,
    timeouts: Timeouts,
    watch: &RateWatch,
) -> Result<Option<Bytes>, RequestFailure> {
    let chunk = watch.wait(Phase::Body, response.chunk()).await?;
    let chunk = chunk.map_err(|error| transport(error, timeouts))?;
    if let Some(chunk) = &chunk {
        watch.came(chunk.len() as u64)?;
    }
    Ok(chunk)
}

/// The host of a URL, with the port if that is not the default of its scheme.
fn host_of(url: &Url) -> String {
    let host = clean(url.host_str().unwrap_or_default());
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host,
    }
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

/// The fields as a form's body.
fn form(fields: &[(&str, &str)]) -> Option<String> {
    let mut url = Url::parse("http://form/").ok()?;
    url.query_pairs_mut().extend_pairs(fields);
    url.query().map(str::to_owned)
}

fn astray(why: &str) -> RequestFailure {
    ImageError::new(Kind::Unavailable, why).into()
}

/// Passes a success on and makes a sentence of everything else.
async fn accepted(response: Response, min_rate: MinRate) -> Result<Response, RequestFailure> {
    let status = response.status();
    if matches!(status, StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
        return Ok(response);
    }
    let kind = match status.as_u16() {
        401 => Kind::Unauthenticated,
        403 => Kind::PermissionDenied,
        404 => Kind::NotFound,
        408 | 429 | 500.. => Kind::Unavailable,
        416 => Kind::DataLoss,
        _ => Kind::Internal,
    };
    let wait = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.trim().parse().ok())
        .map(|seconds| Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
    let watch = RateWatch::new(min_rate, None);
    let body = bounded(
        response,
        EXPLANATION_BYTES,
        "an explanation",
        Timeouts {
            connect: EXPLANATION_TIMEOUT,
            silence: EXPLANATION_TIMEOUT,
        },
        &watch,
    );
    // The status is what counts: a stalled explanation is done without.
    let body = tokio::time::timeout(EXPLANATION_TIMEOUT, body).await;
    let body = body.unwrap_or_else(|_| Ok(Bytes::new()));
    let explained = body.map(|body| explanation(&body)).unwrap_or_default();
    let reason = status.canonical_reason().unwrap_or("no known status");
    let colon = if explained.is_empty() { "" } else { ": " };
    Err(RequestFailure {
        error: ImageError::new(
            kind,
            format!("it answered {} {reason}{colon}{explained}", status.as_u16()),
        ),
        retry: kind == Kind::Unavailable,
        wait,
        slow: false,
    })
}

/// What a registry says of a failure (distribution specification, "Error Codes").
fn explanation(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct ErrorsBody {
        errors: Vec<ErrorEntry>,
    }
    #[derive(Deserialize)]
    struct ErrorEntry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    match serde_json::from_slice::<ErrorsBody>(body) {
        Ok(ErrorsBody { errors }) => match errors.into_iter().next() {
            Some(first) if first.message.is_empty() => clean(&first.code),
            Some(first) => clean(&first.message),
            None => String::new(),
        },
        Err(_) => String::new(),
    }
}

/// Reads a body that may have `most` bytes.
async fn bounded(
    mut response: Response,
    most: u64,
    what: &str,
    timeouts: Timeouts,
    watch: &RateWatch,
) -> Result<Bytes, RequestFailure> {
    let mut body = Vec::new();
    while let Some(chunk) = next(&mut response, timeouts, watch).await? {
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
fn transport(error: reqwest::Error, timeouts: Timeouts) -> RequestFailure {
    let what = if error.is_connect() {
        "connect"
    } else if error.is_body() || error.is_decode() {
        "the answer broke off"
    } else {
        "ask"
    };
    let why = if error.is_timeout() && error.is_connect() {
        format!("no connection within {:?}", timeouts.connect)
    } else if error.is_timeout() && what == "ask" {
        // Bytes of the head may have arrived: the limit is for the whole head.
        format!("no answer within {} s", timeouts.silence.as_secs())
    } else if error.is_timeout() {
        format!("nothing came for {} s", timeouts.silence.as_secs())
    } else {
        cause(&error)
    };
    RequestFailure {
        retry: !error.is_builder() && !error.is_redirect(),
        error: ImageError::new(Kind::Unavailable, format!("{what}: {why}")),
        wait: None,
        slow: false,
    }
}
