//! The image service of the CRI.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rrun_proto::v1::image_service_server::ImageService;
use rrun_proto::v1::{
    self as cri, FilesystemIdentifier, FilesystemUsage, ImageFilter, ImageFsInfoRequest,
    ImageFsInfoResponse, ImageSpec, ImageStatusRequest, ImageStatusResponse, Int64Value,
    ListImagesRequest, ListImagesResponse, PullImageRequest, PullImageResponse, RemoveImageRequest,
    RemoveImageResponse, StreamImagesRequest, StreamImagesResponse, UInt64Value,
};
use serde::Serialize;
use serde_json::value::RawValue;
use tonic::{Request, Response, Status};

use super::answers::{Answers, in_chunks};
use crate::clock::now;
use crate::node::Node;
use crate::report_size;
use rrun_calls::error::{Error, Result};
use rrun_calls::wait::{blocking, slow};
use rrun_images::{Auth, LayerName};
use rrun_kernel::heap;
use rrun_kernel::id::Named;

/// The maximum time that ImageFsInfo waits for the deletion of removed images and containers.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) struct Image {
    node: Arc<Node>,
    images_wait: RemovalWait,
    containers_wait: RemovalWait,
}

/// The waiting of ImageFsInfo for deletions in the background. The value is true if a call has
/// waited in vain. The next calls then do not wait until all deletions are complete. Otherwise, a
/// container with very many files would delay each call.
#[derive(Default)]
struct RemovalWait(AtomicBool);

impl RemovalWait {
    async fn wait(&self, deletions: impl Future) {
        // A timeout of zero only checks whether the deletions are complete.
        let complete = tokio::time::timeout(self.limit(), deletions).await.is_ok();
        self.0.store(!complete, Ordering::Relaxed);
    }

    fn limit(&self) -> Duration {
        if self.0.load(Ordering::Relaxed) {
            Duration::ZERO
        } else {
            REMOVAL_TIMEOUT
        }
    }
}

/// The details of an image in a verbose status. The key `imageSpec` has the same name as in
/// containerd.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Info<'a> {
    image_spec: Option<Box<RawValue>>,
    compressed_size: u64,
    layers: &'a [LayerName],
}

/// Returns the fields `uid` and `username` for the user `user[:group]` of an image. Kubelet checks
/// `runAsNonRoot` with the uid. A number that is not a valid uid is therefore a name, which kubelet
/// does not accept as a user other than root.
fn user(image_user: &str) -> (Option<Int64Value>, String) {
    let user = image_user.split(':').next().unwrap_or_default();
    match Named::parse(user) {
        Named::Id(uid) => {
            let value = uid.into();
            (Some(Int64Value { value }), String::new())
        }
        Named::Name | Named::Invalid => (None, user.to_owned()),
    }
}

/// Returns the CRI message that describes an image.
fn message(node: &Node, image: &rrun_images::Image) -> cri::Image {
    let (uid, username) = user(&image.config.user);
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: node.images.bytes_of(image).max(1),
        uid,
        username,
        spec: None,
        pinned: image.pinned || node.config.image.pinned.hold(image),
    }
}

fn name(spec: Option<ImageSpec>) -> Result<String> {
    let name = spec.unwrap_or_default().image;
    if name.is_empty() {
        return Err(Error::invalid("the request specifies no image"));
    }
    Ok(name)
}

impl Image {
    pub(super) fn new(node: Arc<Node>) -> Self {
        Image {
            node,
            images_wait: RemovalWait::default(),
            containers_wait: RemovalWait::default(),
        }
    }

    fn list(&self, filter: Option<ImageFilter>) -> Vec<cri::Image> {
        let requested = filter
            .and_then(|filter| filter.image)
            .unwrap_or_default()
            .image;
        if requested.is_empty() {
            let all = self.node.images.list();
            return all.iter().map(|image| message(&self.node, image)).collect();
        }
        let found = self.node.images.find(&requested);
        let message = |image: &Arc<rrun_images::Image>| message(&self.node, image);
        found.iter().map(message).collect()
    }

    async fn pull(&self, request: PullImageRequest) -> Result<PullImageResponse> {
        let name = name(request.image)?;
        let auth = match request.auth {
            Some(auth) => Auth::from_cri(
                &auth.username,
                &auth.password,
                &auth.auth,
                &auth.identity_token,
                &auth.registry_token,
                &auth.server_address,
            )?,
            None => None,
        };
        let pull = self.node.images.pull(&name, auth);
        let pulled = slow(format!("pull {name}"), pull).await;
        // The caller does not wait for this call, which holds a lock of malloc(3) for milliseconds.
        drop(tokio::task::spawn_blocking(heap::give_back));
        let image = pulled?;
        Ok(PullImageResponse {
            image_ref: image.id.clone(),
        })
    }

    async fn remove(&self, request: RemoveImageRequest) -> Result<RemoveImageResponse> {
        let name = name(request.image)?;
        let node = Arc::clone(&self.node);
        let key = format!("remove image {name}");
        let removal = self.node.changes.join(&key, || async move {
            node.images.remove(&name).await?;
            Ok(())
        });
        slow(&key, removal).await?;
        Ok(RemoveImageResponse {})
    }

    async fn status(&self, request: ImageStatusRequest) -> Result<ImageStatusResponse> {
        let name = name(request.image)?;
        let found = self.node.images.find(&name);
        let mut response = ImageStatusResponse::default();
        if let Some(image) = found {
            response.image = Some(message(&self.node, &image));
            if request.verbose {
                let info = self.info(&image).await?;
                response.info.insert("info".to_owned(), info);
            }
        }
        Ok(response)
    }

    /// Returns the details that `crictl inspecti` shows below the image's status.
    async fn info(&self, image: &rrun_images::Image) -> Result<String> {
        let (images, id) = (self.node.images.clone(), image.id.clone());
        let what = format!("read the configuration of the image {id}");
        let configuration = blocking(what, move || images.configuration(&id)).await?;
        let info = Info {
            image_spec: configuration,
            compressed_size: image.size,
            layers: &image.layers,
        };
        serde_json::to_string(&info)
            .map_err(|error| Error::internal(format!("describe the image {}: {error}", image.id)))
    }

    async fn fs_info(&self) -> Result<ImageFsInfoResponse> {
        let images = self.node.images.clone();
        let usage = blocking("find the disk usage", move || images.fs_usage()).await?;
        let filesystem = |path: &std::path::Path, bytes, inodes| FilesystemUsage {
            timestamp: now(),
            fs_id: Some(FilesystemIdentifier {
                mountpoint: path.to_string_lossy().into_owned(),
            }),
            used_bytes: Some(UInt64Value { value: bytes }),
            inodes_used: Some(UInt64Value { value: inodes }),
        };
        // Images and containers are on the same file system, below --root. The same usage is
        // therefore reported for both. If their usage were reported separately, kubelet would count
        // the same bytes twice.
        let images = filesystem(&usage.path, usage.bytes, usage.inodes);
        Ok(ImageFsInfoResponse {
            container_filesystems: vec![images.clone()],
            image_filesystems: vec![images],
        })
    }
}

#[tonic::async_trait]
impl ImageService for Image {
    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let mut images = self.list(request.into_inner().filter);
        report_size::limit_list(&mut images);
        Ok(Response::new(ListImagesResponse { images }))
    }

    type StreamImagesStream = Answers<StreamImagesResponse>;

    async fn stream_images(
        &self,
        request: Request<StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let images = self.list(request.into_inner().filter);
        let answers = in_chunks(images, |images| StreamImagesResponse { images });
        Ok(Response::new(answers))
    }

    async fn image_status(
        &self,
        request: Request<ImageStatusRequest>,
    ) -> Result<Response<ImageStatusResponse>, Status> {
        Ok(Response::new(self.status(request.into_inner()).await?))
    }

    async fn pull_image(
        &self,
        request: Request<PullImageRequest>,
    ) -> Result<Response<PullImageResponse>, Status> {
        Ok(Response::new(self.pull(request.into_inner()).await?))
    }

    async fn remove_image(
        &self,
        request: Request<RemoveImageRequest>,
    ) -> Result<Response<RemoveImageResponse>, Status> {
        Ok(Response::new(self.remove(request.into_inner()).await?))
    }

    async fn image_fs_info(
        &self,
        _request: Request<ImageFsInfoRequest>,
    ) -> Result<Response<ImageFsInfoResponse>, Status> {
        // Wait for the deletions of images and writable layers that are in progress in the
        // background. Kubelet removes images and pods, and then calls this method to check the disk
        // usage. If the removed images and pods still occupied the disk, kubelet would evict more
        // pods.
        let (images, containers) = (&self.node.images, &self.node.removals);
        tokio::join!(
            self.images_wait.wait(images.removed(Duration::MAX)),
            self.containers_wait.wait(containers.done(Duration::MAX)),
        );
        Ok(Response::new(self.fs_info().await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_call_waits_for_a_deletion_for_which_a_call_has_waited_in_vain() {
        let wait = RemovalWait::default();
        assert_eq!(wait.limit(), REMOVAL_TIMEOUT);
        wait.0.store(true, Ordering::Relaxed);
        wait.wait(std::future::pending::<()>()).await;
        assert_eq!(wait.limit(), Duration::ZERO);
        wait.wait(std::future::ready(())).await;
        assert_eq!(wait.limit(), REMOVAL_TIMEOUT);
    }

    #[test]
    fn kubelet_gets_a_uid_only_for_a_number_that_the_container_runs_with() {
        for (image_user, uid) in [("0", 0), ("1000:5", 1000), ("0010", 10)] {
            let expected = (Some(Int64Value { value: uid }), String::new());
            assert_eq!(user(image_user), expected, "{image_user}");
        }
        for name in ["www", "4294967295", "4294967296", "-0", "+1000", ""] {
            assert_eq!(user(name), (None, name.to_owned()), "{name}");
        }
    }
}
