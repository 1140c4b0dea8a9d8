//! The errors of pod networks. The display text of each error is a sentence.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::address::Range;
use crate::host_ports::{HostPort, Listener};
use rrun_calls::error::{Code, Error};
use rrun_kernel::errno::describe;
use rrun_store::StoreError;

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A system call failed on a network namespace, or on the file at which the namespace is
    /// pinned.
    #[error("{action} {path}: {}", describe(.source))]
    Namespace {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} is not a network namespace: the mount that pinned it no longer exists")]
    NotPinned { path: PathBuf },
    #[error("start a thread for a network operation: {}", describe(.0))]
    Thread(io::Error),
    #[error("watch the nftables tables: {0}")]
    Watch(io::Error),
    #[error("a network operation ended without a result: its thread panicked")]
    ThreadDied,
    /// The kernel refused a netlink message. `detail` is empty, or it is a colon followed by the
    /// kernel's explanation of the error.
    #[error("{action}: {} ({errno:?}){detail}", errno.desc())]
    Kernel {
        action: String,
        errno: Errno,
        detail: String,
    },
    #[error("{action}: the kernel lacks {feature}{detail}")]
    Feature {
        action: String,
        detail: String,
        feature: &'static str,
    },
    #[error("{action} {path}: {}", describe(.source))]
    Sysctl {
        action: String,
        path: String,
        source: io::Error,
    },
    #[error("network.{field} is {value:?} in the configuration; it has to be {expected}")]
    Config {
        field: &'static str,
        value: String,
        expected: &'static str,
    },
    #[error(
        "the pod range {range} overlaps the route to {route} of this node; set {} to a free range",
        key(*range)
    )]
    RangeInUse { range: Range, route: String },
    #[error(
        "every address of the pod range {range} is in use; set {} to a wider range",
        key(*range)
    )]
    Exhausted { range: Range },
    #[error("the node's {port} is already used by {by}")]
    PortTaken { port: HostPort, by: String },
    #[error("the pod requests the node's {port}, but pods have no {family} address ({key})")]
    NoFamily {
        port: HostPort,
        family: &'static str,
        key: &'static str,
    },
    #[error(
        "the interface {name} already exists, but its type is {kind} instead of bridge; remove the \
         interface, or set network.bridge to another name"
    )]
    NotABridge { name: String, kind: String },
    #[error("the network namespace {netns} has an interface eth0 that rrun did not create")]
    InterfaceTaken { netns: PathBuf },
    #[error("the metadata store has the key {key:?} where it should have an IP address")]
    Record { key: String },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Returns the configuration key for pod ranges of the same address family as `range`.
fn key(range: Range) -> &'static str {
    if range.is_ipv6() {
        "network.range6"
    } else {
        "network.range"
    }
}

impl NetworkError {
    pub(crate) fn kernel(action: impl Into<String>, errno: Errno) -> Self {
        NetworkError::Kernel {
            action: action.into(),
            errno,
            detail: String::new(),
        }
    }

    pub(crate) fn no_family(port: HostPort) -> Self {
        let (family, key) = match port.address {
            Some(IpAddr::V6(_)) => ("IPv6", "network.range6"),
            _ => ("IPv4", "network.range"),
        };
        NetworkError::NoFamily { port, family, key }
    }

    pub(crate) fn of_listener(port: HostPort, listener: &Listener) -> Self {
        let by = listener.to_string();
        NetworkError::PortTaken { port, by }
    }

    /// Returns whether the kernel reported the error number `errno`.
    pub(crate) fn is(&self, errno: Errno) -> bool {
        matches!(self, NetworkError::Kernel { errno: reported, .. } if *reported == errno)
    }
}

impl From<NetworkError> for Error {
    fn from(error: NetworkError) -> Self {
        let code = match &error {
            NetworkError::Exhausted { .. } => Code::ResourceExhausted,
            NetworkError::Kernel { errno, .. } => code_of(*errno),
            // EAGAIN means that the number of threads has reached RLIMIT_NPROC or the pids.max of a
            // cgroup.
            NetworkError::Thread(source) if source.kind() == io::ErrorKind::WouldBlock => {
                Code::ResourceExhausted
            }
            NetworkError::Namespace { source, .. }
            | NetworkError::Sysctl { source, .. }
            | NetworkError::Thread(source)
            | NetworkError::Watch(source) => match source.raw_os_error() {
                Some(errno) => code_of(Errno::from_raw(errno)),
                None => Code::Internal,
            },
            NetworkError::Config { .. } => Code::InvalidArgument,
            NetworkError::NotPinned { .. }
            | NetworkError::Feature { .. }
            | NetworkError::RangeInUse { .. }
            | NetworkError::PortTaken { .. }
            | NetworkError::NoFamily { .. }
            | NetworkError::NotABridge { .. }
            | NetworkError::InterfaceTaken { .. } => Code::FailedPrecondition,
            NetworkError::Record { .. } => Code::DataLoss,
            NetworkError::Store(error) => error.code(),
            NetworkError::ThreadDied => Code::Internal,
        };
        Error::new(code, error.to_string())
    }
}

fn code_of(errno: Errno) -> Code {
    match errno {
        // ENOSPC means that the number of network namespaces has reached the limit
        // user.max_net_namespaces. EXFULL means that the bridge has no free port.
        Errno::ENOSPC
        | Errno::EXFULL
        | Errno::ENOMEM
        | Errno::ENOBUFS
        | Errno::EMFILE
        | Errno::ENFILE => Code::ResourceExhausted,
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_its_sentence_and_exhausted_resources_get_their_own_code() {
        let range = Range::DEFAULT;
        let sentence = NetworkError::Exhausted { range }.to_string();
        let error = Error::from(NetworkError::Exhausted { range });
        assert_eq!(error.code(), Code::ResourceExhausted);
        assert_eq!(error.sentence(), sentence);
        let full = NetworkError::kernel("create the veth pair", Errno::EXFULL);
        assert_eq!(Error::from(full).code(), Code::ResourceExhausted);
        let other = NetworkError::kernel("create the veth pair", Errno::EPERM);
        assert_eq!(Error::from(other).code(), Code::Internal);
    }
}
