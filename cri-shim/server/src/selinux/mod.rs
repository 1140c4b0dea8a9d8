//! SELinux labels of pods: the labels of their processes and of their files.
//!
//! Labels are used only if `enable_selinux` is set and the kernel has SELinux enabled. A pod gets
//! the policy's label for containers, with categories that no other pod has. A pod or a container
//! can request a user, role, type or level. The requested value then replaces the value in the
//! policy's label. The pod's record contains the labels. A pod therefore keeps its labels when the
//! configuration changes.

pub(crate) mod categories;
pub(crate) mod label;
mod policy;
pub(crate) mod relabel;

use std::sync::Arc;

use rrun_proto::v1::SeLinuxOption;
use serde::{Deserialize, Serialize};

use self::categories::{Categories, LevelHold};
use self::label::Label;
use self::policy::Policy;
use rrun_calls::error::{Error, Result};

/// The SELinux labels of a pod or of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Labels {
    pub process: Label,
    pub files: Label,
}

impl Labels {
    /// Replaces those fields of the labels that the request sets, and returns the new labels. The
    /// label of the pod's files keeps the policy's type, because a requested type applies only to
    /// processes.
    fn overlaid(mut self, requested: &SeLinuxOption) -> Labels {
        for (given, fields) in [
            (
                &requested.user,
                vec![&mut self.process.user, &mut self.files.user],
            ),
            (&requested.role, vec![&mut self.process.role]),
            (&requested.r#type, vec![&mut self.process.kind]),
            (
                &requested.level,
                vec![&mut self.process.level, &mut self.files.level],
            ),
        ] {
            if !given.is_empty() {
                fields.into_iter().for_each(|field| given.clone_into(field));
            }
        }
        self
    }

    fn check_with_kernel(&self) -> Result<()> {
        for label in [&self.process, &self.files] {
            policy::check(label).map_err(|reason| {
                Error::invalid(format!(
                    "the SELinux label {label} (linux.security_context.selinux_options) is not valid in this node's policy: {reason}"
                ))
            })?;
        }
        Ok(())
    }
}

/// The SELinux state of this node.
pub(crate) struct Selinux {
    /// The policy's labels, or `None` if SELinux is not used.
    policy: Option<Policy>,
    categories: Arc<Categories>,
}

impl Selinux {
    /// Reads the SELinux policy if SELinux is used. `enable` is the value of the key
    /// `enable_selinux`, and `range` is the value of `selinux_category_range`.
    ///
    /// # Errors
    /// Returns an error if the policy can't be read or has no labels for containers.
    pub(crate) fn open(enable: bool, range: u16) -> Result<Self> {
        let mut policy = None;
        if enable && policy::is_in_kernel() {
            policy = Some(Policy::read()?);
        } else if enable {
            log::warn!(
                "enable_selinux is set, but SELinux is disabled in this kernel: pods get no labels"
            );
        }
        Ok(Selinux {
            policy,
            categories: Arc::new(Categories::new(range)),
        })
    }

    /// Returns the labels of a new pod, and the reservation of their level. If SELinux is not used,
    /// returns `None` and ignores the label that the pod requests.
    pub(crate) fn of_pod(
        &self,
        id: &str,
        requested: &SeLinuxOption,
    ) -> Result<Option<(Labels, LevelHold)>> {
        let Some(policy) = &self.policy else {
            if *requested != SeLinuxOption::default() && policy::is_in_kernel() {
                log::warn!(
                    "pod {}: the requested SELinux label (linux.security_context.selinux_options) has no effect, because enable_selinux is not set",
                    crate::id::short(id)
                );
            }
            return Ok(None);
        };
        let mut labels = policy.labels.clone();
        // A policy without levels can't separate pods by level, so all pods reserve the same empty
        // level.
        let held = if requested.level.is_empty() && !labels.process.level.is_empty() {
            self.categories.unique(id)?
        } else {
            self.categories.hold(&requested.level)
        };
        held.level().clone_into(&mut labels.process.level);
        held.level().clone_into(&mut labels.files.level);
        let labels = labels.overlaid(requested);
        if *requested != SeLinuxOption::default() {
            labels.check_with_kernel()?;
        }
        Ok(Some((labels, held)))
    }

    /// Reserves the level of an existing pod. New pods then get other levels.
    pub(crate) fn hold(&self, labels: &Labels) -> LevelHold {
        self.categories.hold(&labels.process.level)
    }
}

/// Returns the labels of a container. The fields that the container requests replace the fields of
/// the pod's labels.
pub(crate) fn of_container(pod: &Labels, requested: &SeLinuxOption) -> Result<Labels> {
    let labels = pod.clone().overlaid(requested);
    if labels != *pod {
        labels.check_with_kernel()?;
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(process: &str, files: &str) -> Result<Labels> {
        Ok(Labels {
            process: process.parse()?,
            files: files.parse()?,
        })
    }

    #[test]
    fn requested_fields_replace_the_pods_fields() -> Result<()> {
        let pod = labels(
            "system_u:system_r:container_t:s0:c1,c2",
            "system_u:object_r:container_file_t:s0:c1,c2",
        )?;
        let requested = |user: &str, role: &str, kind: &str, level: &str| SeLinuxOption {
            user: user.into(),
            role: role.into(),
            r#type: kind.into(),
            level: level.into(),
        };
        for (requested, process, files) in [
            (
                requested("", "", "", ""),
                "system_u:system_r:container_t:s0:c1,c2",
                "system_u:object_r:container_file_t:s0:c1,c2",
            ),
            (
                requested("", "", "spc_t", ""),
                "system_u:system_r:spc_t:s0:c1,c2",
                "system_u:object_r:container_file_t:s0:c1,c2",
            ),
            (
                requested("user_u", "user_r", "user_t", "s0:c7"),
                "user_u:user_r:user_t:s0:c7",
                "user_u:object_r:container_file_t:s0:c7",
            ),
        ] {
            let made = pod.clone().overlaid(&requested);
            assert_eq!(made, labels(process, files)?, "{requested:?}");
        }
        Ok(())
    }

    #[test]
    fn without_enable_selinux_a_pod_gets_no_labels() -> Result<()> {
        let off = Selinux::open(false, 1024)?;
        assert!(off.of_pod("p", &SeLinuxOption::default())?.is_none());
        Ok(())
    }
}
