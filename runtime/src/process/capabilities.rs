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

/// Capability sets as bit masks, bit n being capability number n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CapabilityMasks {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

const SYS_ADMIN: u64 = 1 << 21;

/// The bits of names. One that is unknown is left out and logged, as the
/// specification has it (config.md, capabilities).
pub(crate) fn mask<'a>(names: impl IntoIterator<Item = &'a str>) -> u64 {
    names.into_iter().fold(0, |mask, name| match bit(name) {
        Some(bit) => mask | bit,
        None => {
            log::warning(&format!("capability {name} is unknown, and left out"));
            mask
        }
    })
}

/// The bit of a name, with or without `CAP_`, in upper or lower case.
fn bit(name: &str) -> Option<u64> {
    capability::parse(name).map(|capability| capability.bitmask())
}

/// The names of the capabilities in a mask, for a sentence.
fn names(mask: u64) -> String {
    capability::names(mask).collect::<Vec<_>>().join(", ")
}

impl CapabilityMasks {
    /// Without what can not be had: names that are unknown, and ambient capabilities that are
    /// not both permitted and inheritable. Each is logged.
    pub(crate) fn from_spec(capabilities: &Capabilities) -> CapabilityMasks {
        let mut seen = BTreeSet::new();
        let mut mask = |names: &Option<Vec<String>>| {
            let names = names.iter().flatten().map(String::as_str);
            // Usually in several of the sets: one line for each is enough.
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
                "process.capabilities.ambient: {} left out, not both in permitted and inheritable",
                names(excess)
            ));
            sets.ambient &= !excess;
        }
        sets
    }

    /// Whether the sets can be had together.
    ///
    /// # Errors
    /// Effective capabilities that are not permitted, which the kernel would refuse.
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

    /// Adds capabilities, as `exec --cap` does: never to the inheritable ones, which would
    /// go on to programs with capabilities of their file's own (CVE-2022-29162); and so to
    /// the ambient ones only as far as the configuration made them inheritable.
    pub(crate) fn add(&mut self, mask: u64) {
        self.bounding |= mask;
        self.effective |= mask;
        self.permitted |= mask;
        self.ambient |= mask & self.inheritable;
    }

    /// Limits the bounding set of this process. Needs CAP_SETPCAP, so it comes first.
    pub(crate) fn drop_bounding(&self) -> Result<()> {
        // A number that this kernel does not have gives EINVAL: all were seen then.
        for number in 0..64 {
            if self.bounding & (1 << number) != 0 {
                continue;
            }
            match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number))
            {
                Ok(()) => {}
                Err(rustix::io::Errno::INVAL) => break,
                Err(errno) => {
                    return Err(errno)
                        .doing(|| format!("drop {} from the bounding set", name(number)));
                }
            }
        }
        Ok(())
    }

    /// Sets effective, permitted, inheritable and ambient set of this process. With
    /// `until_execution` the process also keeps CAP_SYS_ADMIN, if it has that.
    ///
    /// The program does not get CAP_SYS_ADMIN from this: execve(2) computes the new sets from the
    /// bounding, the inheritable and the ambient set alone, and it is added to none of these
    /// ("Transformation of capabilities during execve()" in capabilities(7)).
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
                    "set process.capabilities.permitted, of which rrun itself lacks {}",
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
    fn numbers_are_the_kernels() {
        assert_eq!(mask(["CAP_CHOWN"]), 1);
        assert_eq!(mask(["cap_net_raw", "SYS_ADMIN"]), 1 << 13 | 1 << 21);
        assert_eq!(mask(["CAP_CHECKPOINT_RESTORE"]), 1 << 40);
        assert_eq!(name(24), "CAP_SYS_RESOURCE");
    }

    fn sets(json: &str) -> CapabilityMasks {
        CapabilityMasks::from_spec(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn what_can_not_be_had_is_left_out() {
        let sets = sets(
            r#"{"permitted":["CAP_FLY","CAP_KILL","CAP_CHOWN"],"inheritable":["CAP_CHOWN"],
                "ambient":["CAP_KILL","CAP_CHOWN"]}"#,
        );
        assert_eq!((sets.permitted, sets.ambient), (1 << 5 | 1, 1));
        assert!(sets.validate().is_ok());
    }

    #[test]
    fn an_effective_one_must_be_permitted() {
        let error = sets(r#"{"effective":["CAP_SYS_ADMIN"]}"#)
            .validate()
            .unwrap_err()
            .to_string();
        assert!(error.contains("effective: CAP_SYS_ADMIN"), "{error}");
    }
}
