//! The private protocol between the CRI server and a pod's monitor.
//!
//! A unix stream socket, `STATE/pods/POD/monitor.sock`. Each message is a little-endian `u32`
//! length (at most 4 MiB) and that many bytes of JSON; descriptors travel as `SCM_RIGHTS` with the
//! message's first byte. One connection carries one operation: the client
//! sends one [`Request`], the monitor answers with one [`Reply`], or, where said below, with
//! several, and then closes. Connections are cheap; nothing is multiplexed. What is no message
//! closes the connection, and so does a client that does not read what it asked for.
//!
//! The CRI server may die between any two bytes. An operation that the monitor has begun runs to
//! its end all the same, except an exec, which dies with its connection.
//!
//! [`wire`] puts the messages on a socket. The two sides can be of different versions; README.md
//! says what each may meet, and how a field is added.

pub mod wire;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The file names in a pod's directory.
pub const SOCKET_NAME: &str = "monitor.sock";
pub const CONFIGURATION_NAME: &str = "monitor.json";

/// The descriptor at which a monitor finds its listening socket: the CRI server binds it, so
/// that clients can connect before the monitor has come to its senses.
pub const LISTEN_FD: i32 = 3;

/// What a monitor is told once, in `STATE/pods/POD/monitor.json`, before it starts.
///
/// The monitor is started as `rrun-monitor --dir STATE/pods/POD` and holds the namespaces that
/// the containers of the pod share: it is itself in the new ones (`/proc/PID/ns/…` joins them), or
/// keeps a process that is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pod {
    /// The sandbox's id.
    pub id: String,
    /// A new UTS namespace with this host name; `None`: the node's.
    pub hostname: Option<String>,
    /// A new IPC namespace, or the node's.
    pub new_ipc: bool,
    /// One PID namespace for all containers: the monitor then keeps a first process in it that
    /// does nothing but reap ([`Hello::pid1`]).
    pub shared_pid: bool,
    /// A new user namespace. The monitor stays out of it, and of the pod's other namespaces: a
    /// process that does nothing holds them ([`Hello::holder`]), a new network namespace too.
    #[serde(default)]
    pub users: Option<IdMaps>,
    /// The binary of the runtime that the pod's containers will most likely be made by, for a
    /// monitor that has nothing else to do yet.
    #[serde(default)]
    pub runtime: Option<PathBuf>,
}

/// The ids of a pod's user namespace, as the kernel takes them: a line for each range with the
/// first id inside, the first outside and how many, user_namespaces(7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMaps {
    pub uid_map: String,
    pub gid_map: String,
}

/// What a client asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Answered by [`Reply::Hello`], then by a [`Reply::Event`] for each change until one side
    /// closes. Events that happen between the snapshot and the first wait are not lost.
    Subscribe,
    /// Runs `RUNTIME… create`, with the container's stdio on pipes (or a terminal) that the
    /// monitor owns. With a descriptor, the reading end of a pipe, the bundle may still be written:
    /// that one is passed to the runtime as `--after`. Answered by [`Reply::Created`] or
    /// [`Reply::Error`]; after an error nothing of the container is left with the monitor or the
    /// runtime.
    Create(Create),
    /// Runs `RUNTIME… start ID`. Answered by [`Reply::Done`] or [`Reply::Error`]. After an error
    /// the container is still there, for a Delete; its first process may have ended, which is an
    /// [`Event::Exited`]. That event never comes before the answer to Start.
    Start { id: String },
    /// Sends a signal to the container's first process, or to every process of the container
    /// (`all`; by `cgroup.kill` when the signal is SIGKILL). Done, too, if there is nothing left
    /// to signal.
    Kill { id: String, signal: i32, all: bool },
    /// Runs `RUNTIME… update --resources - ID` with this JSON (the runtime specification's
    /// LinuxResources).
    Update { id: String, resources: String },
    /// Kills and forgets the container, runs `RUNTIME… delete --force ID` (if that has not been
    /// done at its end already) and removes its exit record. Done if the monitor knows no such
    /// container; waits for a Create that is still under way, and joins a Delete that is. An
    /// error says what could not be removed; the container is then still known, as exited, and
    /// another Delete tries again.
    Delete { id: String },
    /// Runs `RUNTIME… exec` in the container. Descriptors: without `terminal` three, the
    /// process's stdin, stdout and stderr. With `terminal` none, and [`Reply::Started`] carries
    /// the pty's master. Answered by [`Reply::Started`] or [`Reply::Error`], then by
    /// [`Reply::Exited`]. If the client closes first, the process is killed with all that
    /// it started, which is in a cgroup of its own (where the runtime is not [`Create::native`]:
    /// with all that descends from it or is in its session). `process` must have the same `terminal`
    /// as this.
    Exec(Exec),
    /// Follows the container's output from now on. Descriptors: the writing ends of a pipe for
    /// each of stdout and stderr that is wanted, in this order; a terminal's output is all
    /// stdout. What does not fit into a pipe is left out, and a notice in it says so. Answered by
    /// [`Reply::Attached`], which carries a descriptor to write to (the container's stdin, or the
    /// pty's master, whose size can be set, too) if there is one, or [`Reply::Error`]. When
    /// the container has ended comes [`Reply::Ended`], and the connection and the pipes are
    /// closed. If the client closes first it is detached; with `stdin_once` the first one that had
    /// stdin takes it along.
    Attach(Attach),
    /// Ends a container's stdin, which has `stdin_once`, for all. Done, too, if it has none.
    CloseStdin { id: String },
    /// Opens the container's log again at its path, after a rotation. Lines read after the
    /// answer are in the new file.
    ReopenLog { id: String },
    /// Ends the monitor. [`Reply::Error`] while a container runs.
    Shutdown,
}

/// See [`Request::Create`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Create {
    pub id: String,
    /// The directory with config.json. The monitor keeps `exit.json` beside it
    /// ([`ExitRecord`]), and the runtime's log.
    pub bundle: PathBuf,
    /// The runtime's binary and its global options, without `--log`.
    pub runtime: Vec<String>,
    /// The container's cgroup directory, from which the out-of-memory count is read at its end.
    pub cgroup: PathBuf,
    /// The CRI log file; none if the pod has no log directory.
    pub log: Option<PathBuf>,
    pub terminal: bool,
    /// Keep stdin open for attach; else it is /dev/null.
    pub stdin: bool,
    /// Close stdin after the first attached client goes.
    pub stdin_once: bool,
    /// The container's processes are processes of this kernel (rrun, runc, crun), so that a
    /// signal to the pid is a signal to the container, which saves a `RUNTIME… kill`. False for
    /// runtimes that put a kernel of their own between (runsc, kata).
    #[serde(default)]
    pub native: bool,
}

/// See [`Request::Exec`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Exec {
    pub id: String,
    /// The runtime specification's Process object, as JSON.
    pub process: String,
    pub terminal: bool,
}

/// See [`Request::Attach`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attach {
    pub id: String,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// What the monitor answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    Hello(Hello),
    Event(Event),
    Created {
        pid: i32,
    },
    Started {
        pid: i32,
    },
    Attached,
    /// The container that was followed writes no more. Bytes of each stream that were left out at
    /// its end, of which no notice is in the pipe, for that is full.
    Ended {
        stdout: u64,
        stderr: u64,
    },
    /// An exec's end: its status as a shell would give it (128 + the signal's number).
    Exited {
        code: i32,
    },
    Done,
    Error(Failure),
}

/// Why an operation failed: one sentence, fit for an operator.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The monitor knows no such container.
    NotFound,
    /// The container is not in the state that the operation needs.
    WrongState,
    /// The runtime said no; the message is the runtime's.
    Runtime,
    /// The monitor itself failed (a descriptor, a file, a fork).
    Monitor,
}

/// The monitor's state when a client subscribes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// The monitor's process id.
    pub pid: i32,
    /// The process that is in the pod's namespaces (`/proc/PID/ns/{ipc,uts}`, and `user` and `net`
    /// with a user namespace), if that is not the monitor itself.
    #[serde(default)]
    pub holder: Option<i32>,
    /// The first process of the pod's PID namespace, if the pod shares one.
    pub pid1: Option<i32>,
    /// It passes on the pipe of a [`Request::Create`]. Those that an earlier server left do not.
    #[serde(default)]
    pub passes_after: bool,
    pub containers: Vec<ContainerState>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerState {
    pub id: String,
    pub pid: i32,
    pub phase: Phase,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Created,
    Running,
    Exited(ExitRecord),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The container's first process ended. Its log is complete, its record on disk, its cgroup
    /// empty. `RUNTIME… delete` runs after this event, so that nobody waits for it: the empty
    /// cgroup is gone for certain when [`Request::Delete`] has been answered.
    Exited { id: String, exit: ExitRecord },
    /// The kernel killed a process of the container for want of memory (`memory.events`,
    /// `oom_kill`); the container may live on.
    OutOfMemory { id: String },
}

/// How a container ended: `BUNDLE/exit.json`, written to a temporary name, fsynced and renamed
/// before anyone is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// As a shell would give it: 128 + the signal's number for a signal.
    pub code: i32,
    /// The kernel killed a process of the container for want of memory.
    pub oom_killed: bool,
    /// Nanoseconds since the epoch.
    pub finished_at: i64,
}

/// What a client reads in a stream in place of this many bytes of it.
pub fn omission_notice(bytes: u64, newline: &str) -> String {
    format!(
        "{newline}[rrun: {bytes} bytes of output are left out here: this client reads too slowly]{newline}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_older_side_leaves_out_has_a_default() {
        let hello = r#"{"pid":7,"pid1":null,"containers":[]}"#;
        let hello: Hello = serde_json::from_str(hello).unwrap();
        assert_eq!((hello.holder, hello.passes_after), (None, false));

        let create = r#"{"id":"a","bundle":"/b","runtime":["rrun"],"cgroup":"/c","log":null,
            "terminal":false,"stdin":false,"stdin_once":false}"#;
        let create: Create = serde_json::from_str(create).unwrap();
        assert!(!create.native);

        let pod = r#"{"id":"a","hostname":null,"new_ipc":true,"shared_pid":false}"#;
        let pod: Pod = serde_json::from_str(pod).unwrap();
        assert_eq!((pod.users, pod.runtime), (None, None));
    }

    #[test]
    fn what_a_newer_side_adds_is_ignored() {
        let exit = r#"{"code":1,"oom_killed":false,"finished_at":2,"core_dumped":true}"#;
        assert!(serde_json::from_str::<ExitRecord>(exit).is_ok());
    }

    #[test]
    fn the_names_on_the_wire_are_those_of_the_first_version() {
        let json = |request: &Request| serde_json::to_string(request).unwrap();
        assert_eq!(json(&Request::Subscribe), r#""subscribe""#);
        let id = || "a".to_owned();
        assert_eq!(
            json(&Request::CloseStdin { id: id() }),
            r#"{"close_stdin":{"id":"a"}}"#
        );
        let failure = Reply::Error(Failure {
            kind: FailureKind::WrongState,
            message: "no".into(),
        });
        assert_eq!(
            serde_json::to_string(&failure).unwrap(),
            r#"{"error":{"kind":"wrong_state","message":"no"}}"#
        );
        assert_eq!(
            serde_json::to_string(&Reply::Event(Event::OutOfMemory { id: id() })).unwrap(),
            r#"{"event":{"out_of_memory":{"id":"a"}}}"#
        );
        let maps = IdMaps {
            uid_map: "0 1 1\n".into(),
            gid_map: "0 2 1\n".into(),
        };
        let pod = Pod {
            id: id(),
            hostname: None,
            new_ipc: false,
            shared_pid: true,
            users: Some(maps),
            runtime: None,
        };
        assert_eq!(
            serde_json::to_string(&pod).unwrap(),
            r#"{"id":"a","hostname":null,"new_ipc":false,"shared_pid":true,"users":{"uid_map":"0 1 1\n","gid_map":"0 2 1\n"},"runtime":null}"#
        );
    }
}
