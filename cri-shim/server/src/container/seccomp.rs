//! Selects the seccomp profile of a container.

use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxSeccomp;
use rrun_proto::v1::security_profile::ProfileType;
use rrun_proto::v1::{LinuxContainerSecurityContext, SecurityProfile};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::capabilities::CapabilitySets;
use super::{apparmor, seccomp_default};
use rrun_calls::error::{Error, Result};
use rrun_kernel::regular_file;

/// The maximum size in bytes of a seccomp profile that the server reads; large profiles have about
/// 50 kB.
const SIZE_LIMIT: u64 = 1 << 20;

/// The seccomp profile that a CRI request or the configuration selects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum SeccompProfile {
    #[default]
    Unconfined,
    RuntimeDefault,
    /// A file on the node that contains a JSON object in the format of `linux.seccomp` in the OCI
    /// runtime specification.
    Localhost(PathBuf),
}

impl std::fmt::Display for SeccompProfile {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SeccompProfile::Unconfined => formatter.write_str("unconfined"),
            SeccompProfile::RuntimeDefault => formatter.write_str("runtime/default"),
            SeccompProfile::Localhost(path) => write!(formatter, "localhost/{}", path.display()),
        }
    }
}

/// Whether the default profile allows the system call socketcall of 32-bit x86 programs. A seccomp
/// filter can't restrict the address family of a socket that a program creates through socketcall.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Socketcall {
    /// The profile allows socketcall if the container's AppArmor profile restricts the address
    /// families.
    #[default]
    Auto,
    Allow,
    Deny,
}

impl Socketcall {
    /// Returns true if the default profile of a container with the AppArmor profile `apparmor`
    /// allows socketcall.
    pub(crate) fn is_allowed(self, apparmor: Option<&str>) -> bool {
        match self {
            Socketcall::Auto => apparmor::restricts_families(apparmor),
            Socketcall::Allow => true,
            Socketcall::Deny => false,
        }
    }
}

/// The value of `linux.seccomp` in config.json.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum SeccompFilter {
    Default(LinuxSeccomp),
    /// The contents of a profile file. The server passes the contents to the runtime unchanged. The
    /// runtime can therefore support fields that the server does not support.
    File(Value),
}

impl SeccompProfile {
    /// Parses `runtime/default`, `unconfined` or `localhost/PATH`. An empty text means unconfined.
    ///
    /// # Errors
    /// Returns an error if the text does not have one of these forms.
    pub(crate) fn parse(text: &str) -> std::result::Result<SeccompProfile, String> {
        // This function accepts every text that `Display` writes.
        match text {
            "" | "unconfined" => Ok(SeccompProfile::Unconfined),
            "runtime/default" | "docker/default" => Ok(SeccompProfile::RuntimeDefault),
            _ => match text.strip_prefix("localhost/") {
                Some(path) => SeccompProfile::localhost(path),
                None => Err(format!(
                    "{text:?} is not runtime/default, unconfined or localhost/PATH"
                )),
            },
        }
    }

    fn localhost(path: &str) -> std::result::Result<SeccompProfile, String> {
        if !path.starts_with('/') {
            return Err(format!("{path:?} is not an absolute path"));
        }
        Ok(SeccompProfile::Localhost(path.into()))
    }

    fn from_profile(profile: &SecurityProfile) -> std::result::Result<SeccompProfile, String> {
        match ProfileType::try_from(profile.profile_type) {
            Ok(ProfileType::RuntimeDefault) => Ok(SeccompProfile::RuntimeDefault),
            Ok(ProfileType::Unconfined) => Ok(SeccompProfile::Unconfined),
            Ok(ProfileType::Localhost) => SeccompProfile::localhost(&profile.localhost_ref),
            Err(_) => Err(format!(
                "the seccomp profile type {} is unknown",
                profile.profile_type
            )),
        }
    }

    /// Returns the container's profile. If the container requests no profile, the result is the
    /// profile named by `unset`.
    pub(crate) fn of(
        context: &LinuxContainerSecurityContext,
        unset: &str,
    ) -> Result<SeccompProfile> {
        // A privileged container runs without a seccomp profile.
        if context.privileged {
            return Ok(SeccompProfile::Unconfined);
        }
        #[allow(deprecated)] // Old kubelets set only this field.
        let old = context.seccomp_profile_path.as_str();
        let (field, profile) = match &context.seccomp {
            Some(profile) => ("seccomp", SeccompProfile::from_profile(profile)),
            None if old.is_empty() => ("seccomp", SeccompProfile::parse(unset)),
            None => ("seccomp_profile_path", SeccompProfile::parse(old)),
        };
        profile.map_err(|reason| {
            Error::invalid(format!(
                "the container's linux.security_context.{field}: {reason}"
            ))
        })
    }

    /// Returns the value of `linux.seccomp` in config.json. Blocks if the profile is in a file.
    /// `socketcall` is true if the default profile allows socketcall.
    pub(crate) fn profile(
        &self,
        capabilities: CapabilitySets,
        socketcall: bool,
    ) -> Result<Option<SeccompFilter>> {
        match self {
            SeccompProfile::Unconfined => Ok(None),
            SeccompProfile::RuntimeDefault => {
                let profile = seccomp_default::profile(capabilities, socketcall)?;
                Ok(Some(SeccompFilter::Default(profile)))
            }
            SeccompProfile::Localhost(path) => {
                let read = read(path).map(SeccompFilter::File);
                read.map(Some).map_err(|(errno, reason)| {
                    Error::of_file(errno, format!(
                    "the container's seccomp profile {} (linux.security_context.seccomp): {reason}",
                    path.display()
                ))
                })
            }
        }
    }
}

/// Reads and parses a profile. The error contains the reason, and the errno if a system call failed.
fn read(path: &Path) -> std::result::Result<Value, (Option<i32>, String)> {
    let text = regular_file::open(path, OFlags::RDONLY)
        .and_then(|file| regular_file::read(file, SIZE_LIMIT))
        .map_err(|unfit| (unfit.errno(), unfit.to_string()))?;
    let profile: Value =
        serde_json::from_slice(&text).map_err(|error| (None, format!("is not JSON: {error}")))?;
    if !profile["defaultAction"].is_string() {
        return Err((None, "has no defaultAction".to_owned()));
    }
    Ok(profile)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn localhost(path: &str) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext {
            seccomp: Some(SecurityProfile {
                profile_type: ProfileType::Localhost.into(),
                localhost_ref: path.to_owned(),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_container_gets_the_requested_profile() -> Result<()> {
        let unset = "runtime/default";
        let nothing = LinuxContainerSecurityContext::default();
        assert_eq!(
            SeccompProfile::of(&nothing, unset)?,
            SeccompProfile::RuntimeDefault
        );
        assert_eq!(
            SeccompProfile::of(&nothing, "unconfined")?,
            SeccompProfile::Unconfined
        );
        assert_eq!(
            SeccompProfile::of(&localhost("/p.json"), unset)?,
            SeccompProfile::Localhost("/p.json".into())
        );
        let mut privileged = localhost("/p.json");
        privileged.privileged = true;
        assert_eq!(
            SeccompProfile::of(&privileged, unset)?,
            SeccompProfile::Unconfined
        );
        #[allow(deprecated)]
        let old = LinuxContainerSecurityContext {
            seccomp_profile_path: "localhost//p.json".to_owned(),
            ..Default::default()
        };
        assert_eq!(
            SeccompProfile::of(&old, unset)?,
            SeccompProfile::Localhost("/p.json".into())
        );
        Ok(())
    }

    #[test]
    fn an_error_about_a_profile_names_its_path() {
        let relative = SeccompProfile::of(&localhost("p.json"), "unconfined").unwrap_err();
        assert!(relative.sentence().contains("security_context.seccomp"));
        for text in ["default", "localhost/p.json", "runtime/other"] {
            assert!(SeccompProfile::parse(text).is_err(), "{text}");
        }
        let directory = std::env::temp_dir().join(format!("rrun-seccomp-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let file = directory.join("profile.json");
        let failure = |path: &Path| {
            let read = SeccompProfile::Localhost(path.to_owned())
                .profile(CapabilitySets::default(), false);
            read.err().map(|error| error.sentence().to_owned())
        };
        for (text, word) in [
            ("{", "JSON"),
            ("{}", "defaultAction"),
            ("[]", "defaultAction"),
        ] {
            std::fs::write(&file, text).unwrap();
            let failure = failure(&file).unwrap_or_default();
            assert!(
                failure.contains(word) && failure.contains("profile.json"),
                "{failure}"
            );
        }
        std::fs::write(&file, r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap();
        assert_eq!(failure(&file), None);
        assert!(
            failure(&directory)
                .unwrap_or_default()
                .contains("is a directory, not a regular file")
        );
        std::fs::remove_dir_all(&directory).unwrap();
        assert!(failure(&file).unwrap_or_default().contains("No such file"));
    }
}
