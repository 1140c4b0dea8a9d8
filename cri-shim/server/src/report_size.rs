//! Limits on the sizes of the reports about pods, containers and images. The author of a pod or of
//! an image determines the lengths of some fields, for example of labels, annotations, mounts and
//! group ids. Kubelet refuses an answer of more than 16 MiB. Without a limit, kubelet could
//! therefore no longer see or stop such a pod. An answer that contains a list would even hide all
//! other pods from kubelet.

use std::collections::BTreeMap;
use std::sync::Once;

use prost::Message;
use rrun_proto::v1::{
    Container, ContainerStats, ContainerStatus, Image, ImageSpec, PodSandbox, PodSandboxMetrics,
    PodSandboxStats, PodSandboxStatus,
};

/// The maximum number of bytes of all reports in a list.
const LIST_BYTES: usize = 14 << 20;

/// The maximum number of bytes of the status of a pod or a container, and of the statuses of all
/// containers of a pod. The limit is lower than the limit for a list, because an answer can contain
/// two of these parts and the details of a verbose answer.
pub(crate) const STATUS_BYTES: usize = 6 << 20;

/// The maximum length in bytes of a text that a shortened report contains.
const SHORT_BYTES: usize = 1024;

/// The labels and annotations with which kubelet recognises a pod or a container. A shortened
/// report contains no others.
const KEPT: [&str; 10] = [
    "io.kubernetes.container.hash",
    "io.kubernetes.container.name",
    "io.kubernetes.container.restartCount",
    TERMINATION_MESSAGE,
    "io.kubernetes.container.terminationMessagePolicy",
    "io.kubernetes.pod.deletionGracePeriod",
    "io.kubernetes.pod.name",
    "io.kubernetes.pod.namespace",
    "io.kubernetes.pod.terminationGracePeriod",
    "io.kubernetes.pod.uid",
];

/// The labels and annotations of a container that a report contains after it was shortened twice.
const IDENTITY: [&str; 6] = [
    "io.kubernetes.container.hash",
    "io.kubernetes.container.name",
    "io.kubernetes.container.restartCount",
    "io.kubernetes.pod.name",
    "io.kubernetes.pod.namespace",
    "io.kubernetes.pod.uid",
];

/// The annotation with the path at which a container writes its termination message. Kubelet
/// searches the container's mounts for this path.
const TERMINATION_MESSAGE: &str = "io.kubernetes.container.terminationMessagePath";

/// A report with fields of any length.
pub(crate) trait Report: Message {
    /// Removes the parts of any length that kubelet does not need.
    fn shorten(&mut self);

    /// Keeps only what identifies the pod or the container.
    fn shorten_more(&mut self) {}
}

/// Shortens the report if it has more than `bytes` bytes.
pub(crate) fn limit(report: &mut impl Report, bytes: usize) {
    if report.encoded_len() > bytes {
        warn();
        report.shorten();
    }
    if report.encoded_len() > bytes {
        report.shorten_more();
    }
}

/// Shortens the longest reports of a list if all reports together have more than [`LIST_BYTES`].
/// Every report has an equal share of the limit. The long reports of one pod therefore do not
/// shorten the short reports of other pods.
pub(crate) fn limit_list<T: Report>(reports: &mut [T]) {
    let bytes: usize = reports.iter().map(Message::encoded_len).sum();
    if bytes > LIST_BYTES {
        let share = LIST_BYTES / reports.len().max(1);
        for report in reports {
            limit(report, share);
        }
    }
}

/// Logs a warning at the first call. Later reports are probably shortened for the same reason.
fn warn() {
    static FIRST: Once = Once::new();
    FIRST.call_once(|| {
        log::warn!(
            "report pods, containers and images to clients: some labels, annotations, mounts, groups, names and metrics are left out, because an answer would be too long (the limit is {} MiB)",
            LIST_BYTES >> 20
        );
    });
}

fn keep_known(texts: &mut BTreeMap<String, String>) {
    texts.retain(|key, text| KEPT.contains(&key.as_str()) && text.len() <= SHORT_BYTES);
}

fn keep_identity(texts: &mut BTreeMap<String, String>) {
    texts.retain(|key, _| IDENTITY.contains(&key.as_str()));
}

fn shorten_image(image: Option<&mut ImageSpec>) {
    if let Some(image) = image {
        image.annotations.clear();
    }
}

impl Report for PodSandbox {
    fn shorten(&mut self) {
        keep_known(&mut self.labels);
        keep_known(&mut self.annotations);
    }
}

impl Report for PodSandboxStatus {
    fn shorten(&mut self) {
        keep_known(&mut self.labels);
        keep_known(&mut self.annotations);
    }
}

impl Report for Container {
    fn shorten(&mut self) {
        keep_known(&mut self.labels);
        keep_known(&mut self.annotations);
        shorten_image(self.image.as_mut());
    }

    fn shorten_more(&mut self) {
        keep_identity(&mut self.labels);
        keep_identity(&mut self.annotations);
        self.image_ref.clone_from(&self.image_id);
        if let Some(image) = &mut self.image {
            image.image.clone_from(&self.image_id);
            image.user_specified_image.clear();
        }
    }
}

impl Report for ContainerStatus {
    fn shorten(&mut self) {
        keep_known(&mut self.labels);
        keep_known(&mut self.annotations);
        shorten_image(self.image.as_mut());
        let path = self.annotations.get(TERMINATION_MESSAGE);
        self.mounts
            .retain(|mount| Some(&mount.container_path) == path);
        // An incomplete list of groups would be wrong, and a report without a user is not.
        self.user = None;
        let end = self.message.floor_char_boundary(SHORT_BYTES);
        self.message.truncate(end);
    }
}

impl Report for ContainerStats {
    fn shorten(&mut self) {
        if let Some(attributes) = &mut self.attributes {
            keep_known(&mut attributes.labels);
            keep_known(&mut attributes.annotations);
        }
    }

    fn shorten_more(&mut self) {
        if let Some(attributes) = &mut self.attributes {
            keep_identity(&mut attributes.labels);
            keep_identity(&mut attributes.annotations);
        }
    }
}

impl Report for PodSandboxStats {
    fn shorten(&mut self) {
        if let Some(attributes) = &mut self.attributes {
            keep_known(&mut attributes.labels);
            keep_known(&mut attributes.annotations);
        }
        let containers = self.linux.iter_mut().flat_map(|it| &mut it.containers);
        containers.for_each(Report::shorten);
    }

    fn shorten_more(&mut self) {
        let containers = self.linux.iter_mut().flat_map(|it| &mut it.containers);
        containers.for_each(Report::shorten_more);
    }
}

impl Report for PodSandboxMetrics {
    fn shorten(&mut self) {
        self.container_metrics.clear();
    }

    fn shorten_more(&mut self) {
        self.metrics.clear();
    }
}

impl Report for Image {
    fn shorten(&mut self) {
        self.repo_tags.truncate(1);
        self.repo_digests.truncate(1);
    }

    fn shorten_more(&mut self) {
        self.username.clear();
        self.spec = None;
        if !self.repo_tags.is_empty() {
            self.repo_digests.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use rrun_proto::v1::{ContainerMetrics, ContainerUser, LinuxContainerUser, Mount};

    use super::*;

    fn pod(name: &str, bytes: usize) -> PodSandbox {
        PodSandbox {
            id: name.to_owned(),
            labels: [("io.kubernetes.pod.name".to_owned(), name.to_owned())].into(),
            annotations: [("a".to_owned(), "x".repeat(bytes))].into(),
            ..PodSandbox::default()
        }
    }

    #[test]
    fn only_the_longest_reports_of_a_list_are_shortened() {
        let mut short = vec![pod("a", LIST_BYTES / 4), pod("b", 10)];
        let before = short.clone();
        limit_list(&mut short);
        assert_eq!(short, before);
        let mut long = vec![pod("a", LIST_BYTES), pod("b", 10), pod("c", LIST_BYTES)];
        limit_list(&mut long);
        let bytes: usize = long.iter().map(Message::encoded_len).sum();
        assert!(bytes < LIST_BYTES, "the list has {bytes} bytes");
        assert_eq!(long[1], pod("b", 10));
        assert!(long[0].annotations.is_empty());
        assert_eq!(long[0].labels, pod("a", 0).labels);
    }

    #[test]
    fn many_containers_with_the_longest_names_fit_into_a_list() {
        let labels = KEPT.map(|key| (key.to_owned(), "x".repeat(253)));
        let container = Container {
            id: "x".repeat(64),
            pod_sandbox_id: "x".repeat(64),
            image_id: "x".repeat(71),
            image_ref: "x".repeat(400),
            image: Some(ImageSpec {
                image: "x".repeat(400),
                user_specified_image: "x".repeat(400),
                ..ImageSpec::default()
            }),
            labels: labels.into(),
            annotations: [(TERMINATION_MESSAGE.to_owned(), "x".repeat(1000))].into(),
            ..Container::default()
        };
        let mut list = vec![container; 6300];
        limit_list(&mut list);
        let bytes: usize = list.iter().map(Message::encoded_len).sum();
        assert!(bytes < LIST_BYTES, "the list has {bytes} bytes");
        let known = list.iter().all(|it| it.labels.len() == IDENTITY.len());
        assert!(
            known,
            "a container lacks a label with which kubelet finds it"
        );
    }

    #[test]
    fn many_images_with_long_names_and_users_fit_into_a_list() {
        let image = Image {
            id: "x".repeat(71),
            repo_tags: vec!["x".repeat(376)],
            repo_digests: vec!["x".repeat(450)],
            username: "x".repeat(1000),
            ..Image::default()
        };
        let mut list = vec![image; 20_000];
        limit_list(&mut list);
        let bytes: usize = list.iter().map(Message::encoded_len).sum();
        assert!(bytes < LIST_BYTES, "the list has {bytes} bytes");
        assert!(list.iter().all(|image| image.repo_tags.len() == 1));
    }

    #[test]
    fn a_shortened_status_contains_what_kubelet_needs() {
        let mount = |path: &str| Mount {
            container_path: path.to_owned(),
            host_path: "/x".to_owned(),
            ..Mount::default()
        };
        let groups = (0..100_000).collect();
        let mut status = ContainerStatus {
            exit_code: 3,
            message: "ä".repeat(SHORT_BYTES),
            annotations: [
                (TERMINATION_MESSAGE.to_owned(), "/message".to_owned()),
                ("io.kubernetes.container.hash".to_owned(), "1f".to_owned()),
                ("other".to_owned(), "x".repeat(1 << 20)),
            ]
            .into(),
            mounts: vec![mount("/a"), mount("/message"), mount("/b")],
            user: Some(ContainerUser {
                linux: Some(LinuxContainerUser {
                    supplemental_groups: groups,
                    ..LinuxContainerUser::default()
                }),
            }),
            ..ContainerStatus::default()
        };
        limit(&mut status, 1 << 30);
        assert_eq!(status.mounts.len(), 3);
        limit(&mut status, 1 << 20);
        assert_eq!(status.exit_code, 3);
        assert_eq!(status.annotations.len(), 2);
        assert_eq!(status.mounts, [mount("/message")]);
        assert!(status.encoded_len() < 2 * SHORT_BYTES);
    }

    #[test]
    fn the_metrics_of_a_pod_with_very_many_containers_are_shortened() {
        let container = ContainerMetrics {
            container_id: "x".repeat(20_000),
            ..ContainerMetrics::default()
        };
        let pod = |containers| PodSandboxMetrics {
            container_metrics: vec![container.clone(); containers],
            ..PodSandboxMetrics::default()
        };
        let mut all = vec![pod(1000), pod(2)];
        limit_list(&mut all);
        assert_eq!(all, [pod(0), pod(2)]);
    }
}
