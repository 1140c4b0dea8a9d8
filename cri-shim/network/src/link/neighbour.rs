//! The rtnetlink messages for permanent entries of the neighbour cache. See rtnetlink(7) and the
//! kernel's `linux/neighbour.h`.

use std::net::IpAddr;

use libc::{NDA_DST, NDA_LLADDR, NUD_PERMANENT, RTM_DELNEIGH, RTM_NEWNEIGH};

use super::{Mac, body_address, family};
use crate::netlink::{Batch, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE};

const HEADER_BYTES: usize = 12;

/// Adds a permanent entry to the neighbour cache. The link `index` then needs no ARP packet or
/// neighbour solicitation for the address.
///
/// All network namespaces of the node share the kernel's limit on neighbour entries
/// (net.ipv4.neigh.default.gc_thresh3). A pod that sends packets to many unassigned addresses
/// reaches this limit. The kernel then creates no entries, except permanent ones.
pub(crate) fn add(batch: &mut Batch, index: u32, address: IpAddr, mac: Mac) {
    let action = format!("add a neighbour entry for {address} to interface {index}");
    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    batch.message(action, RTM_NEWNEIGH, flags, |body| {
        body.header(&header(index, address));
        body_address(body, NDA_DST, address);
        body.bytes(NDA_LLADDR, &mac);
    });
}

/// Deletes an entry of the neighbour cache.
pub(crate) fn delete(batch: &mut Batch, index: u32, address: IpAddr) {
    let action = format!("delete the neighbour entry for {address} from interface {index}");
    batch.message(action, RTM_DELNEIGH, NLM_F_ACK, |body| {
        body.header(&header(index, address));
        body_address(body, NDA_DST, address);
    });
}

fn header(index: u32, address: IpAddr) -> [u8; HEADER_BYTES] {
    let [i0, i1, i2, i3] = index.to_ne_bytes();
    let [s0, s1] = NUD_PERMANENT.to_ne_bytes();
    [family(address), 0, 0, 0, i0, i1, i2, i3, s0, s1, 0, 0]
}
