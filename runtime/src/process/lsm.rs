//! The labels of a process for the kernel's security modules (LSMs): its AppArmor profile and its
//! SELinux label. See proc_pid_attr(5) and Documentation/userspace-api/lsm.rst in the kernel tree.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::config::spec;
use crate::error::{Context, Error, Result, refuse};
use rrun_kernel::procfs::Procfs;

/// `SELINUX_MAGIC` in linux/magic.h.
const SELINUX_MAGIC: u64 = 0xf97c_ff8c;
const SELINUX_MOUNT: &str = "/sys/fs/selinux";
const APPARMOR_ENABLED: &str = "/sys/module/apparmor/parameters/enabled";

/// The AppArmor profile and the SELinux label of the program that a process executes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Labels {
    apparmor: Option<String>,
    selinux: Option<String>,
}

/// The open files in /proc/self/attr to which a process writes its own labels.
///
/// rrun opens these files in the host's /proc, because the /proc in the container can be a fake
/// (CVE-2019-16884) or can be missing.
#[derive(Default)]
pub(crate) struct OpenLabels {
    apparmor: Option<(OwnedFd, String)>,
    selinux: Option<OpenSelinux>,
}

struct OpenSelinux {
    exec: OwnedFd,
    keycreate: OwnedFd,
    label: String,
}

fn non_empty(text: Option<&String>) -> Option<String> {
    text.filter(|text| !text.is_empty()).cloned()
}

/// Returns whether AppArmor is enabled in the kernel.
fn has_apparmor() -> Result<bool> {
    match std::fs::read(APPARMOR_ENABLED) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        text => Ok(text.doing(|| format!("read {APPARMOR_ENABLED}"))?.first() == Some(&b'Y')),
    }
}

/// Returns whether SELinux is enabled in the kernel.
pub(crate) fn has_selinux() -> Result<bool> {
    match rustix::fs::statfs(SELINUX_MOUNT) {
        Err(Errno::NOENT) => Ok(false),
        fs => Ok(fs.doing(|| format!("stat {SELINUX_MOUNT}"))?.f_type as u64 == SELINUX_MAGIC),
    }
}

impl Labels {
    /// Reads the labels from the configuration of a process.
    ///
    /// # Errors
    /// Fails if a label is malformed, or if the label's security module is not enabled in the
    /// kernel. The error names the invalid field.
    pub(crate) fn from_spec(process: &spec::ProcessSpec) -> Result<Labels> {
        let labels = Labels {
            apparmor: non_empty(process.apparmor_profile.as_ref()),
            selinux: non_empty(process.selinux_label.as_ref()),
        };
        if let Some(profile) = &labels.apparmor {
            if profile.contains(['\0', '\n']) {
                refuse!(
                    "process.apparmorProfile: {profile:?} is not a valid name of an AppArmor profile"
                );
            }
            if !has_apparmor()? {
                refuse!(
                    "process.apparmorProfile: {profile} cannot be used, because AppArmor is not enabled in this kernel"
                );
            }
        }
        if let Some(label) = &labels.selinux {
            if label.contains(['\0', '\n']) {
                refuse!("process.selinuxLabel: {label:?} is not a valid SELinux label");
            }
            if !has_selinux()? {
                refuse!(
                    "process.selinuxLabel: {label} cannot be used, because SELinux is not enabled in this kernel"
                );
            }
        }
        Ok(labels)
    }

    /// Opens the host's procfs for [`Labels::open`]. Returns `None` if no label has to be set.
    pub(crate) fn open_procfs(&self) -> Result<Option<Procfs>> {
        let is_needed = *self != Labels::default();
        Ok(is_needed.then(Procfs::open).transpose()?)
    }

    /// Opens the files in /proc/self/attr of the host's procfs. [`OpenLabels::apply`] sets the
    /// labels by writing to these files. `procfs` is the result of [`Labels::open_procfs`].
    pub(crate) fn open(&self, procfs: Option<&Procfs>) -> Result<OpenLabels> {
        let Some(procfs) = procfs else {
            return Ok(OpenLabels::default());
        };
        let attr = |name: &str| procfs.for_writing(&format!("self/attr/{name}"));
        let apparmor = self
            .apparmor
            .as_ref()
            .map(|profile| {
                // Since Linux 5.8, AppArmor has its own file, /proc/self/attr/apparmor/exec. On
                // older kernels, all security modules share the file /proc/self/attr/exec.
                let file = match attr("apparmor/exec") {
                    Err(Errno::NOENT) => attr("exec"),
                    result => result,
                };
                let file = file.doing(|| "open /proc/self/attr/apparmor/exec")?;
                Ok::<_, Error>((file, profile.clone()))
            })
            .transpose()?;
        let selinux = self
            .selinux
            .as_ref()
            .map(|label| {
                let open = |name| attr(name).doing(|| format!("open /proc/self/attr/{name}"));
                Ok::<_, Error>(OpenSelinux {
                    exec: open("exec")?,
                    keycreate: open("keycreate")?,
                    label: label.clone(),
                })
            })
            .transpose()?;
        Ok(OpenLabels { apparmor, selinux })
    }
}

impl OpenLabels {
    /// Calls `make`, which creates a session keyring. If the configuration specifies an SELinux
    /// label, the new keyring gets this label.
    pub(crate) fn label_keyring<T>(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(selinux) = &self.selinux else {
            return make();
        };
        let doing = || {
            format!(
                "label the session keyring with process.selinuxLabel {}",
                selinux.label
            )
        };
        rustix::io::pwrite(&selinux.keycreate, selinux.label.as_bytes(), 0).doing(doing)?;
        let made = make();
        rustix::io::pwrite(&selinux.keycreate, b"\0", 0).doing(doing)?;
        made
    }

    /// Sets the AppArmor profile and the SELinux label of the program that the calling process will
    /// execute.
    pub(crate) fn apply(&self) -> Result<()> {
        if let Some((file, profile)) = &self.apparmor {
            let request = format!("exec {profile}");
            match rustix::io::write(file, request.as_bytes()) {
                Err(Errno::NOENT) => {
                    refuse!("set process.apparmorProfile: profile {profile} is not loaded (ENOENT)")
                }
                result => result.doing(|| format!("set process.apparmorProfile to {profile}"))?,
            };
        }
        if let Some(selinux) = &self.selinux {
            rustix::io::pwrite(&selinux.exec, selinux.label.as_bytes(), 0)
                .doing(|| format!("set process.selinuxLabel to {}", selinux.label))?;
        }
        Ok(())
    }
}
