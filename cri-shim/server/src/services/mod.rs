//! The two gRPC services of the CRI: RuntimeService and ImageService. A method converts its
//! request, calls another module, and converts the result.

mod answers;
mod authority;
mod image;
mod runtime;

use std::sync::Arc;

use rrun_proto::v1::image_service_server::ImageServiceServer;
use rrun_proto::v1::runtime_service_server::RuntimeServiceServer;

use crate::node::Node;

pub(crate) use authority::Connection;

/// The size limit of a request. The largest part of a request is a pod's annotations, for which the
/// Kubernetes API server has a lower limit.
const MAX_REQUEST_BYTES: usize = 16 << 20;

/// The size limit of a response. The largest response contains the stdout and the stderr of an
/// ExecSync call.
const MAX_ANSWER_BYTES: usize = 40 << 20;

pub(crate) fn runtime(node: Arc<Node>) -> RuntimeServiceServer<runtime::Runtime> {
    RuntimeServiceServer::new(runtime::Runtime { node })
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES)
}

pub(crate) fn image(node: Arc<Node>) -> ImageServiceServer<image::Image> {
    ImageServiceServer::new(image::Image::new(node))
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES)
}
