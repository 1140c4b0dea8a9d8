//! Images for the tests, a misbehaving registry, and a function that pulls images from this
//! registry.

use rrun_proto::v1::{AuthConfig, ImageSpec, PullImageRequest};

use crate::support::calls::Calls;
use crate::support::machine::Result;

// The tests of the library `rrun-images` use the same modules `build` and `server`.
#[allow(
    dead_code,
    reason = "only the tests of rrun-images use the other items"
)]
#[path = "../../../cri-shim/images/tests/images/build.rs"]
pub(crate) mod build;
#[allow(
    dead_code,
    reason = "only the tests of rrun-images use the other items"
)]
#[path = "../../../cri-shim/images/tests/images/server.rs"]
pub(crate) mod server;

/// Sends a PullImage request, as kubelet does. Returns the image's reference, or the error that the
/// server returned.
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
