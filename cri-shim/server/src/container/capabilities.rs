//! Which capabilities a container's process has.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use rrun_proto::v1::Capability;
use serde_json::{Value, json};

use rrun_calls::error::{Error, Result};

/// Names without `CAP_`, by their number, linux/capability.h.
const ALL: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What Docker, containerd and CRI-O's Kubernetes users build on.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// The sets of a container, names without `CAP_`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sets {
    /// Bounding, permitted and effective.
    pub held: BTreeSet<&'static str>,
    /// Inheritable and ambient.
    pub ambient: BTreeSet<&'static str>,
}

/// The default set with what the container adds and drops; `ours` is what this process has, which
/// is all that it can give for ALL and to the privileged.
pub(crate) fn sets(
    asked: Option<&Capability>,
    privileged: bool,
    ours: &BTreeSet<&'static str>,
) -> Result<Sets> {
    let none = Capability::default();
    let asked = asked.unwrap_or(&none);
    let add = named(&asked.add_capabilities)?;
    let drop = named(&asked.drop_capabilities)?;
    let ambient = named(&asked.add_ambient_capabilities)?;
    let mut held: BTreeSet<&'static str> = if privileged || add.contains(&"ALL") {
        ours.clone()
    } else {
        DEFAULT.into()
    };
    if drop.contains(&"ALL") && !privileged {
        held.clear();
    }
    held.extend(add.iter().filter(|name| **name != "ALL"));
    held.extend(ambient.iter().filter(|name| **name != "ALL"));
    if !privileged {
        for name in &drop {
            held.remove(name);
        }
    }
    let ambient = if ambient.contains(&"ALL") {
        held.clone()
    } else {
        ambient.into_iter().filter(|c| held.contains(c)).collect()
    };
    Ok(Sets { held, ambient })
}

/// The names as the kernel has them; kubelet passes on what people write.
fn named(names: &[String]) -> Result<Vec<&'static str>> {
    let one = |name: &String| {
        let upper = name.to_ascii_uppercase();
        let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
        if bare == "ALL" {
            return Ok("ALL");
        }
        let known = ALL.into_iter().find(|known| *known == bare);
        known.ok_or_else(|| Error::invalid(format!("there is no capability {name:?}")))
    };
    names.iter().map(one).collect()
}

/// What this process may give away: its bounding set, capabilities(7), which nobody changes.
pub(crate) fn ours() -> &'static BTreeSet<&'static str> {
    static OURS: OnceLock<BTreeSet<&str>> = OnceLock::new();
    OURS.get_or_init(bounding_set)
}

fn bounding_set() -> BTreeSet<&'static str> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or_default();
    let set = |(number, _): &(usize, &str)| mask >> number & 1 == 1;
    ALL.into_iter()
        .enumerate()
        .filter(set)
        .map(|(_, name)| name)
        .collect()
}

impl Sets {
    /// The runtime specification's `process.capabilities`.
    pub(crate) fn to_json(&self) -> Value {
        let names = |set: &BTreeSet<&str>| -> Vec<String> {
            set.iter().map(|name| format!("CAP_{name}")).collect()
        };
        let held = names(&self.held);
        let ambient = names(&self.ambient);
        json!({
            "bounding": held,
            "effective": held,
            "permitted": held,
            "inheritable": ambient,
            "ambient": ambient,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(add: &[&str], drop: &[&str]) -> Capability {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Capability {
            add_capabilities: owned(add),
            drop_capabilities: owned(drop),
            ..Default::default()
        }
    }

    fn held(add: &[&str], drop: &[&str]) -> Result<Vec<&'static str>> {
        let sets = sets(Some(&asked(add, drop)), false, &ALL.into())?;
        Ok(sets.held.into_iter().collect())
    }

    #[test]
    fn drop_all_and_add_one_leaves_one() -> Result<()> {
        assert_eq!(held(&["CAP_NET_ADMIN"], &["ALL"])?, ["NET_ADMIN"]);
        assert_eq!(held(&[], &["all"])?, [""; 0]);
        Ok(())
    }

    #[test]
    fn add_all_and_drop_one_lacks_one() -> Result<()> {
        let held = held(&["ALL"], &["sys_admin"])?;
        assert_eq!(held.len(), ALL.len() - 1);
        assert!(!held.contains(&"SYS_ADMIN"));
        Ok(())
    }

    #[test]
    fn the_default_has_no_inheritable_and_no_net_admin() -> Result<()> {
        let sets = sets(None, false, &ALL.into())?;
        assert!(sets.ambient.is_empty());
        assert_eq!(sets.held, DEFAULT.into());
        Ok(())
    }

    #[test]
    fn the_privileged_get_what_we_have() -> Result<()> {
        let ours = BTreeSet::from(["CHOWN", "SYS_ADMIN"]);
        assert_eq!(sets(None, true, &ours)?.held, ours);
        Ok(())
    }

    #[test]
    fn an_unknown_name_is_named() {
        assert!(held(&["NET_FUN"], &[]).is_err_and(|e| e.sentence().contains("NET_FUN")));
    }
}
