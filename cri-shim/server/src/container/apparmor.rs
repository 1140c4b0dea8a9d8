//! AppArmor profiles of containers: rrun's default profile, and profiles that the node's
//! administrator has loaded.
//!
//! If AppArmor is disabled, containers run without the default profile. But the server refuses a
//! container that requests a profile by name, as containerd does. Such a container relies on its
//! profile and must not run unconfined.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rrun_proto::v1::security_profile::ProfileType;
use rrun_proto::v1::{LinuxContainerSecurityContext, SecurityProfile};

use rrun_calls::error::{During, Error, Result};

const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
/// The address families that the kernel's AppArmor can restrict.
const FAMILIES: &str = "/sys/kernel/security/apparmor/features/network_v8/af_mask";
const PARSER: &str = "apparmor_parser";
/// The prefix in the name of a requested profile that the node's administrator has loaded.
const LOCALHOST: &str = "localhost/";
/// The name of the default profile. Containers get it if they request RuntimeDefault or no profile.
const DEFAULT: &str = "rrun-default";
/// The address families that the default profile denies, as the default seccomp profile does
/// (`SOCKET_FAMILIES` in seccomp_default.rs). AppArmor also denies them to 32-bit x86 programs that
/// use the system call socketcall.
const DENIED_FAMILIES: [&str; 2] = ["alg", "vsock"];

/// Returns the requested profile. A request that does not specify a profile means RuntimeDefault.
fn requested(context: &LinuxContainerSecurityContext) -> Result<SecurityProfile> {
    if let Some(profile) = &context.apparmor {
        return Ok(profile.clone());
    }
    // The text field `apparmor_profile` is older than the message SecurityProfile, which replaced
    // it. If the text is empty, the default profile is used, see kubernetes#51746.
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

/// Returns whether AppArmor is enabled. An error must not count as disabled, because the container
/// would then run without a profile.
fn enabled() -> Result<bool> {
    // The kernel's sysfs provides this file, so opening it by its path is safe.
    match std::fs::read(ENABLED) {
        Ok(text) if text.first() == Some(&b'Y') => {
            let loaded = Path::new(LOADED).try_exists();
            loaded.during(|| format!("find {LOADED}"))
        }
        Ok(_) => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).during(|| format!("read {ENABLED}")),
    }
}

/// Returns the name of the container's AppArmor profile, for `process.apparmorProfile` in
/// config.json. The profile is loaded in the kernel when this function returns. This call blocks.
///
/// # Errors
/// Returns an error if the requested profile is not loaded. If AppArmor is disabled, every request
/// of a profile by name is an error.
pub(crate) fn profile(context: &LinuxContainerSecurityContext) -> Result<Option<String>> {
    let requested = requested(context)?;
    let reference = requested.localhost_ref.as_str();
    let kind = requested.profile_type();
    if kind != ProfileType::Localhost && !reference.is_empty() {
        return Err(Error::invalid(format!(
            "the AppArmor profile {reference:?} (linux.security_context.apparmor.localhost_ref) is only allowed with the profile type Localhost"
        )));
    }
    match kind {
        ProfileType::Unconfined => Ok(None),
        ProfileType::RuntimeDefault if context.privileged || !enabled()? => Ok(None),
        ProfileType::RuntimeDefault => {
            load_default()?;
            Ok(Some(DEFAULT.to_owned()))
        }
        ProfileType::Localhost => {
            let name = reference.strip_prefix(LOCALHOST).unwrap_or(reference);
            if !enabled()? {
                return Err(Error::invalid(format!(
                    "the AppArmor profile {name:?} (linux.security_context.apparmor) can't be used: AppArmor is not enabled on this node"
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

/// Returns whether a profile is loaded in the kernel. The lines of the file `LOADED` have the form
/// `NAME (MODE)`.
fn is_loaded(name: &str) -> Result<bool> {
    // The kernel's securityfs provides this file, so opening it by its path is safe.
    let loaded = std::fs::read_to_string(LOADED).during(|| format!("read {LOADED}"))?;
    Ok(loaded.lines().any(|line| {
        let mode = line.strip_prefix(name);
        mode.is_some_and(|mode| mode.starts_with(" ("))
    }))
}

/// Returns true if the container's AppArmor profile `profile` denies the address families that the
/// default seccomp profile denies.
pub(super) fn restricts_families(profile: Option<&str>) -> bool {
    static BY_KERNEL: OnceLock<bool> = OnceLock::new();
    profile == Some(DEFAULT)
        && *BY_KERNEL.get_or_init(|| {
            // The kernel's securityfs provides this file, so opening it by its path is safe.
            let families = std::fs::read_to_string(FAMILIES).unwrap_or_default();
            let restricted: Vec<&str> = families.split_whitespace().collect();
            DENIED_FAMILIES
                .iter()
                .all(|family| restricted.contains(family))
        })
}

/// Loads the default AppArmor profile into the kernel, unless this server has loaded it already. A
/// profile that an earlier version of the server loaded is replaced.
fn load_default() -> Result<()> {
    static IS_CURRENT: AtomicBool = AtomicBool::new(false);
    if IS_CURRENT.load(Ordering::Relaxed) && is_loaded(DEFAULT)? {
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
        // A write error is ignored, because the parser itself reports an incomplete profile.
        let _ = stdin.write_all(default_profile(Path::new("/etc/apparmor.d")).as_bytes());
    }
    let output = parser.wait_with_output().during(doing)?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(Error::internal(format!(
            "{}: {}",
            doing(),
            stderr.split_whitespace().collect::<Vec<_>>().join(" ")
        )));
    }
    IS_CURRENT.store(true, Ordering::Relaxed);
    log::info!("loaded the AppArmor profile {DEFAULT}");
    Ok(())
}

/// Returns the text of the default AppArmor profile. The profile denies mounts, the address
/// families in [`DENIED_FAMILIES`], and access to the files in /proc and /sys that a container does
/// not need. The container's capabilities, seccomp profile and mounts restrict the container
/// further.
fn default_profile(tree: &Path) -> String {
    let has = |name: &str| tree.join(name).exists();
    // AppArmor 3 and later compile a profile without this line for the features of an old kernel,
    // if the distribution configures the parser so. With the features of AppArmor 4 and later, the
    // rule `network` would no longer include Unix sockets.
    let abi = if has("abi/3.0") { "abi <abi/3.0>," } else { "" };
    let denied = DENIED_FAMILIES.map(|family| format!("deny network {family},"));
    let denied = denied.join("\n  ");
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
        "{abi}
{before}
profile {DEFAULT} flags=(attach_disconnected,mediate_deleted) {{
  {base}
  file,
  network,
  {denied}
  capability,
  umount,
  deny mount,

  # Signals from outside the container, mostly from unconfined processes.
  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  signal (receive) peer=rrun,
  signal (send, receive) peer={DEFAULT},
  ptrace (trace, tracedby, read, readby) peer={DEFAULT},

  # A container may write only kernel parameters of its own processes and namespaces.
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
    fn the_apparmor_field_wins_over_the_deprecated_text_field() -> Result<()> {
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
    fn a_profile_name_is_allowed_only_with_the_type_localhost() {
        assert!(profile(&context(Some(ProfileType::Unconfined), "a")).is_err());
        assert_eq!(
            profile(&context(Some(ProfileType::Unconfined), "")).ok(),
            Some(None)
        );
        assert!(profile(&context(Some(ProfileType::Localhost), "localhost/absent")).is_err());
    }
}
