//! A filter made of a profile, which a process loads.

use std::os::fd::{AsFd, IntoRawFd as _, OwnedFd};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::compile;
use super::listener::Listener;
use super::shared_page::Reporter;
use crate::config::spec::SeccompProfile;
use crate::error::{Context, Result, refuse};
use crate::log;
use crate::sys::child::{exit_now, trap};
use crate::sys::syscalls::{self, SockFilter};

/// Flags by their names; seccomp(2) explains them.
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
/// Would have all threads filtered, of which there is one.
const TSYNC: &str = "SECCOMP_FILTER_FLAG_TSYNC";
const WAIT_KILLABLE_RECV: u32 = libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV as u32;
const NEW_LISTENER: u32 = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as u32;

/// A filter ready to be loaded; as JSON, part of a container's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Filter {
    #[serde(serialize_with = "to_hex", deserialize_with = "from_hex")]
    program: Vec<SockFilter>,
    /// `SECCOMP_FILTER_FLAG_*`.
    flags: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) listener: Option<Listener>,
}

impl Filter {
    /// The filter of a profile. `None` if the profile is empty, which means no seccomp at all.
    ///
    /// # Errors
    /// What is unknown, contradictory, or not in this kernel, by the name of its field.
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
            refuse!("linux.seccomp.listenerMetadata: there is no listenerPath to send it to");
        }
        let listener = match (checked.notifies, path) {
            (false, _) => None,
            (true, Some(path)) => Some(Listener { path, metadata }),
            (true, None) => refuse!(
                "linux.seccomp.listenerPath: is missing: nobody could be asked about the calls with SCMP_ACT_NOTIFY"
            ),
        };
        let flags = flags(profile, listener.is_some())?;
        Ok(Some(Filter {
            program: compile::compile(&checked)?,
            flags,
            listener,
        }))
    }

    /// Filters this process's calls from now on, for good. Gives the listener, if there is
    /// one.
    pub(crate) fn load(&self) -> Result<Option<OwnedFd>> {
        syscalls::load_seccomp_filter(&self.program, self.flags)
            .doing(|| "load the seccomp filter (linux.seccomp)")
    }

    /// As [`Filter::load`], but returns only when the agent has the listener, if there is one.
    /// Makes no system call once the filter is loaded.
    pub(crate) fn confine(&self, reporter: &Reporter) -> Result<()> {
        if let Some(listener) = self.load()? {
            if !reporter.await_agent(listener.as_fd()) {
                self.end();
            }
            // execve(2) closes the listener; the filter may forbid close(2).
            let _ = listener.into_raw_fd();
        }
        Ok(())
    }

    /// Ends this process once the filter is loaded.
    pub(crate) fn end(&self) -> ! {
        if self.listener.is_some() {
            // The filter may send exit_group(2) to the agent. If the agent is gone, nobody answers:
            // the kernel sees that this process itself holds the listener, and lets it wait for
            // ever.
            trap()
        }
        exit_now()
    }
}

/// The flags to load with; all must be in this kernel.
fn flags(profile: &SeccompProfile, listens: bool) -> Result<u32> {
    let mut flags = if listens { NEW_LISTENER } else { 0 };
    match &profile.flags {
        // As in runc: who says nothing does not want speculation to be slowed down.
        None => flags |= libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32,
        Some(names) => {
            for (index, name) in names.iter().enumerate() {
                let Some((_, flag)) = FLAGS.iter().find(|(known, _)| known == name) else {
                    refuse!("linux.seccomp.flags[{index}]: {name} is unknown");
                };
                if *flag == WAIT_KILLABLE_RECV && !listens {
                    refuse!(
                        "linux.seccomp.flags[{index}]: {name} needs calls with SCMP_ACT_NOTIFY"
                    );
                }
                flags |= flag;
            }
        }
    }
    if !syscalls::has_seccomp_flags(flags) {
        if !syscalls::has_seccomp_flags(0) {
            refuse!("linux.seccomp: this kernel has no seccomp filters");
        }
        for name in profile.flags.iter().flatten() {
            if !supports(name) {
                refuse!("linux.seccomp.flags: this kernel has no {name}");
            }
        }
        refuse!("linux.seccomp: this kernel has not what SCMP_ACT_NOTIFY needs");
    }
    Ok(flags)
}

/// Whether this kernel has filters with that flag.
pub(crate) fn supports(flag: &str) -> bool {
    FLAGS.iter().any(|(name, flag_bit)| {
        let with = if *flag_bit == WAIT_KILLABLE_RECV {
            NEW_LISTENER
        } else {
            0
        };
        *name == flag && syscalls::has_seccomp_flags(flag_bit | with)
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
        return Err(D::Error::custom("half an instruction of a seccomp filter"));
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
