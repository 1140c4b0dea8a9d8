//! A filter at the bridge port of each pod. The filter drops IPv4 packets from and to 127.0.0.0/8.
//! See tc-bpf(8) and the kernel's `linux/rtnetlink.h` and `linux/pkt_cls.h`.
//!
//! The sysctl route_localnet of the bridge allows packets to 127.0.0.0/8 that arrive on the bridge.
//! Only the replies to the node's own processes need the sysctl. These replies get their destination
//! in 127.0.0.0/8 from NAT, after they have passed the bridge port. The chain `guard` in
//! [`super::nftables`] also drops the packets of pods to 127.0.0.0/8. But another program can delete
//! all nftables tables at any time, even while no server is running to restore them. The filter
//! exists as long as the bridge port. The bridge ports have the filter only on nodes on which a pod
//! has or had a host port at 127.0.0.1, because only then route_localnet is 1.

use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use crate::error::NetworkError;
use crate::netlink::{Batch, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, Socket};

const TC_H_CLSACT: u32 = 0xffff_fff1;
const TC_H_CLSACT_HANDLE: u32 = 0xffff_0000;
const TC_H_CLSACT_INGRESS: u32 = 0xffff_fff2;
/// The priority and the handle of the filter. Filters of other programs usually have other numbers.
const PRIORITY: u32 = 0x7272;
const HANDLE: u32 = 1;
const ETH_P_ALL: u16 = 3;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;
const TCA_BPF_FLAGS: u16 = 8;
/// The return value of the program is the decision about the packet.
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

const TC_ACT_SHOT: u32 = 2;
/// The kernel continues with the next filter.
const TC_ACT_UNSPEC: u32 = u32::MAX;

const ETH_P_IP: u32 = 0x0800;
/// The offsets in a frame. The kernel has already removed a VLAN tag.
const ETHERTYPE: u32 = 12;
const IP_SOURCE: u32 = 14 + 12;
const IP_DESTINATION: u32 = 14 + 16;
const LOAD_HALF_WORD: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16;
const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// The instructions of the filter. Each instruction consists of its code, the numbers of
/// instructions to skip if a comparison is true or false, and a constant. The filter compares only
/// the first byte of each address.
const PROGRAM: [(u16, u8, u8, u32); 8] = [
    (LOAD_HALF_WORD, 0, 0, ETHERTYPE),
    (JUMP_IF_EQUAL, 0, 4, ETH_P_IP),
    (LOAD_BYTE, 0, 0, IP_SOURCE),
    (JUMP_IF_EQUAL, 3, 0, 127),
    (LOAD_BYTE, 0, 0, IP_DESTINATION),
    (JUMP_IF_EQUAL, 1, 0, 127),
    (RETURN, 0, 0, TC_ACT_UNSPEC),
    (RETURN, 0, 0, TC_ACT_SHOT),
];

/// The errors of a kernel that lacks the required parts of traffic control. Any other error can have
/// a cause that passes, for example a lack of memory.
const UNSUPPORTED: [Errno; 4] = [
    Errno::EINVAL,
    Errno::ENOENT,
    Errno::EOPNOTSUPP,
    Errno::EPERM,
];

/// Adds the filter to the bridge port `name`, unless the filter exists. If the port does not exist,
/// this function does nothing. If the kernel lacks the required parts of traffic control, this
/// function only logs a message.
pub(crate) fn guard_loopback(socket: &mut Socket, name: &str) -> Result<(), NetworkError> {
    static IS_UNSUPPORTED: AtomicBool = AtomicBool::new(false);
    if IS_UNSUPPORTED.load(Ordering::Relaxed) {
        return Ok(());
    }
    let index = match rustix::net::netdevice::name_to_index(socket.fd(), name) {
        Ok(index) => index,
        Err(rustix::io::Errno::NODEV) => return Ok(()),
        Err(errno) => {
            let errno = Errno::from_raw(errno.raw_os_error());
            return Err(NetworkError::kernel(
                format!("find the bridge port {name}"),
                errno,
            ));
        }
    };
    let mut batch = Batch::default();
    discipline(&mut batch, index, name);
    filter(&mut batch, index, name);
    let mut added = socket.execute(&batch);
    if added.as_ref().is_err_and(|error| error.is(Errno::EEXIST)) {
        let mut batch = Batch::default();
        filter(&mut batch, index, name);
        added = socket.execute(&batch);
    }
    match added {
        Err(error) if error.is(Errno::EEXIST) || error.is(Errno::ENODEV) => Ok(()),
        Err(error) if UNSUPPORTED.iter().any(|errno| error.is(*errno)) => {
            IS_UNSUPPORTED.store(true, Ordering::Relaxed);
            log::info!(
                "pods can send packets to 127.0.0.1 of the node while the nftables table of the \
                 embedded network does not exist (CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF): \
                 {error}"
            );
            Ok(())
        }
        added => added.map(drop),
    }
}

/// Adds a message that creates a queueing discipline. Filters for incoming packets need it.
fn discipline(batch: &mut Batch, index: u32, name: &str) {
    let action = format!("add a queueing discipline to the bridge port {name}");
    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    batch.message(action, libc::RTM_NEWQDISC, flags, |body| {
        body.header(&header(index, TC_H_CLSACT_HANDLE, TC_H_CLSACT, 0));
        body.string(TCA_KIND, "clsact");
    });
}

fn filter(batch: &mut Batch, index: u32, name: &str) {
    let action = format!("add a filter for packets to 127.0.0.0/8 to the bridge port {name}");
    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    batch.message(action, libc::RTM_NEWTFILTER, flags, |body| {
        let info = PRIORITY << 16 | u32::from(ETH_P_ALL.to_be());
        body.header(&header(index, HANDLE, TC_H_CLSACT_INGRESS, info));
        body.string(TCA_KIND, "bpf");
        body.nest(TCA_OPTIONS, |options| {
            let mut instructions = Vec::new();
            for (code, if_true, if_false, constant) in PROGRAM {
                instructions.extend(code.to_ne_bytes());
                instructions.extend([if_true, if_false]);
                instructions.extend(constant.to_ne_bytes());
            }
            let count = u16::try_from(PROGRAM.len()).unwrap_or(0);
            options.bytes(TCA_BPF_OPS_LEN, &count.to_ne_bytes());
            options.bytes(TCA_BPF_OPS, &instructions);
            options.u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT);
        });
    });
}

/// Returns a `struct tcmsg`.
fn header(index: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut header = [0; 20];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&handle.to_ne_bytes());
    header[12..16].copy_from_slice(&parent.to_ne_bytes());
    header[16..20].copy_from_slice(&info.to_ne_bytes());
    header
}
