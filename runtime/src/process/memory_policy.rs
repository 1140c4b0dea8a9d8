//! The NUMA nodes from which a process gets its memory (`linux.memoryPolicy`). See
//! set_mempolicy(2). execve(2) preserves this memory policy, and child processes inherit the
//! policy.

use crate::config::spec;
use crate::error::{Context, Result, refuse};
use crate::sys::number_list::NumberSet;
use crate::sys::syscalls;

/// The modes from linux/mempolicy.h.
pub(crate) const MODES: [(&str, u32); 7] = [
    ("MPOL_DEFAULT", 0),
    ("MPOL_PREFERRED", 1),
    ("MPOL_BIND", 2),
    ("MPOL_INTERLEAVE", 3),
    ("MPOL_LOCAL", 4),
    ("MPOL_PREFERRED_MANY", 5),
    ("MPOL_WEIGHTED_INTERLEAVE", 6),
];

/// The mode flags from linux/mempolicy.h.
pub(crate) const FLAGS: [(&str, u32); 3] = [
    ("MPOL_F_NUMA_BALANCING", 1 << 13),
    ("MPOL_F_RELATIVE_NODES", 1 << 14),
    ("MPOL_F_STATIC_NODES", 1 << 15),
];

/// A memory policy in the form that set_mempolicy(2) needs. `mode` also contains the mode flags.
#[derive(Clone, Debug)]
pub(crate) struct MemoryPolicy {
    name: &'static str,
    mode: u32,
    nodes: Option<NumberSet>,
}

impl MemoryPolicy {
    /// Reads the memory policy from the configuration.
    ///
    /// # Errors
    /// Fails if the mode or a flag is unknown. Also fails if the mode requires nodes but none are
    /// given, or if nodes are given but the mode allows no nodes. The error names the invalid
    /// field.
    pub(crate) fn from_spec(policy: &spec::MemoryPolicySpec) -> Result<MemoryPolicy> {
        let field = "linux.memoryPolicy";
        let Some((name, mode)) = MODES.iter().find(|(name, _)| *name == policy.mode) else {
            refuse!("{field}.mode: {:?} is unknown", policy.mode);
        };
        let mut mode = *mode;
        for flag in policy.flags.iter().flatten() {
            let Some((_, bit)) = FLAGS.iter().find(|(known, _)| known == flag) else {
                refuse!("{field}.flags: {flag:?} is unknown");
            };
            mode |= bit;
        }
        let nodes = NumberSet::parse(&policy.nodes)
            .map_err(|error| error.while_doing(format!("{field}.nodes")))?;
        match (*name, &nodes) {
            ("MPOL_DEFAULT" | "MPOL_LOCAL", Some(_)) => {
                refuse!("{field}.nodes: {name} does not allow nodes")
            }
            ("MPOL_DEFAULT" | "MPOL_LOCAL" | "MPOL_PREFERRED", _) | (_, Some(_)) => {}
            (_, None) => refuse!("{field}.nodes: {name} needs at least one node"),
        }
        Ok(MemoryPolicy { name, mode, nodes })
    }

    /// Sets the memory policy of the calling process.
    pub(crate) fn apply(&self) -> Result<()> {
        syscalls::set_mempolicy(self.mode, self.nodes.as_ref())
            .doing(|| format!("set linux.memoryPolicy to {}", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<MemoryPolicy> {
        MemoryPolicy::from_spec(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn an_error_names_an_unknown_mode_or_flag_and_nodes_that_contradict_the_mode() {
        for (json, field) in [
            (r#"{"mode":"MPOL_BIND","nodes":""}"#, "nodes"),
            (r#"{"mode":"MPOL_LOCAL","nodes":"0"}"#, "nodes"),
            (r#"{"mode":"BIND","nodes":"0"}"#, "mode"),
            (r#"{"mode":"MPOL_BIND","nodes":"0","flags":["F"]}"#, "flags"),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.contains(&format!("memoryPolicy.{field}")), "{error}");
        }
        let policy = read(r#"{"mode":"MPOL_BIND","nodes":"0","flags":["MPOL_F_STATIC_NODES"]}"#);
        assert_eq!(policy.unwrap().mode, 0x8002);
    }
}
