//! AppArmor profiles of containers: the one that every container gets, and those of the node's own.
//!
//! Where AppArmor is off, the default profile is nothing at all, and a named one an error, as with
//! containerd: a pod that counts on being confined must not run unconfined.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use rrun_proto::v1::security_profile::ProfileType;
use rrun_proto::v1::{LinuxContainerSecurityContext, SecurityProfile};

use rrun_calls::error::{During, Error, Result};

const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
const PARSER: &str = "apparmor_parser";
/// The prefix of the names of profiles that the node's administrator has loaded.
const LOCALHOST: &str = "localhost/";
/// The profile of containers that ask for none or for the runtime's.
const DEFAULT: &str = "rrun-default";

/// Which profile is requested; `None` if none.
fn requested(context: &LinuxContainerSecurityContext) -> Result<SecurityProfile> {
    if let Some(profile) = &context.apparmor {
        return Ok(profile.clone());
    }
    // Before SecurityProfile. Nothing requested means the default: kubernetes#51746.
    #[allow(deprecated)]
    let text = context.apparmor_profile.as_str();
    let (kind, reference) = match text {
        "" | "runtime/default" => (ProfileType::RuntimeDefault, ""),
        "unconfined" => (ProfileType::Unconfined, ""),
        _ if text.starts_with(LOCALHOST) => (ProfileType::Localhost, text),
        _ => {
            return Err(Error::invalid(format!(
                "the AppArmor profile {text:?} (linux.security_context.apparmor_profile) is neither runtime/default, unconfined nor localhost/NAME"
            )));
        }
    };
    Ok(SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: reference.to_owned(),
    })
}

fn enabled() -> bool {
    // The kernel's: a file of sysfs.
    std::fs::read(ENABLED).is_ok_and(|text| text.first() == Some(&b'Y'))
        && Path::new(LOADED).exists()
}

/// The profile for `process.apparmorProfile`, which is in the kernel when this returns. Blocks.
///
/// # Errors
/// A profile that is not loaded, or one by name where AppArmor is off.
pub(crate) fn profile(context: &LinuxContainerSecurityContext) -> Result<Option<String>> {
    let requested = requested(context)?;
    let reference = requested.localhost_ref.as_str();
    let kind = requested.profile_type();
    if kind != ProfileType::Localhost && !reference.is_empty() {
        return Err(Error::invalid(format!(
            "the AppArmor profile {reference:?} (linux.security_context.apparmor.localhost_ref) goes only with the type Localhost"
        )));
    }
    match kind {
        ProfileType::Unconfined => Ok(None),
        ProfileType::RuntimeDefault if context.privileged || !enabled() => Ok(None),
        ProfileType::RuntimeDefault => {
            load_default()?;
            Ok(Some(DEFAULT.to_owned()))
        }
        ProfileType::Localhost => {
            let name = reference.strip_prefix(LOCALHOST).unwrap_or(reference);
            if !enabled() {
                return Err(Error::invalid(format!(
                    "the AppArmor profile {name:?} (linux.security_context.apparmor) can't be had: AppArmor is not enabled on this node"
                )));
            }
            if !is_loaded(name)? {
                return Err(Error::invalid(format!(
                    "the AppArmor profile {name:?} (linux.security_context.apparmor) is not loaded on this node"
                )));
            }
            Ok(Some(name.to_owned()))
        }
    }
}

/// Lines are `NAME (MODE)`.
fn is_loaded(name: &str) -> Result<bool> {
    // The kernel's: a file of securityfs.
    let loaded = std::fs::read_to_string(LOADED).during(|| format!("read {LOADED}"))?;
    Ok(loaded.lines().any(|line| {
        let mode = line.strip_prefix(name);
        mode.is_some_and(|mode| mode.starts_with(" ("))
    }))
}

/// Puts the default profile into the kernel, unless it is there.
fn load_default() -> Result<()> {
    if is_loaded(DEFAULT)? {
        return Ok(());
    }
    let doing = || format!("load the AppArmor profile {DEFAULT} with {PARSER}");
    let mut parser = Command::new(PARSER)
        .args(["--replace", "--skip-cache"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .during(doing)?;
    if let Some(mut stdin) = parser.stdin.take() {
        // What it makes of half a profile it says itself.
        let _ = stdin.write_all(default_profile(Path::new("/etc/apparmor.d")).as_bytes());
    }
    let output = parser.wait_with_output().during(doing)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Error::internal(format!(
            "{}: {}",
            doing(),
            said.split_whitespace().collect::<Vec<_>>().join(" ")
        )));
    }
    log::info!("loaded the AppArmor profile {DEFAULT}");
    Ok(())
}

/// The default profile's text: what a container has no business with in /proc and /sys, and no
/// mounts. What capabilities, seccomp and mounts say comes on top.
fn default_profile(tree: &Path) -> String {
    let has = |name: &str| tree.join(name).exists();
    let before = if has("tunables/global") {
        "include <tunables/global>"
    } else {
        "@{PROC}=/proc/"
    };
    let base = if has("abstractions/base") {
        "include <abstractions/base>"
    } else {
        ""
    };
    format!(
        "{before}
profile {DEFAULT} flags=(attach_disconnected,mediate_deleted) {{
  {base}
  file,
  network,
  capability,
  umount,
  deny mount,

  # Ends are brought by those outside, which mostly are not confined.
  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  signal (receive) peer=rrun,
  signal (send, receive) peer={DEFAULT},
  ptrace (trace, tracedby, read, readby) peer={DEFAULT},

  # Of the kernel's switches, a container may write those of its processes and namespaces.
  deny @{{PROC}}/* w,
  deny @{{PROC}}/{{acpi,asound,bus,driver,dynamic_debug,fs,irq,pressure,scsi,tty}}/** w,
  deny @{{PROC}}/sys/{{abi,debug,dev,fs,user,vm}}/** w,
  deny @{{PROC}}/sys/kernel/[^hdms]** w,
  deny @{{PROC}}/sys/kernel/{{d[^o],h[^o],m[^s],s[^eh]}}** w,
  deny @{{PROC}}/sys/kernel/{{hotplug,seccomp/**}} w,
  deny @{{PROC}}/{{kcore,kmem,mem,sysrq-trigger}} rwklx,

  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(kind: Option<ProfileType>, reference: &str) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext {
            apparmor: kind.map(|kind| SecurityProfile {
                profile_type: kind.into(),
                localhost_ref: reference.to_owned(),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_newer_field_wins_over_the_text() -> Result<()> {
        #[allow(deprecated)]
        let with = |text: &str, kind| LinuxContainerSecurityContext {
            apparmor_profile: text.to_owned(),
            ..context(kind, "")
        };
        for (text, kind, expected) in [
            ("", None, ProfileType::RuntimeDefault),
            ("runtime/default", None, ProfileType::RuntimeDefault),
            ("unconfined", None, ProfileType::Unconfined),
            ("localhost/a", None, ProfileType::Localhost),
            (
                "localhost/a",
                Some(ProfileType::Unconfined),
                ProfileType::Unconfined,
            ),
        ] {
            assert_eq!(
                requested(&with(text, kind))?.profile_type(),
                expected,
                "{text}"
            );
        }
        assert!(requested(&with("a", None)).is_err());
        Ok(())
    }

    #[test]
    fn a_reference_goes_with_localhost_only() {
        assert!(profile(&context(Some(ProfileType::Unconfined), "a")).is_err());
        assert_eq!(
            profile(&context(Some(ProfileType::Unconfined), "")).ok(),
            Some(None)
        );
        assert!(profile(&context(Some(ProfileType::Localhost), "localhost/absent")).is_err());
    }
}
