//! Images made by hand, a registry that misbehaves, and pulls from it.

use rrun_proto::v1::{AuthConfig, ImageSpec, PullImageRequest};

use crate::support::calls::Calls;
use crate::support::machine::Result;

// Both belong to the library's own tests.
#[allow(dead_code, reason = "what only the library's tests want of it")]
#[path = "../../../cri-shim/images/tests/images/build.rs"]
pub(crate) mod build;
#[allow(dead_code, reason = "what only the library's tests want of it")]
#[path = "../../../cri-shim/images/tests/images/server.rs"]
pub(crate) mod server;

/// PullImage as kubelet asks for it: the image's reference, or what went wrong.
pub(crate) fn pull(
    calls: &Calls,
    image: &str,
    auth: Option<AuthConfig>,
) -> Result<std::result::Result<String, tonic::Status>> {
    let mut client = calls.image();
    let request = PullImageRequest {
        image: Some(ImageSpec {
            image: image.to_owned(),
            ..ImageSpec::default()
        }),
        auth,
        ..PullImageRequest::default()
    };
    let answer = calls.wait(async move { client.pull_image(request).await })?;
    Ok(answer.map(|answer| answer.into_inner().image_ref))
}
