//! The capabilities of a container's process.

use std::sync::OnceLock;

use rrun_kernel::capability::{self, Capability, Capability::*};
use rrun_proto::v1::Capability as RequestedCapabilities;
use serde::{Serialize, Serializer};

use rrun_calls::error::{Error, Result};

/// The default capabilities of a container, the same set as in Docker and containerd.
const DEFAULT: [Capability; 14] = [
    CAP_AUDIT_WRITE,
    CAP_CHOWN,
    CAP_DAC_OVERRIDE,
    CAP_FOWNER,
    CAP_FSETID,
    CAP_KILL,
    CAP_MKNOD,
    CAP_NET_BIND_SERVICE,
    CAP_NET_RAW,
    CAP_SETFCAP,
    CAP_SETGID,
    CAP_SETPCAP,
    CAP_SETUID,
    CAP_SYS_CHROOT,
];

/// The capability sets of a container's process as masks: bit n is capability n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CapabilitySets {
    /// The bounding, permitted and effective sets.
    pub held: u64,
    /// The inheritable and ambient sets.
    pub ambient: u64,
}

/// Returns the container's capabilities: the default set, plus the added capabilities, minus the
/// dropped capabilities. `bounding` is the server's own bounding set. Privileged containers start
/// with `bounding` instead of the default set, and so do containers that add ALL. The server can't
/// grant more capabilities than `bounding` contains.
pub(crate) fn sets(
    request: Option<&RequestedCapabilities>,
    privileged: bool,
    bounding: u64,
) -> Result<CapabilitySets> {
    let nothing = RequestedCapabilities::default();
    let request = request.unwrap_or(&nothing);
    let add = NameList::parse(&request.add_capabilities)?;
    let drop = NameList::parse(&request.drop_capabilities)?;
    let ambient = NameList::parse(&request.add_ambient_capabilities)?;
    let mut held = if privileged || add.all {
        bounding
    } else {
        mask(&DEFAULT)
    };
    if drop.all && !privileged {
        held = 0;
    }
    held |= add.mask | ambient.mask;
    if !privileged {
        held &= !drop.mask;
    }
    let ambient = if ambient.all {
        held
    } else {
        ambient.mask & held
    };
    Ok(CapabilitySets { held, ambient })
}

/// Returns the mask of these capabilities.
pub(super) fn mask(capabilities: &[Capability]) -> u64 {
    capabilities
        .iter()
        .fold(0, |mask, capability| mask | capability.bitmask())
}

/// A list of capability names in a request. Kubelet sends the names as users wrote them.
#[derive(Default)]
struct NameList {
    all: bool,
    /// The capabilities in the list, apart from ALL.
    mask: u64,
}

impl NameList {
    fn parse(names: &[String]) -> Result<NameList> {
        let mut list = NameList::default();
        for name in names {
            if name.eq_ignore_ascii_case("ALL") || name.eq_ignore_ascii_case("CAP_ALL") {
                list.all = true;
            } else if let Some(capability) = capability::parse(name) {
                list.mask |= capability.bitmask();
            } else {
                return Err(Error::invalid(format!(
                    "the capability {name:?} does not exist"
                )));
            }
        }
        Ok(list)
    }
}

/// Returns the capabilities that the server can grant to containers: the server's own bounding set,
/// capabilities(7). The server never changes its bounding set.
pub(crate) fn bounding_set() -> u64 {
    static BOUNDING: OnceLock<u64> = OnceLock::new();
    *BOUNDING.get_or_init(capability::bounding_set)
}

/// Serializes the sets as the runtime specification's `process.capabilities`, sorted by number.
impl Serialize for CapabilitySets {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let names = |mask: u64| -> Vec<String> { capability::names(mask).collect() };
        let (held, ambient) = (names(self.held), names(self.ambient));
        let mut sets = vec![
            ("bounding", &held),
            ("effective", &held),
            ("permitted", &held),
        ];
        if !ambient.is_empty() {
            sets.extend([("inheritable", &ambient), ("ambient", &ambient)]);
        }
        serializer.collect_map(sets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mask of all 41 capabilities of Linux.
    const ALL: u64 = (1 << 41) - 1;

    fn request(add: &[&str], drop: &[&str]) -> RequestedCapabilities {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        RequestedCapabilities {
            add_capabilities: owned(add),
            drop_capabilities: owned(drop),
            ..Default::default()
        }
    }

    fn held(add: &[&str], drop: &[&str]) -> Result<u64> {
        Ok(sets(Some(&request(add, drop)), false, ALL)?.held)
    }

    #[test]
    fn dropping_all_and_adding_one_leaves_one() -> Result<()> {
        let one = mask(&[CAP_NET_ADMIN]);
        assert_eq!(held(&["CAP_NET_ADMIN"], &["ALL"])?, one);
        assert_eq!(held(&["net_admin"], &["cap_all"])?, one);
        assert_eq!(held(&[], &["all"])?, 0);
        Ok(())
    }

    #[test]
    fn adding_all_and_dropping_one_lacks_one() -> Result<()> {
        let held = held(&["ALL"], &["sys_admin"])?;
        assert_eq!(held, ALL & !CAP_SYS_ADMIN.bitmask());
        Ok(())
    }

    #[test]
    fn the_default_set_has_no_ambient_capabilities_and_no_net_admin() -> Result<()> {
        let sets = sets(None, false, ALL)?;
        assert_eq!(sets.ambient, 0);
        assert_eq!(sets.held, mask(&DEFAULT));
        assert_eq!(sets.held & CAP_NET_ADMIN.bitmask(), 0);
        Ok(())
    }

    #[test]
    fn ambient_capabilities_are_granted_unless_dropped() -> Result<()> {
        let mut request = request(&[], &["KILL"]);
        request.add_ambient_capabilities = vec!["SYS_TIME".into(), "KILL".into()];
        let sets = sets(Some(&request), false, ALL)?;
        assert_eq!(sets.ambient, CAP_SYS_TIME.bitmask());
        assert_eq!(
            sets.held,
            (mask(&DEFAULT) | sets.ambient) & !CAP_KILL.bitmask()
        );
        Ok(())
    }

    #[test]
    fn a_privileged_container_gets_the_servers_bounding_set() -> Result<()> {
        let bounding = mask(&[CAP_CHOWN, CAP_SYS_ADMIN]);
        assert_eq!(sets(None, true, bounding)?.held, bounding);
        Ok(())
    }

    #[test]
    fn an_unknown_capability_is_named_in_the_error() {
        assert!(held(&["NET_FUN"], &[]).is_err_and(|e| e.sentence().contains("NET_FUN")));
    }
}
