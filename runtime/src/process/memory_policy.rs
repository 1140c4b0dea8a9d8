//! `linux.memoryPolicy`: from which NUMA nodes a process gets its memory. See
//! set_mempolicy(2); what is set is kept over execve(2) and inherited.

use crate::config::spec;
use crate::error::{Context, Result, refuse};
use crate::sys::number_list::NumberSet;
use crate::sys::syscalls;

/// linux/mempolicy.h
pub(crate) const MODES: [(&str, u32); 7] = [
    ("MPOL_DEFAULT", 0),
    ("MPOL_PREFERRED", 1),
    ("MPOL_BIND", 2),
    ("MPOL_INTERLEAVE", 3),
    ("MPOL_LOCAL", 4),
    ("MPOL_PREFERRED_MANY", 5),
    ("MPOL_WEIGHTED_INTERLEAVE", 6),
];

/// linux/mempolicy.h
pub(crate) const FLAGS: [(&str, u32); 3] = [
    ("MPOL_F_NUMA_BALANCING", 1 << 13),
    ("MPOL_F_RELATIVE_NODES", 1 << 14),
    ("MPOL_F_STATIC_NODES", 1 << 15),
];

/// Mode with flags, and nodes, as the system call wants them.
#[derive(Clone, Debug)]
pub(crate) struct MemoryPolicy {
    name: &'static str,
    mode: u32,
    nodes: Option<NumberSet>,
}

impl MemoryPolicy {
    /// # Errors
    /// Names that mean nothing, nodes that contradict the mode, by their field.
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
                refuse!("{field}.nodes: {name} takes none")
            }
            ("MPOL_DEFAULT" | "MPOL_LOCAL" | "MPOL_PREFERRED", _) | (_, Some(_)) => {}
            (_, None) => refuse!("{field}.nodes: {name} needs at least one"),
        }
        Ok(MemoryPolicy { name, mode, nodes })
    }

    /// Sets the policy of this process.
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
    fn modes_and_nodes_must_agree() {
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
