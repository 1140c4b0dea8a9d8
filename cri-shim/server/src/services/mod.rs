//! The two gRPC services: translate, call, translate back.

mod authority;
mod image;
mod runtime;

use std::pin::Pin;
use std::sync::Arc;

use futures_util::stream::{self, Stream};
use rrun_proto::v1::image_service_server::ImageServiceServer;
use rrun_proto::v1::runtime_service_server::RuntimeServiceServer;
use tonic::Status;

use crate::node::Node;
use rrun_calls::error::Error;

pub(crate) use authority::Connection;

/// What a server-streaming method answers with.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Items in one message of a streamed list.
const CHUNK: usize = 256;

/// The most bytes of a request: a pod's annotations are the largest part, and bounded by the API
/// server to less.
const REQUEST_BYTES: usize = 16 << 20;

/// The most bytes of an answer: an ExecSync's two outputs.
const ANSWER_BYTES: usize = 40 << 20;

pub(crate) fn runtime(node: Arc<Node>) -> RuntimeServiceServer<runtime::Runtime> {
    RuntimeServiceServer::new(runtime::Runtime { node })
        .max_decoding_message_size(REQUEST_BYTES)
        .max_encoding_message_size(ANSWER_BYTES)
}

pub(crate) fn image(node: Arc<Node>) -> ImageServiceServer<image::Image> {
    ImageServiceServer::new(image::Image { node })
        .max_decoding_message_size(REQUEST_BYTES)
        .max_encoding_message_size(ANSWER_BYTES)
}

/// A list in messages of some items each.
fn in_chunks<T, M>(items: Vec<T>, message: impl Fn(Vec<T>) -> M + Send + 'static) -> Answers<M>
where
    T: Send + 'static,
    M: Send + 'static,
{
    let mut items = items.into_iter();
    let chunks = std::iter::from_fn(move || {
        let chunk: Vec<T> = items.by_ref().take(CHUNK).collect();
        (!chunk.is_empty()).then(|| Ok(message(chunk)))
    });
    Box::pin(stream::iter(chunks))
}

/// Logs a failed call: kubelet's own log is often elsewhere.
fn answer<T>(method: &str, result: Result<T, Error>) -> Result<tonic::Response<T>, Status> {
    match result {
        Ok(answer) => Ok(tonic::Response::new(answer)),
        Err(error) => {
            if error.code() == tonic::Code::NotFound {
                log::debug!("{method}: {error}");
            } else {
                log::warn!("{method}: {error}");
            }
            Err(error.into())
        }
    }
}
