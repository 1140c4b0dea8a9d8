//! Sends HTTP requests to one endpoint of a registry (OCI distribution specification, "Pulling").
//!
//! This module trusts no data from a registry. Every document has a size limit. Text from a
//! registry is shortened, and its control characters are replaced, before it is logged. Tokens and
//! passwords are never logged.

pub(crate) mod answer;
pub(crate) mod token;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::header::{
    ACCEPT, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE, RETRY_AFTER,
    WWW_AUTHENTICATE,
};
use reqwest::{RequestBuilder, Response, StatusCode, Url};

use self::answer::{Blob, Timeouts, bounded, no_answer, transport};
use crate::auth::Credential;
use crate::challenge;
use crate::client::Clients;
use crate::documents::{DocumentShare, DocumentText};
use crate::error::{ImageError, Kind};
use crate::failure::{RequestFailure, clean};
use crate::hosts::Endpoint;
use crate::limits::{MinRate, RegistryLimits};
use crate::manifest;
use crate::pace::{Phase, RateWatch};
use crate::reach::Reach;
use rrun_calls::lock::lock;

/// The maximum number of redirections for one request.
const MAX_REDIRECTIONS: usize = 10;

/// The maximum number of bytes in the body of an answer with an error status.
const EXPLANATION_BYTES: u64 = 16 << 10;

/// The time within which the body of an answer with an error status must arrive.
const EXPLANATION_TIMEOUT: Duration = Duration::from_secs(5);

/// The upper limit for the delay that a registry requests with `Retry-After`.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10);

/// One repository at one endpoint, used for one pull.
pub(crate) struct Registry {
    clients: Clients,
    /// The addresses to which this endpoint may send requests.
    reach: Arc<Reach>,
    /// True if credentials may be sent without TLS to a token server on another host.
    plain_token_servers: bool,
    timeouts: Timeouts,
    min_rate: MinRate,
    document_timeout: Duration,
    /// The memory for the documents of the pull.
    documents: Arc<DocumentShare>,
    /// The error of a request whose answer was too slow. If `slowness` is set, the pull does not
    /// use the endpoint again.
    slowness: Mutex<Option<ImageError>>,
    /// The host that last sent a blob, or to which the registry last redirected a request.
    sender: Mutex<Option<Sender>>,
    endpoint: Endpoint,
    repository: String,
    /// The name of the original registry, if this endpoint is a mirror. Each request to a mirror
    /// contains the parameter `ns` with this name.
    namespace: Option<String>,
    headers: HeaderMap,
    credential: Option<Credential>,
    /// The `Authorization` header that the registry accepted last. If the caller provided no bearer
    /// token, the client creates the header when it answers the registry's first challenge.
    authorization: Mutex<Option<HeaderValue>>,
}

/// A host that sends blobs.
struct Sender {
    /// The name of the host without the port.
    name: String,
    /// The network of the host (see [`Reach::network`]), or its name if the network is not known.
    network: String,
}

/// Returns the headers that hosts.toml sets for an endpoint. The values of these headers can be
/// secret.
fn headers_of(endpoint: &Endpoint) -> Result<HeaderMap, ImageError> {
    let mut headers = HeaderMap::new();
    for (name, value) in &endpoint.headers {
        let (Ok(key), Ok(mut value)) = (
            HeaderName::from_bytes(name.as_bytes()),
            HeaderValue::from_str(value),
        ) else {
            return Err(ImageError::new(
                Kind::InvalidArgument,
                format!(
                    "the header {name:?} that hosts.toml sets for {} is not a valid HTTP header",
                    endpoint.host
                ),
            ));
        };
        value.set_sensitive(true);
        headers.append(key, value);
    }
    Ok(headers)
}

impl Registry {
    /// Creates the HTTP clients for an endpoint. This call blocks on disk I/O while it reads the
    /// certificates.
    pub(crate) fn new(
        endpoint: Endpoint,
        registry: &str,
        repository: &str,
        credential: Option<Credential>,
        limits: RegistryLimits,
        documents: Arc<DocumentShare>,
    ) -> Result<Self, ImageError> {
        let silence = limits.silence;
        // `install_default` fails if a default cryptography provider is already installed. The
        // error is ignored, because the process can use the installed provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let reach = Reach::new(&endpoint.base, limits.permissions.local_redirects);
        let reach = Arc::new(reach);
        let clients = Clients::new(&endpoint, silence, &reach)?;
        let headers = headers_of(&endpoint)?;
        let authorization = match &credential {
            Some(Credential::Bearer(token)) => {
                Some(secret(&format!("Bearer {token}")).ok_or_else(|| {
                    ImageError::new(
                        Kind::InvalidArgument,
                        "the registry token contains characters that an HTTP header can't contain",
                    )
                })?)
            }
            _ => None,
        };
        Ok(Registry {
            clients,
            reach,
            plain_token_servers: limits.permissions.plain_token_servers,
            timeouts: Timeouts {
                connect: endpoint.dial_timeout,
                silence,
            },
            min_rate: limits.min_rate,
            document_timeout: limits.document,
            documents,
            slowness: Mutex::default(),
            sender: Mutex::default(),
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

    /// Fetches a manifest by tag or digest.
    pub(crate) async fn manifest(
        &self,
        target: &str,
        most: u64,
    ) -> Result<DocumentText, RequestFailure> {
        let url = self.url("manifests", target)?;
        let watch = self.watch();
        let response = self.get(url, Some(manifest::ACCEPT), 0, &watch).await?;
        self.receive(response, most, "the manifest", &watch)
            .await
            .map_err(|failure| self.named(failure))
    }

    /// Requests the bytes of a blob from `offset` to its end. The returned [`Blob`] contains the
    /// offset at which the answer actually begins.
    pub(crate) async fn blob(
        &self,
        digest: &str,
        offset: u64,
        watch: Arc<RateWatch>,
    ) -> Result<Blob, RequestFailure> {
        let url = self.url("blobs", digest)?;
        watch.comes_from(&self.layers_come_from())?;
        let response = self.get(url, None, offset, &watch).await?;
        // If the request was redirected, another host than the endpoint's host can send the bytes.
        let elsewhere = self.elsewhere_of(&response);
        let name = name_of(response.url());
        let network = self.reach.network(response.remote_addr());
        let network = network.unwrap_or_else(|| name.clone());
        *lock(&self.sender) = Some(Sender {
            name,
            network: network.clone(),
        });
        let moved = watch.comes_from(&network);
        moved.map_err(|failure| self.named(failure))?;
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

    /// Returns the host that probably provides the layers: the host of the last blob or redirection
    /// or, before the first of them, the endpoint's own host. The host is without the port, because
    /// one server can listen on many ports.
    pub(crate) fn layers_come_from(&self) -> String {
        let network = lock(&self.sender).as_ref().map(|s| s.network.clone());
        network.unwrap_or_else(|| {
            let base = Url::parse(&self.endpoint.base);
            base.map_or_else(|_| self.endpoint.host.clone(), |base| name_of(&base))
        })
    }

    /// Records a redirection to the host `name`, and returns the host as
    /// [`Registry::layers_come_from`] does.
    fn redirects_to(&self, name: String) -> String {
        let mut sender = lock(&self.sender);
        if let Some(known) = sender.as_ref().filter(|known| known.name == name) {
            return known.network.clone();
        }
        let network = name.clone();
        sender.insert(Sender { name, network }).network.clone()
    }

    /// Returns the host that sent `response`, or `None` if this endpoint itself sent the response.
    fn elsewhere_of(&self, response: &Response) -> Option<String> {
        let url = response.url();
        (!self.is_at_home(url)).then(|| host_of(url))
    }

    /// Creates a rate watch for a small document, which needs no slot.
    fn watch(&self) -> Arc<RateWatch> {
        Arc::new(RateWatch::new(self.min_rate, None))
    }

    /// Returns the error of a request whose answer was too slow, or `None` if no answer was too
    /// slow. After such an error, the pull must not use this endpoint again.
    pub(crate) fn slowness(&self) -> Option<ImageError> {
        lock(&self.slowness).clone()
    }

    pub(crate) fn is_too_slow(&self, error: &ImageError) {
        *lock(&self.slowness) = Some(error.clone());
    }

    /// Fetches a small blob into memory.
    pub(crate) async fn document(
        &self,
        digest: &str,
        most: u64,
    ) -> Result<DocumentText, RequestFailure> {
        let blob = self.blob(digest, 0, self.watch()).await?;
        let what = "the image's configuration";
        self.receive(blob.response, most, what, &blob.watch)
            .await
            .map_err(|failure| self.named(failure))
    }

    /// Receives a document of at most `most` bytes.
    async fn receive(
        &self,
        response: Response,
        most: u64,
        what: &str,
        watch: &RateWatch,
    ) -> Result<DocumentText, RequestFailure> {
        let body = bounded(response, most, what, self.timeouts, watch, &self.documents);
        let late = || RequestFailure {
            slow: true,
            ..ImageError::new(
                Kind::Unavailable,
                format!(
                    "{what} did not arrive within {} s (image.document_seconds)",
                    self.document_timeout.as_secs()
                ),
            )
            .into()
        };
        let body = tokio::time::timeout(self.document_timeout, body).await;
        body.unwrap_or_else(|_| Err(late()))
    }

    fn url(&self, kind: &str, what: &str) -> Result<Url, RequestFailure> {
        let text = format!("{}/{}/{kind}/{what}", self.endpoint.base, self.repository);
        let mut url = Url::parse(&text).map_err(|error| {
            ImageError::new(
                Kind::InvalidArgument,
                format!("the address {text} of the registry is invalid: {error}"),
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
        // If the registry redirected the request to another server, this server must not get the
        // credentials. The challenge of the other server is therefore not answered.
        if response.status() != StatusCode::UNAUTHORIZED || !at_home {
            return self.accepted(response, at_home).await;
        }
        let challenge = challenge::choose(
            response
                .headers()
                .get_all(WWW_AUTHENTICATE)
                .iter()
                .filter_map(|value| value.to_str().ok()),
        );
        let Some(authorization) = self.answer_challenge(challenge, watch).await? else {
            return self.accepted(response, true).await;
        };
        *lock(&self.authorization) = Some(authorization.clone());
        private.insert(AUTHORIZATION, authorization);
        let (response, at_home) = self.follow(&url, &public, &private, watch).await?;
        self.accepted(response, at_home).await
    }

    /// Sends a request, and waits for the head of the answer.
    async fn send(
        &self,
        request: RequestBuilder,
        watch: &RateWatch,
    ) -> Result<Response, RequestFailure> {
        let sent = self.clients.thread.send(request);
        // The HTTP client has the same time limit. But its timer runs in the thread that sends the
        // request, and the registry can keep this thread busy.
        let sent = tokio::time::timeout(self.timeouts.silence, sent);
        match watch.wait(Phase::Head, sent).await? {
            Ok(sent) => sent?.map_err(|error| transport(error, self.timeouts)),
            Err(_) => Err(no_answer(self.timeouts)),
        }
    }

    /// Sends a request and follows redirections. The `private` headers are sent only to this
    /// endpoint, because they can contain credentials. After a redirection to another server, the
    /// private headers are not sent again, even if a later redirection leads back to this endpoint.
    /// The returned flag is true if this endpoint itself sent the answer.
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
                self.clients.home.get(at.clone()).headers(private.clone())
            } else {
                self.clients.elsewhere.get(at.clone())
            };
            let response = self.send(request.headers(public.clone()), watch).await?;
            if at_home {
                self.reach.learn(response.remote_addr());
            }
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, at_home));
            }
            let next = response
                .headers()
                .get(LOCATION)
                .and_then(|location| location.to_str().ok())
                .and_then(|location| at.join(location).ok())
                .filter(|next| matches!(next.scheme(), "http" | "https"))
                .ok_or_else(|| {
                    redirection_error("the server redirects the request to an invalid address")
                })?;
            if at.scheme() == "https" && next.scheme() == "http" {
                return Err(redirection_error(
                    "the server redirects the request from https to plain http",
                ));
            }
            at_home &= next.origin() == url.origin();
            if !at_home {
                let host = host_of(&next);
                self.reach.check(&next).map_err(|why| {
                    redirection_error(&format!(
                        "the server redirects the request to {host}, {why}"
                    ))
                })?;
                watch.comes_from(&self.redirects_to(name_of(&next)))?;
            }
            at = next;
        }
        Err(redirection_error(&format!(
            "the server redirects the request more than {MAX_REDIRECTIONS} times"
        )))
    }

    /// Returns `response` unchanged if its status reports success. Otherwise returns an error. The
    /// error contains the explanation in the answer only if `quoted` is true. If the registry has
    /// chosen another host, `quoted` must be false: the error must not show the answers of hosts
    /// that only this node can reach.
    async fn accepted(&self, response: Response, quoted: bool) -> Result<Response, RequestFailure> {
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
        let watch = RateWatch::new(self.min_rate, None);
        let body = bounded(
            response,
            EXPLANATION_BYTES,
            "the body of the error response",
            Timeouts {
                connect: EXPLANATION_TIMEOUT,
                silence: EXPLANATION_TIMEOUT,
            },
            &watch,
            &self.documents,
        );
        // Only the HTTP status determines the error kind. If the body does not arrive in time, the
        // error is reported without the explanation from the body.
        let text = if quoted {
            let body = tokio::time::timeout(EXPLANATION_TIMEOUT, body).await;
            body.ok()
                .and_then(Result::ok)
                .map_or_else(String::new, |body| answer::explanation(&body))
        } else {
            String::new()
        };
        let reason = status.canonical_reason().unwrap_or("(unknown status)");
        let colon = if text.is_empty() { "" } else { ": " };
        Err(RequestFailure {
            error: ImageError::new(
                kind,
                format!(
                    "the server answered {} {reason}{colon}{text}",
                    status.as_u16()
                ),
            ),
            retry: kind == Kind::Unavailable,
            wait,
            slow: false,
        })
    }

    /// Returns whether `url` belongs to this endpoint.
    fn is_at_home(&self, url: &Url) -> bool {
        Url::parse(&self.endpoint.base).is_ok_and(|base| base.origin() == url.origin())
    }

    /// Returns whether `url` has the host of this endpoint. The port and the scheme can differ.
    fn is_same_host(&self, url: &Url) -> bool {
        Url::parse(&self.endpoint.base).is_ok_and(|base| base.host() == url.host())
    }
}

/// Returns the host of a URL, with the port if it is not the default port of the scheme.
fn host_of(url: &Url) -> String {
    let host = clean(url.host_str().unwrap_or_default());
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host,
    }
}

/// Returns the host of a URL without the port.
fn name_of(url: &Url) -> String {
    clean(url.host_str().unwrap_or_default())
}

/// Creates a header value that debug output does not show.
fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn redirection_error(why: &str) -> RequestFailure {
    ImageError::new(Kind::Unavailable, why).into()
}
