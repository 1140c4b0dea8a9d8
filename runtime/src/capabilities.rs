//! The five capability sets of a process. See capabilities(7).

use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set,
};

use crate::error::{Context, Error, Result};
use crate::refuse;
use crate::spec::Capabilities;

/// Capability sets as bit masks, bit n being capability number n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    pub bounding: u64,
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
    pub ambient: u64,
}

/// Without CAP_, in the order of the kernel's numbers (linux/capability.h).
const NAMES: [&str; 41] = [
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

/// `CAP_SYS_ADMIN` of a number.
pub fn name(number: usize) -> String {
    NAMES.get(number).map_or_else(
        || format!("capability {number}"),
        |name| format!("CAP_{name}"),
    )
}

/// The bit of a name, with or without `CAP_`, in upper or lower case.
pub fn bit(name: &str) -> Result<u64> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES
        .iter()
        .position(|known| *known == short)
        .map(|number| 1 << number)
        .ok_or_else(|| Error::new(format!("unknown capability {name}")))
}

fn mask(field: &str, names: Option<&Vec<String>>) -> Result<u64> {
    names.into_iter().flatten().try_fold(0, |mask, name| {
        let bit = bit(name)
            .map_err(|error| error.while_doing(format!("process.capabilities.{field}")))?;
        Ok(mask | bit)
    })
}

/// The names of the capabilities in a mask, for a sentence.
fn names(mask: u64) -> String {
    let names: Vec<String> = (0..64)
        .filter(|number| mask & (1 << number) != 0)
        .map(name)
        .collect();
    names.join(", ")
}

impl Sets {
    /// # Errors
    /// A name that stands for no capability, with its field.
    pub fn from_spec(capabilities: &Capabilities) -> Result<Sets> {
        Ok(Sets {
            bounding: mask("bounding", capabilities.bounding.as_ref())?,
            effective: mask("effective", capabilities.effective.as_ref())?,
            permitted: mask("permitted", capabilities.permitted.as_ref())?,
            inheritable: mask("inheritable", capabilities.inheritable.as_ref())?,
            ambient: mask("ambient", capabilities.ambient.as_ref())?,
        })
    }

    /// Whether the sets can be had together.
    ///
    /// # Errors
    /// Those combinations that the kernel would refuse, named by their field.
    pub fn validate(&self) -> Result<()> {
        let excess = self.effective & !self.permitted;
        if excess != 0 {
            refuse!(
                "process.capabilities.effective: {} is not in process.capabilities.permitted",
                names(excess)
            );
        }
        let excess = self.ambient & !(self.permitted & self.inheritable);
        if excess != 0 {
            refuse!(
                "process.capabilities.ambient: {} is not both in permitted and inheritable",
                names(excess)
            );
        }
        Ok(())
    }

    /// Adds capabilities, as `exec --cap` does: never to the inheritable ones, which would
    /// go on to programs with capabilities of their file's own (CVE-2022-29162); and so to
    /// the ambient ones only as far as the configuration made them inheritable.
    pub fn add(&mut self, mask: u64) {
        self.bounding |= mask;
        self.effective |= mask;
        self.permitted |= mask;
        self.ambient |= mask & self.inheritable;
    }

    /// Limits the bounding set of this process. Needs CAP_SETPCAP, so it comes first.
    pub fn drop_bounding(&self) -> Result<()> {
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

    /// Sets effective, permitted, inheritable and ambient set of this process.
    pub fn apply(&self) -> Result<()> {
        let sets = CapabilitySets {
            effective: CapabilitySet::from_bits_retain(self.effective),
            permitted: CapabilitySet::from_bits_retain(self.permitted),
            inheritable: CapabilitySet::from_bits_retain(self.inheritable),
        };
        rustix::thread::set_capabilities(None, sets).doing(|| {
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
        assert_eq!(bit("CAP_CHOWN").unwrap(), 1);
        assert_eq!(bit("cap_net_raw").unwrap(), 1 << 13);
        assert_eq!(bit("SYS_ADMIN").unwrap(), 1 << 21);
        assert_eq!(bit("CAP_CHECKPOINT_RESTORE").unwrap(), 1 << 40);
        assert_eq!(name(24), "CAP_SYS_RESOURCE");
        assert!(bit("CAP_FLY").is_err());
    }

    #[test]
    fn combinations_that_the_kernel_would_refuse_are_named() {
        let sets = Sets {
            effective: 1 << 21,
            ..Sets::default()
        };
        let error = sets.validate().unwrap_err().to_string();
        assert!(error.contains("effective: CAP_SYS_ADMIN"), "{error}");
        let sets = Sets {
            permitted: 1,
            ambient: 1,
            ..Sets::default()
        };
        assert!(
            sets.validate()
                .unwrap_err()
                .to_string()
                .contains("CAP_CHOWN")
        );
    }
}
