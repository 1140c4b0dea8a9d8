//! Fuzz targets for answers of the kernel and of CNI plugins. `tests/fuzz` runs them.

use crate::cni::fuzz::{cni_answer, cni_list};
use crate::counters::parsed;
use crate::link::Link;
use crate::netlink;

/// The name and the function of a fuzz target.
pub type FuzzTarget = (&'static str, fn(&[u8]));

/// The fuzz targets in this crate.
pub const TARGETS: &[FuzzTarget] = &[
    ("cni-answer", cni_answer),
    ("cni-list", cni_list),
    ("interface-counters", interface_counters),
    ("netlink", netlink),
];

/// Parses the table in /proc/net/dev.
fn interface_counters(input: &[u8]) {
    for one in parsed(&String::from_utf8_lossy(input)) {
        assert_eq!(one.name, one.name.trim());
    }
}

/// Parses `input` as the kernel's messages. Each message is parsed as an error, as a link, and as
/// nested attributes.
fn netlink(input: &[u8]) {
    let (errors, replies) = netlink::parse_all(input);
    assert!(errors.len() + replies.len() <= input.len());
    for error in errors {
        assert!(!error.to_string().is_empty());
    }
    for reply in replies {
        if let Some(link) = Link::parse(&reply) {
            assert!(link.name.len() <= input.len());
        }
        let mut attributes = reply.attributes(4);
        for depth in 0..64 {
            let _ = (attributes.u32(depth), attributes.string(depth));
            let Some((kind, _)) = attributes.clone().next() else {
                break;
            };
            attributes = attributes.nest(kind);
        }
    }
}
