//! What the kernel's security modules are told of a process: its AppArmor profile and its
//! SELinux label. See Documentation/userspace-api/lsm.rst, proc_pid_attr(5).

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::config::spec;
use crate::error::{Context, Error, Result, refuse};
use rrun_kernel::procfs::Procfs;

/// linux/magic.h
const SELINUX_MAGIC: u64 = 0xf97c_ff8c;
const SELINUX_MOUNT: &str = "/sys/fs/selinux";
const APPARMOR_ENABLED: &str = "/sys/module/apparmor/parameters/enabled";

/// Profile and label that a process is to be executed with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Labels {
    apparmor: Option<String>,
    selinux: Option<String>,
}

/// The files of /proc through which a process tells the kernel of its own, open.
///
/// They are opened while /proc is the host's: what a container has there may be anything
/// (CVE-2019-16884), or nothing.
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

/// Whether the kernel enforces AppArmor profiles.
fn has_apparmor() -> bool {
    std::fs::read(APPARMOR_ENABLED).is_ok_and(|text| text.first() == Some(&b'Y'))
}

/// Whether the kernel enforces SELinux labels.
pub(crate) fn has_selinux() -> bool {
    rustix::fs::statfs(SELINUX_MOUNT).is_ok_and(|fs| fs.f_type as u64 == SELINUX_MAGIC)
}

impl Labels {
    /// # Errors
    /// What the kernel does not have, by its field.
    pub(crate) fn from_spec(process: &spec::ProcessSpec) -> Result<Labels> {
        let labels = Labels {
            apparmor: non_empty(process.apparmor_profile.as_ref()),
            selinux: non_empty(process.selinux_label.as_ref()),
        };
        if let Some(profile) = &labels.apparmor {
            if profile.contains(['\0', '\n']) {
                refuse!("process.apparmorProfile: {profile:?} is no name of a profile");
            }
            if !has_apparmor() {
                refuse!(
                    "process.apparmorProfile: {profile} can not be had, AppArmor is not enabled in this kernel"
                );
            }
        }
        if let Some(label) = &labels.selinux {
            if label.contains(['\0', '\n']) {
                refuse!("process.selinuxLabel: {label:?} is no label");
            }
            if !has_selinux() {
                refuse!(
                    "process.selinuxLabel: {label} can not be had, SELinux is not enabled in this kernel"
                );
            }
        }
        Ok(labels)
    }

    /// Opens what [`OpenLabels::apply`] will write to, in the host's /proc.
    pub(crate) fn open(&self) -> Result<OpenLabels> {
        if *self == Labels::default() {
            return Ok(OpenLabels::default());
        }
        let procfs = Procfs::open()?;
        let attr = |name: &str| procfs.for_writing(&format!("self/attr/{name}"));
        let apparmor = self
            .apparmor
            .as_ref()
            .map(|profile| {
                // Of its own since Linux 5.8; before, shared with the other modules.
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
    /// Has a session keyring that is made next belong to the label, if there is one.
    pub(crate) fn label_keyring<T>(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(selinux) = &self.selinux else {
            return make();
        };
        let doing = || {
            format!(
                "label the session keyring as process.selinuxLabel says, {}",
                selinux.label
            )
        };
        rustix::io::pwrite(&selinux.keycreate, selinux.label.as_bytes(), 0).doing(doing)?;
        let made = make();
        rustix::io::pwrite(&selinux.keycreate, b"\0", 0).doing(doing)?;
        made
    }

    /// Has the program that this process executes run with profile and label.
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
