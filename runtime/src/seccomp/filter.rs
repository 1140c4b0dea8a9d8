//! The filter that rrun compiles from a seccomp profile, and that a container's process loads.

use std::os::fd::{AsFd, IntoRawFd as _, OwnedFd};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::compile;
use super::listener::Listener;
use super::shared_page::Reporter;
use crate::config::spec::SeccompProfile;
use crate::error::{Context, Error, Reason as _, Result, refuse};
use crate::log;
use crate::sys::child::{exit_now, trap};
use crate::sys::syscalls::{self, SockFilter};
use rrun_kernel::errno::ENOTSUPP;

/// The names and values of the filter flags. See seccomp(2).
pub(crate) const FLAGS: [(&str, u32); 4] = [
    (TSYNC, 0),
    (
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
        libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32,
    ),
    (
        "SECCOMP_FILTER_FLAG_LOG",
        libc::SECCOMP_FILTER_FLAG_LOG as u32,
    ),
    ("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", WAIT_KILLABLE_RECV),
];
/// The name of the flag that applies the filter to all threads of the process. rrun accepts this
/// name but sets no flag for it, because the process has only one thread.
const TSYNC: &str = "SECCOMP_FILTER_FLAG_TSYNC";
const WAIT_KILLABLE_RECV: u32 = libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV as u32;
const NEW_LISTENER: u32 = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as u32;

/// A filter that is ready to load. The JSON form of a filter is part of a container's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Filter {
    #[serde(serialize_with = "to_hex", deserialize_with = "from_hex")]
    program: Vec<SockFilter>,
    /// The `SECCOMP_FILTER_FLAG_*` bits of the filter.
    flags: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) listener: Option<Listener>,
    /// True if the filter has a listener and allows close(2).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    allows_close: bool,
}

impl Filter {
    /// Compiles a profile to a filter. Returns `None` if the profile is empty, because the
    /// container then has no filter.
    ///
    /// # Errors
    /// Fails if a value of the profile is unknown, contradicts another value, or is not supported
    /// by this kernel. The error names the field that contains the value.
    pub(crate) fn from_profile(profile: &SeccompProfile) -> Result<Option<Filter>> {
        if profile.is_empty() {
            return Ok(None);
        }
        let checked = profile.check(&mut |name| {
            log::debug(|| format!("unknown seccomp syscall \"{name}\" ignored"));
        })?;
        let text = |field: &Option<String>| field.clone().filter(|text| !text.is_empty());
        let path = text(&profile.listener_path);
        let metadata = text(&profile.listener_metadata);
        if metadata.is_some() && path.is_none() {
            refuse!("linux.seccomp.listenerMetadata: is set, but listenerPath is missing");
        }
        let listener = match (checked.notifies, path) {
            (false, _) => None,
            (true, Some(path)) => Some(Listener { path, metadata }),
            (true, None) => refuse!(
                "linux.seccomp.listenerPath: is missing, but SCMP_ACT_NOTIFY requires an agent that listens at this path"
            ),
        };
        let flags = flags(profile, listener.is_some())?;
        Ok(Some(Filter {
            program: compile::compile(&checked)?,
            flags,
            allows_close: listener.is_some() && checked.allows("close"),
            listener,
        }))
    }

    /// Loads the filter, which then applies to all system calls of this process and cannot be
    /// removed. Returns the listener, if the filter has one.
    pub(crate) fn load(&self) -> Result<Option<OwnedFd>> {
        syscalls::load_seccomp_filter(&self.program, self.flags).map_err(|errno| {
            let doing = "load the seccomp filter (linux.seccomp)";
            if errno.raw_os_error() == ENOTSUPP {
                return Error::new(format!(
                    "{doing}: the node's memory for BPF programs is used up (net.core.bpf_jit_limit)"
                ));
            }
            Error::new(format!("{doing}: {}", errno.reason()))
        })
    }

    /// Loads the filter like [`Filter::load`]. If the filter has a listener, this function returns
    /// only when the agent has received the listener. After the filter is loaded, this function
    /// makes no system call except close(2), if the filter allows it.
    pub(crate) fn confine(&self, reporter: &Reporter) -> Result<()> {
        if let Some(listener) = self.load()? {
            if !reporter.await_agent(listener.as_fd()) {
                self.end();
            }
            // If the agent closes its listener, execve(2) fails only if no other process has the
            // listener open. Otherwise, it would wait forever for a decision of the agent.
            if self.allows_close {
                drop(listener);
            } else {
                // The listener stays open until execve(2) closes it.
                let _ = listener.into_raw_fd();
            }
        }
        Ok(())
    }

    /// Ends this process. The process may already have loaded the filter, and the filter can block
    /// exit_group(2).
    pub(crate) fn end(&self) -> ! {
        if self.listener.is_some() {
            // The filter can pass exit_group(2) to the agent. If the agent has exited,
            // exit_group(2) would then wait forever, because this process itself still has the
            // listener open. So the process does not call exit_group(2).
            trap()
        }
        exit_now()
    }
}

/// Returns the flags for loading the filter. Fails if this kernel does not support a flag.
fn flags(profile: &SeccompProfile, listens: bool) -> Result<u32> {
    let mut flags = if listens { NEW_LISTENER } else { 0 };
    match &profile.flags {
        // If the profile does not specify flags, rrun sets SPEC_ALLOW as runc does. Then the kernel
        // does not restrict speculative execution.
        None => flags |= libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32,
        Some(names) => {
            for (index, name) in names.iter().enumerate() {
                let Some((_, flag)) = FLAGS.iter().find(|(known, _)| known == name) else {
                    refuse!("linux.seccomp.flags[{index}]: {name} is unknown");
                };
                if *flag == WAIT_KILLABLE_RECV && !listens {
                    refuse!(
                        "linux.seccomp.flags[{index}]: {name} is allowed only if the profile uses SCMP_ACT_NOTIFY"
                    );
                }
                flags |= flag;
            }
        }
    }
    let has = |flags| {
        syscalls::has_seccomp_flags(flags)
            .doing(|| "linux.seccomp: check which flags the kernel supports (seccomp)")
    };
    if !has(flags)? {
        if !has(0)? {
            refuse!("linux.seccomp: this kernel does not support seccomp filters");
        }
        for name in profile.flags.iter().flatten() {
            if !supports(name) {
                refuse!("linux.seccomp.flags: this kernel does not support {name}");
            }
        }
        refuse!("linux.seccomp: this kernel does not support SCMP_ACT_NOTIFY");
    }
    Ok(flags)
}

/// Returns whether this kernel supports filters with the flag `flag`.
pub(crate) fn supports(flag: &str) -> bool {
    FLAGS.iter().any(|(name, flag_bit)| {
        let with = if *flag_bit == WAIT_KILLABLE_RECV {
            NEW_LISTENER
        } else {
            0
        };
        *name == flag && syscalls::has_seccomp_flags(flag_bit | with).unwrap_or(false)
    })
}

fn to_hex<S: Serializer>(program: &[SockFilter], to: S) -> std::result::Result<S::Ok, S::Error> {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(program.len() * 16);
    for instruction in program {
        let _ = write!(text, "{:016x}", instruction.pack());
    }
    to.serialize_str(&text)
}

fn from_hex<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Vec<SockFilter>, D::Error> {
    let text = String::deserialize(from)?;
    let (words, rest) = text.as_bytes().as_chunks::<16>();
    if !rest.is_empty() {
        return Err(D::Error::custom(
            "the seccomp filter ends in the middle of an instruction",
        ));
    }
    words
        .iter()
        .map(|word| {
            let digits = std::str::from_utf8(word).map_err(D::Error::custom)?;
            let packed = u64::from_str_radix(digits, 16).map_err(D::Error::custom)?;
            Ok(SockFilter::unpack(packed))
        })
        .collect()
}
