//! Network namespaces for tests. A test in a new network namespace can change the network without an
//! effect on other tests.

use std::fs;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};

use crate::support::machine::{Result, command};

/// Runs a test on a thread in a new network namespace, in which the forwarding of packets is still
/// off. The programs that the test starts inherit this namespace.
pub(crate) fn in_a_new_network(test: impl FnOnce() -> Result + Send) -> Result {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            ip("link set lo up")?;
            test()
        });
        thread.join().map_err(|_| "the test panicked")?
    })
}

/// Creates a network namespace without a process.
pub(crate) fn new_network() -> Result<OwnedFd> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(fs::File::open("/proc/thread-self/ns/net")?.into())
        });
        thread.join().map_err(|_| "the thread panicked")?
    })
}

/// Runs `work` in the network namespace `namespace`.
pub(crate) fn within<T: Send>(
    namespace: BorrowedFd,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            work()
        });
        thread.join().map_err(|_| "the thread panicked")?
    })
}

/// Runs ip(8) with arguments that are separated by spaces.
pub(crate) fn ip(arguments: &str) -> Result<String> {
    let output = command("ip", arguments.split(' ')).ok()?;
    Ok(output.text().to_owned())
}

/// Returns the value of the sysctl `net/NAME` in the calling thread's network namespace.
pub(crate) fn sysctl(name: &str) -> Result<String> {
    let path = format!("/proc/sys/net/{name}");
    let value =
        fs::read_to_string(&path).map_err(|error| format!("cannot read {path}: {error}"))?;
    Ok(value.trim_end().to_owned())
}

/// Sets the sysctl `net/NAME` in the calling thread's network namespace.
pub(crate) fn set(name: &str, value: &str) -> Result {
    let path = format!("/proc/sys/net/{name}");
    fs::write(&path, value)
        .map_err(|error| format!("cannot write {value} to {path}: {error}").into())
}
