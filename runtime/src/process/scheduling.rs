//! The scheduling of a process, which the fields `process.scheduler`, `process.ioPriority` and
//! `process.execCPUAffinity` specify. See sched_setattr(2), ioprio_set(2) and sched_setaffinity(2).

use crate::config::spec;
use crate::error::{Context, Error, Reason as _, Result, refuse};
use crate::log;
use crate::sys::number_list::NumberSet;
use crate::sys::syscalls::{self, SchedAttr};

/// The scheduling policies from linux/sched.h.
const POLICIES: [(&str, u32); 7] = [
    ("SCHED_OTHER", 0),
    ("SCHED_FIFO", 1),
    ("SCHED_RR", 2),
    ("SCHED_BATCH", 3),
    ("SCHED_ISO", 4),
    ("SCHED_IDLE", 5),
    ("SCHED_DEADLINE", 6),
];

/// The scheduling flags from linux/sched.h.
const FLAGS: [(&str, u64); 7] = [
    ("SCHED_FLAG_RESET_ON_FORK", 0x01),
    ("SCHED_FLAG_RECLAIM", 0x02),
    ("SCHED_FLAG_DL_OVERRUN", 0x04),
    ("SCHED_FLAG_KEEP_POLICY", 0x08),
    ("SCHED_FLAG_KEEP_PARAMS", 0x10),
    ("SCHED_FLAG_UTIL_CLAMP_MIN", 0x20),
    ("SCHED_FLAG_UTIL_CLAMP_MAX", 0x40),
];

/// The I/O scheduling classes from linux/ioprio.h.
const IO_CLASSES: [(&str, i32); 3] = [
    ("IOPRIO_CLASS_RT", 1),
    ("IOPRIO_CLASS_BE", 2),
    ("IOPRIO_CLASS_IDLE", 3),
];
const IO_CLASS_SHIFT: i32 = 13;

/// The requested scheduling, in the form that the system calls need.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scheduling {
    scheduler: Option<SchedAttr>,
    /// The argument `ioprio` of ioprio_set(2).
    io_priority: Option<i32>,
    /// The CPUs to which rrun moves before it creates a process for `exec`.
    initial: Option<NumberSet>,
    /// The CPUs for the new process of `exec`. The process moves to these CPUs after it has entered
    /// the container's cgroup.
    last: Option<NumberSet>,
}

impl Scheduling {
    /// Reads the scheduling parameters of a process from the configuration.
    ///
    /// # Errors
    /// Fails if the name of a policy, of a flag or of an I/O class is unknown, or if the scheduling
    /// policy does not allow a value. The error names the invalid field.
    pub(crate) fn from_spec(process: &spec::ProcessSpec) -> Result<Scheduling> {
        let affinity = process.exec_cpu_affinity.clone().unwrap_or_default();
        let cpus = |field: &str, list: &str| {
            NumberSet::parse(list)
                .map_err(|error| error.while_doing(format!("process.execCPUAffinity.{field}")))
        };
        Ok(Scheduling {
            scheduler: process.scheduler.as_ref().map(attr).transpose()?,
            io_priority: process.io_priority.as_ref().map(ioprio).transpose()?,
            initial: cpus("initial", &affinity.initial)?,
            last: cpus("final", &affinity.last)?,
        })
    }

    /// Sets the scheduler and the I/O priority of process `pid`. A `pid` of 0 means the calling
    /// process. Some values, for example a real-time policy, need CAP_SYS_NICE on the host.
    pub(crate) fn apply(&self, pid: i32) -> Result<()> {
        if let Some(attr) = &self.scheduler {
            syscalls::sched_setattr(pid, attr).doing(|| {
                let policy = POLICIES.iter().find(|(_, number)| *number == attr.policy);
                let policy = policy.map_or("", |(name, _)| *name);
                format!(
                    "set process.scheduler to {policy}, nice {}, priority {}, runtime {}, deadline {}, period {}",
                    attr.nice, attr.priority, attr.runtime, attr.deadline, attr.period
                )
            })?;
        }
        if let Some(ioprio) = self.io_priority {
            syscalls::ioprio_set(pid, ioprio).doing(|| {
                let class = ioprio >> IO_CLASS_SHIFT;
                let class = IO_CLASSES.iter().find(|(_, number)| *number == class);
                format!(
                    "set process.ioPriority to {}, priority {}",
                    class.map_or("", |(name, _)| *name),
                    ioprio & ((1 << IO_CLASS_SHIFT) - 1)
                )
            })?;
        }
        Ok(())
    }

    /// Moves the calling process to the CPUs of `process.execCPUAffinity.initial`, so that it
    /// creates the process for `exec` on these CPUs.
    pub(crate) fn apply_initial_affinity(&self) -> Result<()> {
        match &self.initial {
            Some(cpus) => {
                syscalls::sched_setaffinity(cpus).doing(|| "set process.execCPUAffinity.initial")
            }
            None => Ok(()),
        }
    }

    /// Sets the final CPU affinity of the calling process. With `exec`, the new process calls this
    /// function after it has entered the container's cgroup.
    pub(crate) fn apply_final_affinity(&self) -> Result<()> {
        match (&self.initial, &self.last) {
            (_, Some(cpus)) => {
                syscalls::sched_setaffinity(cpus).doing(|| "set process.execCPUAffinity.final")
            }
            (Some(_), None) => Ok(()),
            (None, None) => {
                leave_callers_cpus();
                Ok(())
            }
        }
    }
}

/// Removes the CPU affinity that the calling process inherited from rrun's caller. Only the
/// container's cpuset should limit the CPUs of the container's processes. This function requests
/// all CPUs, and the kernel reduces the request to the cpuset.
pub(crate) fn leave_callers_cpus() {
    if let Err(errno) = syscalls::sched_setaffinity(&NumberSet::ALL) {
        log::warning(&format!(
            "the container's process keeps the CPU affinity of rrun's caller, because sched_setaffinity failed: {}",
            errno.reason()
        ));
    }
}

fn attr(scheduler: &spec::Scheduler) -> Result<SchedAttr> {
    let field = "process.scheduler";
    let policy = scheduler.policy.as_str();
    let Some((_, number)) = POLICIES.iter().find(|(name, _)| *name == policy) else {
        refuse!("{field}.policy: {policy:?} is unknown");
    };
    let (nice, priority) = (scheduler.nice, scheduler.priority);
    match policy {
        "SCHED_OTHER" | "SCHED_BATCH" if !(-20..=19).contains(&nice) => {
            refuse!("{field}.nice: {nice} is not between -20 and 19")
        }
        "SCHED_FIFO" | "SCHED_RR" if !(1..=99).contains(&priority) => {
            refuse!("{field}.priority: {priority} is not between 1 and 99")
        }
        "SCHED_FIFO" | "SCHED_RR" => {}
        _ if priority != 0 => {
            refuse!(
                "{field}.priority: {policy} does not use a priority, only SCHED_FIFO and SCHED_RR do"
            )
        }
        _ => {}
    }
    let (runtime, deadline, period) = (scheduler.runtime, scheduler.deadline, scheduler.period);
    if policy != "SCHED_DEADLINE" && (runtime, deadline, period) != (0, 0, 0) {
        refuse!(
            "{field}.runtime, .deadline, .period: {policy} does not use these values, only SCHED_DEADLINE does"
        );
    }
    let mut flags = 0;
    for name in scheduler.flags.iter().flatten() {
        let Some((_, bit)) = FLAGS.iter().find(|(known, _)| known == name) else {
            refuse!("{field}.flags: {name:?} is unknown");
        };
        flags |= bit;
    }
    Ok(SchedAttr {
        policy: *number,
        flags,
        nice,
        priority: u32::try_from(priority).unwrap_or(0),
        runtime,
        deadline,
        period,
        ..SchedAttr::default()
    })
}

fn ioprio(priority: &spec::IoPriority) -> Result<i32> {
    let (class, level) = (priority.class.as_str(), priority.priority);
    let Some((_, number)) = IO_CLASSES.iter().find(|(name, _)| *name == class) else {
        return Err(Error::new(format!(
            "process.ioPriority.class: {class:?} is unknown"
        )));
    };
    if !(0..=7).contains(&level) {
        refuse!("process.ioPriority.priority: {level} is not between 0 and 7");
    }
    Ok(number << IO_CLASS_SHIFT | level)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Scheduling> {
        Scheduling::from_spec(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn an_error_names_an_unknown_name_or_a_value_that_contradicts_the_policy() {
        for (json, field) in [
            (
                r#"{"scheduler":{"policy":"SCHED_NICE"}}"#,
                "scheduler.policy",
            ),
            (
                r#"{"scheduler":{"policy":"SCHED_OTHER","nice":20}}"#,
                "scheduler.nice",
            ),
            (
                r#"{"scheduler":{"policy":"SCHED_FIFO"}}"#,
                "scheduler.priority",
            ),
            (
                r#"{"scheduler":{"policy":"SCHED_IDLE","priority":1}}"#,
                "scheduler.priority",
            ),
            (
                r#"{"scheduler":{"policy":"SCHED_RR","priority":1,"runtime":5}}"#,
                "scheduler.runtime",
            ),
            (
                r#"{"scheduler":{"policy":"SCHED_IDLE","flags":["X"]}}"#,
                "scheduler.flags",
            ),
            (
                r#"{"ioPriority":{"class":"IOPRIO_CLASS_RT","priority":8}}"#,
                "ioPriority.priority",
            ),
            (
                r#"{"ioPriority":{"class":"RT","priority":0}}"#,
                "ioPriority.class",
            ),
            (
                r#"{"execCPUAffinity":{"initial":"0","final":"x"}}"#,
                "execCPUAffinity.final",
            ),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.starts_with(&format!("process.{field}")), "{error}");
        }
    }

    #[test]
    fn policies_and_flags_have_the_kernels_numbers() {
        let read = read(
            r#"{"scheduler":{"policy":"SCHED_DEADLINE","runtime":1,"deadline":2,"period":3,
                "flags":["SCHED_FLAG_RESET_ON_FORK","SCHED_FLAG_DL_OVERRUN"]},
                "ioPriority":{"class":"IOPRIO_CLASS_BE","priority":4}}"#,
        )
        .unwrap();
        let attr = read.scheduler.unwrap();
        assert_eq!((attr.policy, attr.flags, attr.period), (6, 5, 3));
        assert_eq!(read.io_priority, Some(0x4004));
    }
}
