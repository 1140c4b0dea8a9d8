//! The process that a configuration specifies: its arguments, environment, user and limits. The
//! process is a container's first process or a process that `exec` creates.

pub(crate) mod capabilities;
pub(crate) mod descriptors;
pub(crate) mod environment;
pub(crate) mod lsm;
pub(crate) mod memory_policy;
pub(crate) mod null_device;
pub(crate) mod personality;
pub(crate) mod scheduling;
pub(crate) mod terminal;

use std::ffi::CString;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, FileType, FsWord, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;

use crate::config::spec::{self, ProcessSpec};
use crate::error::{Context, Error, Result, refuse};
use crate::mounts::rootfs::Rootfs;
use crate::process::capabilities::CapabilityMasks;
use crate::process::lsm::Labels;
use crate::process::memory_policy::MemoryPolicy;
use crate::process::personality::Personality;
use crate::process::scheduling::Scheduling;
use crate::sys::dumpable::set_dumpable;
use crate::sys::syscalls;
use rrun_kernel::procfs::{Procfs, ProcfsError};
use rrun_kernel::{errno, id};

/// The directories in which rrun searches for a program if the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A resource limit: its name, its `RLIMIT_*` number, its soft value and its hard value.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rlimit {
    name: &'static str,
    resource: i64,
    soft: u64,
    hard: u64,
}

/// The checked parameters of a process, in the form that the system calls need.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) args: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: PathBuf,
    pub(crate) terminal: bool,
    /// The rows and the columns of the terminal, if the configuration specifies them.
    pub(crate) console_size: Option<(u16, u16)>,
    pub(crate) uid: u32,
    gid: u32,
    groups: Vec<u32>,
    pub(crate) umask: Option<u32>,
    /// The capability sets, which are empty if the configuration does not specify them.
    pub(crate) capabilities: CapabilityMasks,
    pub(crate) no_new_privileges: bool,
    pub(crate) oom_score_adj: Option<i32>,
    rlimits: Vec<Rlimit>,
    pub(crate) scheduling: Scheduling,
    pub(crate) labels: Labels,
    personality: Option<Personality>,
    memory_policy: Option<MemoryPolicy>,
}

impl Process {
    /// Checks the process that a configuration specifies.
    ///
    /// # Errors
    /// Fails if a field is missing, contradictory or not supported. The error names the invalid
    /// field.
    pub(crate) fn from_spec(spec: &ProcessSpec) -> Result<Process> {
        let args = args(spec)?;
        if !spec.cwd.is_absolute() {
            refuse!(
                "process.cwd: {} is not an absolute path",
                spec.cwd.display()
            );
        }
        let user = &spec.user;
        check_user(user)?;
        let capabilities = spec
            .capabilities
            .as_ref()
            .map(CapabilityMasks::from_spec)
            .unwrap_or_default();
        capabilities.validate()?;
        if let Some(adj) = spec
            .oom_score_adj
            .filter(|adj| !(-1000..=1000).contains(adj))
        {
            refuse!("process.oomScoreAdj: {adj} is not between -1000 and 1000");
        }
        let size = |size: u64| {
            u16::try_from(size)
                .map_err(|_| Error::new(format!("process.consoleSize: {size} is too large")))
        };
        Ok(Process {
            args,
            env: environment::from_spec(spec.env.as_deref().unwrap_or_default())?,
            cwd: spec.cwd.clone(),
            terminal: spec.terminal,
            console_size: spec
                .console_size
                .map(|console| Ok::<_, Error>((size(console.height)?, size(console.width)?)))
                .transpose()?,
            uid: user.uid,
            gid: user.gid,
            groups: user.additional_gids.clone().unwrap_or_default(),
            umask: user.umask,
            capabilities,
            no_new_privileges: spec.no_new_privileges,
            oom_score_adj: spec.oom_score_adj,
            rlimits: rlimits(spec)?,
            scheduling: Scheduling::from_spec(spec)?,
            labels: Labels::from_spec(spec)?,
            personality: None,
            memory_policy: None,
        })
    }

    /// Stores the personality and the memory policy, which the configuration specifies for all
    /// processes of a container.
    pub(crate) fn inherit(
        &mut self,
        personality: Option<&spec::PersonalitySpec>,
        memory_policy: Option<&spec::MemoryPolicySpec>,
    ) -> Result<()> {
        self.personality = personality.map(Personality::from_spec).transpose()?;
        self.memory_policy = memory_policy.map(MemoryPolicy::from_spec).transpose()?;
        Ok(())
    }

    /// Sets the personality and the memory policy of the calling process. A process can set these
    /// two values only for itself, and needs no privilege to set them.
    pub(crate) fn apply_inherited(&self) -> Result<()> {
        if let Some(personality) = self.personality {
            personality.apply()?;
        }
        match &self.memory_policy {
            Some(policy) => policy.apply(),
            None => Ok(()),
        }
    }

    /// Sets the resource limits and the scheduling of process `pid`. A `pid` of 0 means the calling
    /// process.
    pub(crate) fn apply_limits(&self, pid: i32) -> Result<()> {
        self.scheduling.apply(pid)?;
        for limit in &self.rlimits {
            syscalls::setrlimit(pid, limit.resource, limit.soft, limit.hard).doing(|| {
                format!(
                    "set process.rlimits {} to soft {} and hard {}",
                    limit.name, limit.soft, limit.hard
                )
            })?;
        }
        Ok(())
    }

    /// Sets the OOM score adjustment of a process. `process` is a process id or `self`.
    ///
    /// A process without CAP_SYS_RESOURCE can lower this adjustment, but only to the last value
    /// that a process with CAP_SYS_RESOURCE set. If the kernel refuses the value, rrun reports an
    /// error. Otherwise, the OOM killer could kill the process earlier than the configuration
    /// specifies.
    pub(crate) fn apply_oom_score_adj(&self, process: &str) -> Result<()> {
        let Some(adj) = self.oom_score_adj else {
            return Ok(());
        };
        Procfs::open()?
            .write(&format!("{process}/oom_score_adj"), &adj.to_string())
            .doing(|| format!("set process.oomScoreAdj to {adj}"))
    }

    /// Sets the OOM score adjustment of the calling process, which can belong to a user other than
    /// root. Such a process can write to its own files in /proc only while it is dumpable. So the
    /// process must call this function before it enters a namespace of a container.
    pub(crate) fn apply_own_oom_score_adj(&self) -> Result<()> {
        if self.oom_score_adj.is_none() {
            return Ok(());
        }
        set_dumpable(true)?;
        self.apply_oom_score_adj("self")?;
        set_dumpable(false)
    }

    /// Permanently sets the group ids, the user ids and the capabilities of the calling process. If
    /// `will_be_filtered` is true, the process keeps CAP_SYS_ADMIN until it executes its program.
    /// The process needs CAP_SYS_ADMIN to load a seccomp filter. With no_new_privs, it does not need
    /// the capability, but the kernel then limits the memory for all filters of the node
    /// (net.core.bpf_jit_limit), and a container can use up this memory.
    pub(crate) fn become_user(&self, will_be_filtered: bool) -> Result<()> {
        let until_execution = will_be_filtered
            && (!self.no_new_privileges || self.capabilities.executes_without_sys_admin());
        self.capabilities.drop_bounding()?;
        let groups: Vec<Gid> = self.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        match rustix::thread::set_thread_groups(&groups) {
            // The user namespace can forbid setgroups(2). rrun ignores the error in this case, if
            // the configuration requests no additional groups.
            Err(Errno::PERM) if groups.is_empty() && setgroups_is_denied()? => {}
            result => {
                result.doing(|| format!("set process.user.additionalGids to {:?}", self.groups))?
            }
        }
        let (gid, uid) = (Gid::from_raw(self.gid), Uid::from_raw(self.uid));
        rustix::thread::set_thread_res_gid(gid, gid, gid)
            .doing(|| format!("change the group id to process.user.gid {}", self.gid))?;
        if self.uid != 0 {
            rustix::thread::set_keep_capabilities(true)
                .doing(|| "keep the capabilities when the user id changes (PR_SET_KEEPCAPS)")?;
        }
        rustix::thread::set_thread_res_uid(uid, uid, uid)
            .doing(|| format!("change the user id to process.user.uid {}", self.uid))?;
        self.capabilities.apply(until_execution)
    }

    /// Returns the path of the program that `args[0]` names. If `args[0]` contains no slash, this
    /// function searches the directories in the process's PATH, in the current root.
    ///
    /// # Errors
    /// Fails if the program does not exist or cannot be executed. The error has runc's text,
    /// because rrun's callers recognise the error by this text.
    pub(crate) fn find_program(&self) -> Result<CString> {
        let Some(name) = self.args.first() else {
            refuse!("process.args: must contain at least the program to execute");
        };
        let shown = name.to_string_lossy();
        if name.as_bytes().contains(&b'/') {
            return match executable(name) {
                Ok(()) => Ok(name.clone()),
                Err(errno) => Err(no_program(&shown, errno)),
            };
        }
        let path = self
            .env
            .iter()
            .find_map(|var| var.to_str().ok()?.strip_prefix("PATH="))
            .unwrap_or(DEFAULT_PATH);
        let mut failed = None;
        for directory in path.split(':') {
            // An empty element of PATH means the working directory.
            let directory = if directory.is_empty() { "." } else { directory };
            let Ok(candidate) = CString::new(format!("{directory}/{shown}")) else {
                continue;
            };
            match executable(&candidate) {
                Ok(()) => return Ok(candidate),
                Err(
                    Errno::NOENT | Errno::NOTDIR | Errno::ISDIR | Errno::LOOP | Errno::NAMETOOLONG,
                ) => {}
                Err(errno) => failed = Some((candidate, errno)),
            }
        }
        Err(match failed {
            Some((found, errno)) => no_program(&found.to_string_lossy(), errno),
            None => Error::new(format!(
                "exec: \"{shown}\": executable file not found in $PATH ({path})"
            )),
        })
    }

    /// Makes the process's user the owner of its standard streams that are pipes, sockets or the
    /// container's terminal. Then the process can open these streams again through paths such as
    /// /dev/stdout. Another stream, for example the terminal of rrun's caller, keeps its owner. A
    /// stream that is the host's /dev/null is replaced with the container's null device, and keeps
    /// its owner, too.
    ///
    /// # Errors
    /// Fails if a null device can be neither opened nor created.
    pub(crate) fn take_standard_streams(&self) -> Result<()> {
        null_device::replace_host_device(|stream, stat| {
            if self.uid != 0
                && stat.st_uid != self.uid
                && (self.terminal || has_no_path(stream, stat))
            {
                // A failure of fchown(2) is ignored, because the stream's file system can be
                // read-only or can lack a mapping for the user id.
                let _ = rustix::fs::fchown(stream, Some(Uid::from_raw(self.uid)), None);
            }
        })
    }
}

/// Returns whether an open file is a socket or a pipe without a path on the host. If rrun changed
/// the owner of a file that has a path, a user of the host with the same user id could open this
/// file.
fn has_no_path(file: BorrowedFd<'_>, stat: &Stat) -> bool {
    /// The file system type of pipes, from linux/magic.h. A named FIFO is in another file system.
    const PIPEFS_MAGIC: FsWord = 0x5049_5045;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Socket => true,
        FileType::Fifo => rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type == PIPEFS_MAGIC),
        _ => false,
    }
}

/// Refuses ids that no user and no group can have. The kernel would interpret such an id as "do not
/// change", and the process would keep root's ids.
fn check_user(user: &spec::User) -> Result<()> {
    let groups = user.additional_gids.iter().flatten().copied();
    let ids = [("uid", user.uid), ("gid", user.gid)]
        .into_iter()
        .chain(groups.map(|gid| ("additionalGids", gid)));
    for (field, id) in ids {
        if !id::is_valid(id) {
            refuse!("process.user.{field}: {id} is not a valid user or group id");
        }
    }
    if let Some(umask) = user.umask.filter(|umask| *umask > 0o777) {
        refuse!("process.user.umask: {umask:o} is greater than 777");
    }
    Ok(())
}

/// Returns whether the user namespace of this process forbids setgroups(2). See
/// user_namespaces(7). If the container has no /proc, the function returns false.
fn setgroups_is_denied() -> Result<bool> {
    let procfs = match Procfs::open() {
        Err(ProcfsError::Foreign | ProcfsError::Kernel(Errno::NOENT)) => return Ok(false),
        procfs => procfs?,
    };
    let text = procfs.read("self/setgroups");
    Ok(text.doing(|| "read /proc/self/setgroups")?.trim_ascii_end() == b"deny")
}

fn args(spec: &ProcessSpec) -> Result<Vec<CString>> {
    let args = spec
        .args
        .iter()
        .flatten()
        .map(|text| {
            CString::new(text.as_str())
                .map_err(|_| Error::new("process.args: an argument contains NUL"))
        })
        .collect::<Result<Vec<CString>>>()?;
    if args.is_empty() {
        refuse!("process.args: must contain at least the program to execute");
    }
    Ok(args)
}

/// Returns the error for a program that cannot be executed. The error consists of runc's text and
/// the name of the errno.
fn no_program(path: &str, errno: Errno) -> Error {
    Error::new(match errno {
        Errno::NOENT => {
            format!("exec: \"{path}\": stat {path}: no such file or directory (ENOENT)")
        }
        Errno::ACCESS => format!("exec: \"{path}\": permission denied (EACCES)"),
        Errno::ISDIR => format!("exec: \"{path}\": is a directory (EISDIR)"),
        Errno::NOEXEC => format!("exec: \"{path}\": exec format error (ENOEXEC)"),
        errno => format!("exec: \"{path}\": {}", errno::text(errno.raw_os_error())),
    })
}

/// Returns the error for an execve(2) that failed although [`Process::find_program`] found the
/// program.
pub(crate) fn not_executed(path: &str, errno: Errno, filtered: bool) -> Error {
    match errno {
        Errno::NOENT => Error::new(format!(
            "exec: \"{path}\": no such file or directory (ENOENT): perhaps the interpreter that the program names is missing in the container"
        )),
        errno if filtered && !matches!(errno, Errno::ACCESS | Errno::NOEXEC) => {
            no_program(path, errno).while_doing("execve, which linux.seccomp possibly forbids")
        }
        errno => no_program(path, errno),
    }
}

/// Checks whether the calling process has permission to execute the file at `path`. A later
/// execve(2) can still fail for other reasons.
fn executable(path: &CString) -> std::result::Result<(), Errno> {
    let stat = rustix::fs::stat(path)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => return Err(Errno::ISDIR),
        _ => return Err(Errno::ACCESS),
    }
    rustix::fs::accessat(rustix::fs::CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

/// The name and the number of each resource limit. The numbers are converted to i64, because the
/// type of these constants differs between C libraries.
const RLIMITS: [(&str, i64); 16] = [
    ("RLIMIT_CPU", libc::RLIMIT_CPU as i64),
    ("RLIMIT_FSIZE", libc::RLIMIT_FSIZE as i64),
    ("RLIMIT_DATA", libc::RLIMIT_DATA as i64),
    ("RLIMIT_STACK", libc::RLIMIT_STACK as i64),
    ("RLIMIT_CORE", libc::RLIMIT_CORE as i64),
    ("RLIMIT_RSS", libc::RLIMIT_RSS as i64),
    ("RLIMIT_NPROC", libc::RLIMIT_NPROC as i64),
    ("RLIMIT_NOFILE", libc::RLIMIT_NOFILE as i64),
    ("RLIMIT_MEMLOCK", libc::RLIMIT_MEMLOCK as i64),
    ("RLIMIT_AS", libc::RLIMIT_AS as i64),
    ("RLIMIT_LOCKS", libc::RLIMIT_LOCKS as i64),
    ("RLIMIT_SIGPENDING", libc::RLIMIT_SIGPENDING as i64),
    ("RLIMIT_MSGQUEUE", libc::RLIMIT_MSGQUEUE as i64),
    ("RLIMIT_NICE", libc::RLIMIT_NICE as i64),
    ("RLIMIT_RTPRIO", libc::RLIMIT_RTPRIO as i64),
    ("RLIMIT_RTTIME", libc::RLIMIT_RTTIME as i64),
];

fn rlimits(spec: &ProcessSpec) -> Result<Vec<Rlimit>> {
    let mut limits: Vec<Rlimit> = Vec::new();
    for limit in spec.rlimits.iter().flatten() {
        let Some((name, resource)) = RLIMITS.iter().find(|(name, _)| *name == limit.typ) else {
            refuse!(
                "process.rlimits: {} is not the name of a resource limit",
                limit.typ
            );
        };
        if limits.iter().any(|other| other.name == *name) {
            refuse!("process.rlimits: {name} is listed twice");
        }
        if limit.soft > limit.hard {
            refuse!(
                "process.rlimits: the soft limit of {name} ({}) is greater than its hard limit ({})",
                limit.soft,
                limit.hard
            );
        }
        limits.push(Rlimit {
            name,
            resource: *resource,
            soft: limit.soft,
            hard: limit.hard,
        });
    }
    Ok(limits)
}

/// Enters the process's working directory in the current root.
///
/// # Errors
/// Fails if the process cannot enter the directory, or if the directory is outside the root. The
/// container's /proc can contain processes of the host. So a path can leave the root through the
/// links /proc/PID/root, /proc/PID/cwd and /proc/PID/fd/N (CVE-2024-21626).
pub(crate) fn enter_cwd(cwd: &Path) -> Result<()> {
    rustix::process::chdir(cwd).doing(|| format!("enter process.cwd {}", cwd.display()))?;
    let current = rustix::process::getcwd(Vec::new())
        .doing(|| format!("resolve process.cwd {} (getcwd)", cwd.display()))?;
    if current.as_bytes().first() != Some(&b'/') {
        refuse!(
            "enter process.cwd {}: the directory is outside the container",
            cwd.display()
        );
    }
    Ok(())
}

/// Creates the missing working directory in the current root, and enters the directory. This
/// function does not follow links such as /proc/PID/root. Through such links, the calling process
/// could create directories on the host. The calling process still has more privileges than the
/// program.
pub(crate) fn make_cwd(cwd: &Path) -> Result<()> {
    let root = rustix::fs::open(
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .doing(|| "open the container's root")?;
    let made = Rootfs::new(root)
        .make_working_directory(cwd, Mode::from_raw_mode(0o777))
        .map_err(|error| error.while_doing(format!("create process.cwd {}", cwd.display())))?;
    enter_cwd(&made)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Result<Process> {
        Process::from_spec(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn errors_name_missing_and_invalid_fields() {
        for (json, field) in [
            (r#"{"user":{"uid":0,"gid":0},"cwd":"/"}"#, "process.args"),
            (
                r#"{"user":{"uid":0,"gid":0},"args":["a"],"cwd":"x"}"#,
                "process.cwd",
            ),
            (
                r#"{"user":{"uid":0,"gid":0},"args":["a"],"cwd":"/","apparmorProfile":"a\nb"}"#,
                "process.apparmorProfile",
            ),
            (
                r#"{"user":{"uid":0,"gid":0},"args":["a"],"cwd":"/","oomScoreAdj":1001}"#,
                "process.oomScoreAdj",
            ),
            (
                r#"{"user":{"uid":4294967295,"gid":0},"args":["a"],"cwd":"/"}"#,
                "process.user.uid: 4294967295",
            ),
            (
                r#"{"user":{"uid":0,"gid":4294967295},"args":["a"],"cwd":"/"}"#,
                "process.user.gid: 4294967295",
            ),
            (
                r#"{"user":{"uid":0,"gid":0,"additionalGids":[5,4294967295]},"args":["a"],"cwd":"/"}"#,
                "process.user.additionalGids: 4294967295",
            ),
            (
                r#"{"user":{"uid":0,"gid":0,"umask":512},"args":["a"],"cwd":"/"}"#,
                "process.user.umask: 1000",
            ),
            (
                r#"{"user":{"uid":0,"gid":0},"args":["a"],"cwd":"/","rlimits":[{"type":"RLIMIT_NOFILE","soft":2,"hard":1}]}"#,
                "RLIMIT_NOFILE",
            ),
        ] {
            let error = spec(json).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
