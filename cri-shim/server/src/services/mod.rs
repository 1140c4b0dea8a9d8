//! The two gRPC services: translate, call, translate back.

mod answers;
mod authority;
mod image;
mod runtime;

use std::sync::Arc;

use rrun_proto::v1::image_service_server::ImageServiceServer;
use rrun_proto::v1::runtime_service_server::RuntimeServiceServer;

use crate::node::Node;

pub(crate) use authority::Connection;

/// The most bytes of a request: a pod's annotations are the largest part, and bounded by the API
/// server to less.
const MAX_REQUEST_BYTES: usize = 16 << 20;

/// The most bytes of an answer: an ExecSync's two outputs.
const MAX_ANSWER_BYTES: usize = 40 << 20;

pub(crate) fn runtime(node: Arc<Node>) -> RuntimeServiceServer<runtime::Runtime> {
    RuntimeServiceServer::new(runtime::Runtime { node })
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES)
}

pub(crate) fn image(node: Arc<Node>) -> ImageServiceServer<image::Image> {
    ImageServiceServer::new(image::Image { node })
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES)
}
