//! What can go wrong with a pod's network, in sentences.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::address::Range;
use crate::host_ports::HostPort;
use rrun_calls::error::{Code, Error};
use rrun_store::StoreError;

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A system call on a network namespace or its pin failed.
    #[error("{action} {path}: {source}")]
    Namespace {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} is not a network namespace: the mount that pinned it is gone")]
    NotPinned { path: PathBuf },
    #[error("start a thread for the network: {0}")]
    Thread(io::Error),
    #[error("a thread of the network ended without an answer")]
    ThreadDied,
    /// The kernel refused a netlink message. `detail` is what it says beside the error number,
    /// with a colon before it.
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
    #[error("write {value} to {path}: {source}")]
    Sysctl {
        path: String,
        value: &'static str,
        source: io::Error,
    },
    #[error("network.{field} is {value:?} in the configuration; it has to be {wanted}")]
    Config {
        field: &'static str,
        value: String,
        wanted: &'static str,
    },
    #[error(
        "the pods' range {range} overlaps the route to {route} of this node; set {} to a range that \
         is free",
        key(*range)
    )]
    RangeInUse { range: Range, route: String },
    #[error(
        "every address of the pods' range {range} is taken; set {} to a wider one",
        key(*range)
    )]
    Exhausted { range: Range },
    #[error("{port} of the node is taken, by {by}")]
    PortTaken { port: HostPort, by: String },
    #[error("the pod asks for {port} of the node, but pods have no {family} address ({key})")]
    NoFamily {
        port: HostPort,
        family: &'static str,
        key: &'static str,
    },
    #[error(
        "the interface {name} is there already and is no bridge but {kind}; remove it, or set \
         network.bridge to another name"
    )]
    NotABridge { name: String, kind: String },
    #[error("the network namespace {netns} has an interface eth0 that is not of rrun's making")]
    InterfaceTaken { netns: PathBuf },
    #[error("the metadata store has {key:?} where an address should be")]
    Record { key: String },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The configuration's key for a range like this one.
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

    /// Whether it is the kernel's answer `wanted`.
    pub(crate) fn is(&self, wanted: Errno) -> bool {
        matches!(self, NetworkError::Kernel { errno, .. } if *errno == wanted)
    }
}

impl From<NetworkError> for Error {
    fn from(error: NetworkError) -> Self {
        let code = match &error {
            NetworkError::Exhausted { .. } => Code::ResourceExhausted,
            NetworkError::Kernel { errno, .. } => code_of(*errno),
            // EAGAIN: RLIMIT_NPROC or a cgroup's pids.max is reached.
            NetworkError::Thread(source) if source.kind() == io::ErrorKind::WouldBlock => {
                Code::ResourceExhausted
            }
            NetworkError::Namespace { source, .. }
            | NetworkError::Sysctl { source, .. }
            | NetworkError::Thread(source) => match source.raw_os_error() {
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
        // ENOSPC: user.max_net_namespaces is reached. EXFULL: the bridge has no free port.
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
    fn an_error_keeps_its_sentence_and_says_whether_something_is_used_up() {
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
