//! Receives the answers of registries and token servers within limits of time and size.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::Response;
use serde::Deserialize;

use crate::documents::{DocumentShare, DocumentText, SMALL_BYTES};
use crate::error::{ImageError, Kind};
use crate::failure::{RequestFailure, cause, clean};
use crate::pace::{Phase, RateWatch};

/// The time limit for opening a connection, and the time limit for the next bytes to arrive on the
/// connection.
#[derive(Clone, Copy)]
pub(super) struct Timeouts {
    pub(super) connect: Duration,
    pub(super) silence: Duration,
}

/// A blob that is being received.
pub(crate) struct Blob {
    pub(super) response: Response,
    /// The offset, in the blob, of the first byte that the registry sends.
    pub(crate) begins: u64,
    pub(super) timeouts: Timeouts,
    /// The host that sends the blob. Error messages contain this host.
    pub(super) host: String,
    pub(super) watch: Arc<RateWatch>,
}

impl Blob {
    /// Returns the next bytes of the blob, or `None` at the end of the blob.
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

/// Returns the next bytes of an answer, or `None` at the end of the answer.
async fn next(
    response: &mut Response,
    timeouts: Timeouts,
    watch: &RateWatch,
) -> Result<Option<Bytes>, RequestFailure> {
    let chunk = watch.wait(Phase::Body, response.chunk()).await?;
    let chunk = chunk.map_err(|error| transport(error, timeouts))?;
    if let Some(chunk) = &chunk {
        watch.count_received(chunk.len() as u64)?;
    }
    Ok(chunk)
}

/// Extracts the first error message from the body of an answer with an error status (distribution
/// specification, "Error Codes").
pub(crate) fn explanation(body: &[u8]) -> String {
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

/// Reads the body of `response`. Fails if the body has more than `most` bytes.
pub(super) async fn bounded(
    mut response: Response,
    most: u64,
    what: &str,
    timeouts: Timeouts,
    watch: &RateWatch,
    documents: &Arc<DocumentShare>,
) -> Result<DocumentText, RequestFailure> {
    // The code below does not read the headers, which can occupy 400 KiB.
    drop(std::mem::take(response.headers_mut()));
    let mut body = Vec::new();
    let mut room = documents.room();
    while let Some(chunk) = next(&mut response, timeouts, watch).await? {
        let length = body.len() + chunk.len();
        if length as u64 > most {
            return Err(ImageError::new(
                Kind::DataLoss,
                format!("{what} is longer than the limit of {most} bytes"),
            )
            .into());
        }
        let room = room.grow(length).await?;
        if length > SMALL_BYTES && length > body.capacity() {
            body.reserve_exact(room - body.len());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(DocumentText::new(body.into(), room))
}

/// Describes a failure of the connection or of the transfer. The message omits the URL, because the
/// URL of a redirection can contain a signature.
pub(super) fn transport(error: reqwest::Error, timeouts: Timeouts) -> RequestFailure {
    let what = if error.is_connect() {
        "connect"
    } else if error.is_body() || error.is_decode() {
        "the answer broke off"
    } else {
        "send the request"
    };
    let why = if error.is_timeout() && error.is_connect() {
        format!("no connection within {:?}", timeouts.connect)
    } else if error.is_timeout() && what == "send the request" {
        return no_answer(timeouts);
    } else if error.is_timeout() {
        format!("no data arrived for {} s", timeouts.silence.as_secs())
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

/// Describes a request whose response head did not arrive in time. The time limit applies to the
/// whole response head. The message is therefore also correct if a part of the head arrived.
pub(super) fn no_answer(timeouts: Timeouts) -> RequestFailure {
    let seconds = timeouts.silence.as_secs();
    RequestFailure {
        retry: true,
        error: ImageError::new(
            Kind::Unavailable,
            format!("send the request: no answer within {seconds} s"),
        ),
        wait: None,
        slow: false,
    }
}
