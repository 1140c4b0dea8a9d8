//! The five capability sets of a process. See capabilities(7).

use std::collections::BTreeSet;

use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set,
};

use crate::config::spec::Capabilities;
use crate::error::{Context, Result, refuse};
use crate::log;
use rrun_kernel::capability::{self, name};

/// The capability sets as bit masks. Bit n represents the capability with the number n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CapabilityMasks {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

const SYS_ADMIN: u64 = 1 << 21;

/// The number of the last capability of Linux 5.15, CAP_CHECKPOINT_RESTORE. Later kernels can have
/// more capabilities.
const LAST: usize = 40;

/// Returns the bit mask of the capabilities with the given names. This function ignores and logs an
/// unknown name, as the specification requires (config.md, capabilities).
pub(crate) fn mask<'a>(names: impl IntoIterator<Item = &'a str>) -> u64 {
    names.into_iter().fold(0, |mask, name| match bit(name) {
        Some(bit) => mask | bit,
        None => {
            log::warning(&format!("rrun ignores the unknown capability {name}"));
            mask
        }
    })
}

/// Returns a mask that contains only the bit of the capability `name`. `name` can be in upper or
/// lower case, with or without `CAP_`.
fn bit(name: &str) -> Option<u64> {
    capability::parse(name).map(|capability| capability.bitmask())
}

/// Returns the names of the capabilities in a mask, separated by commas, for an error or log
/// sentence.
fn names(mask: u64) -> String {
    capability::names(mask).collect::<Vec<_>>().join(", ")
}

impl CapabilityMasks {
    /// Reads the capability sets from the configuration. This function ignores unknown names, and
    /// ambient capabilities that are not both permitted and inheritable. This function logs each
    /// capability that it ignores.
    pub(crate) fn from_spec(capabilities: &Capabilities) -> CapabilityMasks {
        let mut seen = BTreeSet::new();
        let mut mask = |names: &Option<Vec<String>>| {
            let names = names.iter().flatten().map(String::as_str);
            // An unknown capability name usually occurs in several sets, but rrun logs the name
            // only once.
            self::mask(names.filter(|name| bit(name).is_some() || seen.insert(name.to_string())))
        };
        let mut sets = CapabilityMasks {
            bounding: mask(&capabilities.bounding),
            effective: mask(&capabilities.effective),
            permitted: mask(&capabilities.permitted),
            inheritable: mask(&capabilities.inheritable),
            ambient: mask(&capabilities.ambient),
        };
        let excess = sets.ambient & !(sets.permitted & sets.inheritable);
        if excess != 0 {
            log::warning(&format!(
                "process.capabilities.ambient: rrun ignores {}, because an ambient capability must also be permitted and inheritable",
                names(excess)
            ));
            sets.ambient &= !excess;
        }
        sets
    }

    /// Checks that the effective set is a subset of the permitted set.
    ///
    /// # Errors
    /// Fails if an effective capability is not in the permitted set, because capset(2) refuses such
    /// an effective set.
    pub(crate) fn validate(&self) -> Result<()> {
        let excess = self.effective & !self.permitted;
        if excess != 0 {
            refuse!(
                "process.capabilities.effective: {} is not in process.capabilities.permitted",
                names(excess)
            );
        }
        Ok(())
    }

    /// Adds the capabilities in `mask` to the sets, for `exec --cap`. This function never adds a
    /// capability to the inheritable set. Through the inheritable set, a program whose file has
    /// capabilities could gain the added capabilities (CVE-2022-29162). Only an inheritable
    /// capability can be ambient. So this function adds a capability to the ambient set only if the
    /// configuration made the capability inheritable.
    pub(crate) fn add(&mut self, mask: u64) {
        self.bounding |= mask;
        self.effective |= mask;
        self.permitted |= mask;
        self.ambient |= mask & self.inheritable;
    }

    /// Drops from the calling process's bounding set every capability that is not in the
    /// configuration's bounding set. Dropping a capability needs CAP_SETPCAP, so the process must
    /// call this function before it gives up its capabilities.
    pub(crate) fn drop_bounding(&self) -> Result<()> {
        for number in 0..64 {
            if self.bounding & (1 << number) != 0 {
                continue;
            }
            match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number))
            {
                Ok(()) => {}
                // The kernel has no capability with this number.
                Err(rustix::io::Errno::INVAL) if number > LAST => break,
                Err(errno) => {
                    return Err(errno)
                        .doing(|| format!("drop {} from the bounding set", name(number)));
                }
            }
        }
        Ok(())
    }

    /// Returns whether execve(2) with no_new_privs takes CAP_SYS_ADMIN away from every process. If
    /// the capability is in the bounding set, a process of root that has it keeps it.
    pub(crate) fn executes_without_sys_admin(&self) -> bool {
        self.bounding & SYS_ADMIN == 0
    }

    /// Sets the effective, the permitted, the inheritable and the ambient set of the calling
    /// process. If `until_execution` is true, a process that has CAP_SYS_ADMIN keeps this
    /// capability until execve(2).
    ///
    /// The program does not get CAP_SYS_ADMIN. execve(2) computes the program's sets only from the
    /// bounding, the inheritable and the ambient set. This function does not add CAP_SYS_ADMIN to
    /// these three sets. See capabilities(7), "Transformation of capabilities during execve()".
    pub(crate) fn apply(&self, until_execution: bool) -> Result<()> {
        let with = |more: u64| CapabilitySets {
            effective: CapabilitySet::from_bits_retain(self.effective | more),
            permitted: CapabilitySet::from_bits_retain(self.permitted | more),
            inheritable: CapabilitySet::from_bits_retain(self.inheritable),
        };
        let kept =
            until_execution && rustix::thread::set_capabilities(None, with(SYS_ADMIN)).is_ok();
        let set = if kept {
            Ok(())
        } else {
            rustix::thread::set_capabilities(None, with(0))
        };
        set.doing(|| {
            let missing = rustix::thread::capabilities(None)
                .map_or(0, |own| self.permitted & !own.permitted.bits());
            if missing == 0 {
                "set process.capabilities".to_owned()
            } else {
                format!(
                    "set process.capabilities.permitted (rrun itself lacks {})",
                    names(missing)
                )
            }
        })?;
        clear_ambient_capability_set().doing(|| "clear the ambient capabilities")?;
        for number in (0..64).filter(|number| self.ambient & (1 << number) != 0) {
            configure_capability_in_ambient_set(CapabilitySet::from_bits_retain(1 << number), true)
                .doing(|| format!("raise {} in the ambient set", name(number)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_names_have_the_kernels_numbers() {
        assert_eq!(mask(["CAP_CHOWN"]), 1);
        assert_eq!(mask(["cap_net_raw", "SYS_ADMIN"]), 1 << 13 | 1 << 21);
        assert_eq!(mask(["CAP_CHECKPOINT_RESTORE"]), 1 << 40);
        assert_eq!(name(24), "CAP_SYS_RESOURCE");
    }

    fn sets(json: &str) -> CapabilityMasks {
        CapabilityMasks::from_spec(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn unknown_and_unusable_capabilities_are_ignored() {
        let sets = sets(
            r#"{"permitted":["CAP_FLY","CAP_KILL","CAP_CHOWN"],"inheritable":["CAP_CHOWN"],
                "ambient":["CAP_KILL","CAP_CHOWN"]}"#,
        );
        assert_eq!((sets.permitted, sets.ambient), (1 << 5 | 1, 1));
        assert!(sets.validate().is_ok());
    }

    #[test]
    fn an_effective_capability_must_be_permitted() {
        let error = sets(r#"{"effective":["CAP_SYS_ADMIN"]}"#)
            .validate()
            .unwrap_err()
            .to_string();
        assert!(error.contains("effective: CAP_SYS_ADMIN"), "{error}");
    }
}
