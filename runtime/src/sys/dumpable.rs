//! The dumpable attribute of a process, which decides whether other processes can trace the
//! process. See ptrace(2), "Ptrace access mode checking".

use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::error::{Context, Result};

/// Makes this process dumpable, or undumpable.
///
/// The files of an undumpable process in /proc belong to root. Only a process with CAP_SYS_PTRACE
/// in the user namespace in which rrun was executed can trace the process. execve(2) makes a
/// process dumpable again.
pub(crate) fn set_dumpable(dumpable: bool) -> Result<()> {
    if dumpable {
        set_dumpable_behavior(DumpableBehavior::Dumpable)
            .doing(|| "allow this process to open its own files in /proc (PR_SET_DUMPABLE)")
    } else {
        set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .doing(|| "prevent other processes from inspecting this process (PR_SET_DUMPABLE)")
    }
}
