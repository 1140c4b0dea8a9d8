//! SELinux labels of pods: of their processes, and of the files that are theirs.
//!
//! Off unless `enable_selinux` is set and the kernel has SELinux; then nothing is looked at. A pod
//! has the policy's label for containers, with categories that no other pod has; what a pod or a
//! container asks for is laid over that. The labels are in the pod's record: what a pod was made
//! with it keeps, whatever the configuration says later.

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

/// The labels of a pod or of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Labels {
    pub process: Label,
    pub files: Label,
}

impl Labels {
    /// What is asked for in the place of what is there. Files have the policy's type, whatever
    /// that of the processes.
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
            policy::check(label).map_err(|said| {
                Error::invalid(format!(
                    "the SELinux label {label} (linux.security_context.selinux_options) is none of this node's policy: {said}"
                ))
            })?;
        }
        Ok(())
    }
}

/// What the node knows of SELinux.
pub(crate) struct Selinux {
    /// `None`: off.
    policy: Option<Policy>,
    categories: Arc<Categories>,
}

impl Selinux {
    /// By `enable_selinux` and `selinux_category_range`.
    ///
    /// # Errors
    /// A policy that has no labels for containers.
    pub(crate) fn open(enable: bool, range: u16) -> Result<Self> {
        let mut policy = None;
        if enable && policy::is_in_kernel() {
            policy = Some(Policy::read()?);
        } else if enable {
            log::warn!(
                "enable_selinux is set, and this kernel has SELinux off: pods get no labels"
            );
        }
        Ok(Selinux {
            policy,
            categories: Arc::new(Categories::new(range)),
        })
    }

    /// The labels of a new pod, and a hold on their level. `None` where SELinux is off; what the
    /// pod asks for has no effect there.
    pub(crate) fn of_pod(
        &self,
        id: &str,
        requested: &SeLinuxOption,
    ) -> Result<Option<(Labels, LevelHold)>> {
        let Some(policy) = &self.policy else {
            if *requested != SeLinuxOption::default() && policy::is_in_kernel() {
                log::warn!(
                    "pod {}: asks for an SELinux label (linux.security_context.selinux_options), which has no effect: enable_selinux is not set",
                    crate::id::short(id)
                );
            }
            return Ok(None);
        };
        let mut labels = policy.labels.clone();
        // A policy without levels has none to tell pods apart by.
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

    /// Keeps new pods off the level of one that is there.
    pub(crate) fn hold(&self, labels: &Labels) -> LevelHold {
        self.categories.hold(&labels.process.level)
    }
}

/// The labels of a container of a pod: the pod's, where it asks for no others.
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
    fn what_is_asked_for_takes_the_place_of_what_is_there() -> Result<()> {
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
    fn where_it_is_off_nothing_is_made() -> Result<()> {
        let off = Selinux::open(false, 1024)?;
        assert!(off.of_pod("p", &SeLinuxOption::default())?.is_none());
        Ok(())
    }
}
