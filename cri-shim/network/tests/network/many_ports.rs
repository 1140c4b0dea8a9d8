//! Tests with thousands of host ports. A netlink message with all of these host ports is larger than
//! the default size of a socket's send buffer.

use std::collections::HashSet;
use std::process::{Command, Stdio};

use libtest_mimic::Failed;
use rrun_network::{HostPort, Protocol, namespace};

use crate::node::{self, Node, program};
use crate::{expect, expect_eq};

/// The environment variable that marks the child process of the test with small send buffers.
const CHILD: &str = "RRUN_NETWORK_TEST_SMALL_BUFFERS";

pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

fn ports(first: u16, last: u16) -> Vec<HostPort> {
    (first..=last)
        .map(|host| HostPort {
            protocol: if host % 2 == 0 {
                Protocol::Tcp
            } else {
                Protocol::Udp
            },
            address: None,
            host,
            container: 80,
        })
        .collect()
}

fn nft(arguments: &[&str]) -> Result<String, Failed> {
    program("nft", arguments)
}

/// Checks that the map `name` has `expected` entries.
fn check_map(name: &str, expected: usize) -> Result<(), Failed> {
    let map = nft(&["list", "map", "inet", "rrun0", name])?;
    expect_eq(
        map.matches(" : 10.88.0.").count() + map.matches(" : fd72:").count(),
        expected,
    )
}

pub(crate) fn thousands_of_host_ports_survive_a_restart_and_a_flush(
    node: &Node,
) -> Result<(), Failed> {
    check(node, 5000)?;
    check(node, 65_535)
}

/// Opens the host ports from 1001 to `last`.
fn check(node: &Node, last: u16) -> Result<(), Failed> {
    let network = node.network()?;
    for (pod, ports) in [("a", ports(1001, 3000)), ("b", ports(3001, last))] {
        namespace::create(&node.netns(pod))?;
        node.wait(network.reserve(pod, pod, ports, true))?;
        node.wait(network.attach(pod, &node.netns(pod)))?;
    }
    let all = usize::from(last) - 1000;
    check_map("host_ports4", all)?;
    check_map("host_ports6", all)?;
    drop(network);
    let network = node.network()?;
    let live = HashSet::from(["a".to_owned(), "b".to_owned()]);
    nft(&["flush", "ruleset"])?;
    node.wait(network.reconcile(&live))?;
    check_map("host_ports4", all)?;
    nft(&["flush", "ruleset"])?;
    node.wait(network.ready())?;
    check_map("host_ports6", all)?;
    nft(&["flush", "ruleset"])?;
    node.pod(&network, "c")?;
    check_map("host_ports4", all)?;
    node.remove(&network, "b")?;
    check_map("host_ports4", 2000)?;
    node.remove(&network, "a")?;
    check_map("host_ports6", 0)?;
    node.remove(&network, "c")?;
    let ports = nft(&["list", "set", "bridge", "rrun0", "ports"])?;
    expect(!ports.contains("elements"), &ports)?;
    drop(network);
    node.nothing_of_pods_is_left()
}

/// Opens thousands of host ports without the right to enlarge the send buffer.
pub(crate) fn host_ports_do_not_need_a_large_send_buffer(_: &Node) -> Result<(), Failed> {
    let child = Command::new("/proc/self/exe")
        .env(CHILD, "")
        .stdin(Stdio::null())
        .output()?;
    let output = String::from_utf8_lossy(&child.stderr);
    expect(child.status.success(), &output)
}

/// Runs the test without the right to enlarge the send buffer. On a node, this right is missing in a
/// user namespace.
pub(crate) fn child() -> ! {
    let run = || -> Result<(), Failed> {
        node::leave_the_host()?;
        refuse_larger_send_buffers()?;
        Node::run(|node| check(node, 5000))
    };
    let result = run();
    if let Err(error) = &result {
        eprintln!("{}", error.message().unwrap_or_default());
    }
    std::process::exit(i32::from(result.is_err()));
}

/// Installs a seccomp filter with which send buffers keep their size. SO_SNDBUFFORCE fails, and
/// SO_SNDBUF has no effect. The filter applies to this thread and to the threads and processes that it creates.
fn refuse_larger_send_buffers() -> Result<(), Failed> {
    let load = |offset| instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let compare = |value, if_equal, otherwise| {
        let code = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        instruction(code, if_equal, otherwise, value)
    };
    let end = |result| instruction(libc::BPF_RET | libc::BPF_K, 0, 0, result);
    // The offsets are those of the system call's number and of its second and third argument in
    // `struct seccomp_data`.
    let mut program = [
        load(0),
        compare(libc::SYS_setsockopt as u32, 0, 5),
        load(16 + 8),
        compare(libc::SOL_SOCKET as u32, 0, 3),
        load(16 + 16),
        compare(libc::SO_SNDBUF as u32, 2, 0),
        compare(libc::SO_SNDBUFFORCE as u32, 2, 0),
        end(libc::SECCOMP_RET_ALLOW),
        end(libc::SECCOMP_RET_ERRNO),
        end(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: `filter` describes `program`. Both outlive the system call.
    let result = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const filter,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}

fn instruction(code: u32, if_equal: u8, otherwise: u8, value: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: if_equal,
        jf: otherwise,
        k: value,
    }
}
