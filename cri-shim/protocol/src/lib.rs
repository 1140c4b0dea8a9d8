//! The private protocol between the CRI server and a pod's monitor.
//!
//! The transport is a unix stream socket, `STATE/pods/POD/monitor.sock`. Each message begins with
//! the length of its JSON in bytes, as a little-endian `u32`. The JSON follows, and is at most 4
//! MiB long. Descriptors are sent as `SCM_RIGHTS` together with the message's first byte. Each
//! operation uses its own connection, because connections are cheap. The client sends one
//! [`Request`] on the connection. The monitor sends one [`Reply`], or several for some requests,
//! and then closes the connection. The monitor also closes the connection after an invalid message,
//! or if the client does not read the replies.
//!
//! The CRI server can die at any time, even in the middle of a message. The monitor completes each
//! operation that it has begun, even if the connection closes. The only exception is an exec: when
//! the connection closes, the monitor kills the exec's process.
//! [`wire`] sends and receives the messages on a socket. The CRI server and the monitor can have
//! different versions. README.md describes the compatibility of different versions, and how to add
//! a field to a message.

pub mod wire;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The name of the monitor's socket in a pod's directory.
pub const SOCKET_NAME: &str = "monitor.sock";
/// The name of the monitor's configuration file in a pod's directory.
pub const CONFIGURATION_NAME: &str = "monitor.json";

/// The name of the monitor's own log in a pod's directory.
pub const LOG_NAME: &str = "monitor.log";

/// The descriptor number of the listening socket that the monitor inherits from the CRI server. The
/// CRI server binds the socket. Clients can therefore connect before the monitor has finished its
/// initialisation.
pub const LISTEN_FD: i32 = 3;

/// The configuration of a monitor. The CRI server writes the configuration to
/// `STATE/pods/POD/monitor.json` and then starts the monitor.
///
/// The CRI server starts the monitor as `rrun-monitor --dir STATE/pods/POD`. The monitor keeps the
/// namespaces alive that the pod's containers share. Either the monitor itself is in these
/// namespaces, or it keeps a child process in them. Other processes join the namespaces through
/// `/proc/PID/ns/…` of the monitor or of this child.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pod {
    /// The sandbox's id.
    pub id: String,
    /// The host name for a new UTS namespace. `None` means the node's UTS namespace.
    pub hostname: Option<String>,
    /// True if the pod gets a new IPC namespace. False if the pod uses the node's IPC namespace.
    pub new_ipc: bool,
    /// True if all containers of the pod share one PID namespace. The monitor then runs the first
    /// process of this namespace, which only reaps other processes ([`Hello::pid1`]).
    pub shared_pid: bool,
    /// The id maps of a new user namespace. With a user namespace, the monitor does not enter any
    /// of the pod's namespaces. Instead of the monitor, an idle process ([`Hello::holder`]) keeps
    /// these namespaces alive, including a new network namespace.
    #[serde(default)]
    pub users: Option<IdMaps>,
    /// The runtime binary that will probably create the pod's containers. The monitor prepares a
    /// read-only overlay of this binary in advance.
    #[serde(default)]
    pub runtime: Option<PathBuf>,
    /// The settings of the pod's pause process. `None` if the server is older than this field. The
    /// pause process then stays in the monitor's cgroup.
    #[serde(default)]
    pub pause: Option<Pause>,
}

/// The settings of a pod's pause process. The pause process is the process that the monitor starts
/// for [`Pod::shared_pid`] or [`Pod::users`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// The directory of the cgroup in which the monitor creates the pause process.
    pub cgroup: PathBuf,
    pub oom_score_adj: i64,
}

/// The id maps of a pod's user namespace in the kernel's format. Each line describes a range of ids
/// by three numbers: the first id inside the namespace, the first id outside the namespace, and the
/// number of ids (user_namespaces(7)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMaps {
    pub uid_map: String,
    pub gid_map: String,
}

/// A request that a client sends to the monitor.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Subscribes to events. The monitor first sends a [`Reply::Hello`], which contains the
    /// monitor's current state. The monitor then sends a [`Reply::Event`] for each later change,
    /// until the client or the monitor closes the connection. The socket buffers the events until
    /// the client reads them. The monitor closes the connection when the pod's pause process exits.
    /// The client then subscribes again, and the new Hello no longer contains the pause process.
    Subscribe,
    /// Runs `RUNTIME… create`. The container's stdio is connected to pipes or to a terminal, which
    /// the monitor owns. If the bundle may still be incomplete, the request carries the reading end
    /// of a pipe as a descriptor. The monitor passes this pipe to the runtime as `--after`. The
    /// runtime reads the bundle only after the client has written to the pipe. The reply is
    /// [`Reply::Created`] or [`Reply::Error`]. After an error, neither the monitor nor the runtime
    /// keeps any state of the container.
    Create(Create),
    /// Runs `RUNTIME… start ID`. The reply is [`Reply::Done`] or [`Reply::Error`]. After an error,
    /// the container still exists, and the client must send a Delete. If the container's first
    /// process has already exited, the monitor reports the exit as an [`Event::Exited`]. The
    /// monitor never sends this event before the reply to Start.
    Start { id: String },
    /// Sends a signal to the container's first process or, with `all`, to every process of the
    /// container. To send SIGKILL to all processes, the monitor writes to `cgroup.kill`. The reply
    /// is [`Reply::Done`] even if the container has no process any more.
    Kill { id: String, signal: i32, all: bool },
    /// Runs `RUNTIME… update --resources - ID` and writes `resources` to the runtime's stdin.
    /// `resources` is a LinuxResources object of the OCI runtime specification, as JSON.
    Update { id: String, resources: String },
    /// Kills the container, runs `RUNTIME… delete --force ID`, and removes the exit record and the
    /// container's state in the monitor. The monitor does not run the command again if the command
    /// already succeeded after the container's exit. The reply is also [`Reply::Done`] if the
    /// monitor has no container with this id. If a Create of the container is in progress, the
    /// Delete waits until the Create has finished. If another Delete of the container is in
    /// progress, both requests get the same reply. An error message names the objects that could
    /// not be removed. After an error, the container remains in the state Exited, and the next
    /// Delete tries the removal again.
    Delete { id: String },
    /// Runs `RUNTIME… exec` in the container. Without `terminal`, the request carries three
    /// descriptors: the stdin, stdout and stderr of the process. If a descriptor is a socket, the
    /// monitor creates a pipe for the process, and transfers the data between the pipe and the socket.
    /// The monitor sends [`Reply::Exited`] after the output that the process wrote. With `terminal`,
    /// the request carries one socket, and the monitor transfers the data between the pty's master
    /// and this socket in both directions. A client of an earlier version sends no descriptor, and
    /// [`Reply::Started`] then carries the master. The reply is
    /// [`Reply::Started`] or [`Reply::Error`]. When the process exits, the monitor also sends
    /// [`Reply::Exited`]. If the client closes the connection earlier, the monitor kills the
    /// process and all processes that the process has started. With [`Create::native`], the monitor
    /// kills all processes in the separate cgroup of the process. Without [`Create::native`], the
    /// monitor kills the descendants of the process, and all processes in the session of the
    /// process. The Process object [`Exec::process`] also has a field `terminal`, which must have
    /// the same value as the `terminal` in this request.
    Exec(Exec),
    /// Attaches the client to the container's stdio. For each requested output stream, the request
    /// carries the writing end of a pipe. The pipe for stdout precedes the pipe for stderr. The
    /// monitor writes all later output of the container to these pipes. All output of a terminal
    /// counts as stdout. The monitor omits output that does not fit into a pipe, and writes a
    /// notice into the pipe instead. The reply is [`Reply::Attached`] or [`Reply::Error`].
    /// [`Reply::Attached`] can carry a socket. The monitor transfers the data from this socket to the
    /// container's stdin or terminal. The monitor sends this socket if the request has `stdin`, stdin
    /// is open, and the client is allowed to write to stdin. Earlier versions of the monitor send the
    /// pipe or the pty's master itself. Without [`Attach::relays_terminal`], the monitor sends the
    /// master of a container with a terminal, even if the request does not have `stdin`. When the
    /// container has exited, the monitor sends [`Reply::Ended`] and closes the connection and the
    /// pipes. To detach earlier, the client closes the connection. If the container has
    /// `stdin_once`, only the first client with `stdin` is allowed to write to stdin. When this
    /// client detaches, the monitor closes the container's stdin.
    Attach(Attach),
    /// Sets the size of a terminal. The kernel then sends SIGWINCH to the processes in the foreground
    /// of the terminal. `exec` is the pid of an exec's first process; `None` means the container's
    /// first process. The reply is [`Reply::Done`] or [`Reply::Error`].
    Resize {
        id: String,
        exec: Option<i32>,
        columns: u16,
        rows: u16,
    },
    /// Closes the container's stdin for all clients, if the container has `stdin_once`. The reply
    /// is [`Reply::Done`] even if the container has no stdin.
    CloseStdin { id: String },
    /// Opens the container's log again at its path, after a log rotation. After the reply, the
    /// monitor writes all further lines to the new file.
    ReopenLog { id: String },
    /// Shuts down the monitor. If a container is running, the reply is [`Reply::Error`] and the
    /// monitor does not exit.
    Shutdown,
}

/// The arguments of [`Request::Create`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Create {
    pub id: String,
    /// The container's bundle, which contains config.json. The monitor also writes `exit.json`
    /// ([`ExitRecord`]) to this directory.
    pub bundle: PathBuf,
    /// The path of the runtime's binary, followed by its global options. The monitor adds `--log`.
    pub runtime: Vec<String>,
    /// The container's cgroup directory, in which the monitor reads the out-of-memory counter.
    pub cgroup: PathBuf,
    /// The path of the CRI log file. `None` if the pod has no log directory.
    pub log: Option<PathBuf>,
    pub terminal: bool,
    /// True if clients can attach to the container's stdin. False if the container's stdin is
    /// /dev/null.
    pub stdin: bool,
    /// True if the monitor closes the container's stdin when the first client with `stdin`
    /// disconnects.
    pub stdin_once: bool,
    /// True if the container's processes are processes of the node's kernel, as with rrun, runc and
    /// crun. The monitor can then send a signal directly to a pid, without running `RUNTIME… kill`.
    /// False for runtimes that run a separate kernel between the node's kernel and the container,
    /// such as runsc and kata.
    #[serde(default)]
    pub native: bool,
    /// The ids of the processes other than the monitor whose namespaces (`/proc/PID/ns/…`) the
    /// container enters. Each of them must be the pod's pause process or the first process of a
    /// container. If one of these processes exits before the runtime has created the container, the
    /// kernel can give its id to another process. The reply is then [`Reply::Error`].
    #[serde(default)]
    pub namespaces_of: Vec<i32>,
}

/// The arguments of [`Request::Exec`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Exec {
    pub id: String,
    /// A Process object of the OCI runtime specification, as JSON.
    pub process: String,
    pub terminal: bool,
}

/// The arguments of [`Request::Attach`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attach {
    pub id: String,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    /// True if the client supports a socket in place of the terminal's master.
    #[serde(default)]
    pub relays_terminal: bool,
}

/// A message that the monitor sends to a client: a reply to a request, or an event.
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
    /// The container to which the client is attached writes no more output. `stdout` and `stderr`
    /// are the numbers of bytes that the monitor omitted at the end of these two streams. The
    /// streams' pipes contain no notice about these bytes, because the pipes were full.
    Ended {
        stdout: u64,
        stderr: u64,
    },
    /// The process that [`Request::Exec`] started has exited. `code` is the exit status as a shell
    /// reports it. If signal N killed the process, `code` is 128 + N.
    Exited {
        code: i32,
    },
    Done,
    Error(Failure),
}

/// The reason why an operation failed, as one sentence for the operator.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The monitor has no container with this id.
    NotFound,
    /// The container is not in the state that the operation requires.
    WrongState,
    /// The runtime reported an error. The failure's message is the runtime's error message.
    Runtime,
    /// The monitor itself failed, for example because it could not open a file or fork.
    Monitor,
}

/// The state of the monitor at the moment when a client subscribes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// The monitor's process id.
    pub pid: i32,
    /// The id of a process in the pod's namespaces. In `/proc/PID/ns` of this process, `ipc` and
    /// `uts` are the pod's namespaces. If the pod has a user namespace, `user` and `net` are the
    /// pod's namespaces, too. `None` if the monitor itself is in the pod's namespaces, or if the
    /// process has exited.
    #[serde(default)]
    pub holder: Option<i32>,
    /// The id of the first process in the pod's PID namespace. `None` if the pod's containers do
    /// not share a PID namespace, or if the process has exited.
    pub pid1: Option<i32>,
    /// True if the monitor can pass the pipe of a [`Request::Create`] to the runtime. Monitors of
    /// earlier versions cannot pass the pipe.
    #[serde(default)]
    pub passes_after: bool,
    /// True if the monitor transfers the streams of an exec between the sockets of a [`Request::Exec`]
    /// and pipes. Monitors of earlier versions pass the sockets to the process.
    #[serde(default)]
    pub relays: bool,
    /// True if the monitor supports [`Request::Resize`], and the socket of a [`Request::Exec`] with a
    /// terminal. Monitors of earlier versions pass the terminal's master to the client.
    #[serde(default)]
    pub relays_terminals: bool,
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
    /// The container's first process has exited. The container's log is complete, its exit record
    /// is on disk and its cgroup is empty. The monitor runs `RUNTIME… delete` only after this
    /// event. Clients therefore do not have to wait for the runtime. The empty cgroup can still
    /// exist until the monitor replies to [`Request::Delete`].
    Exited { id: String, exit: ExitRecord },
    /// The kernel killed a process of the container because memory ran out (`oom_kill` in
    /// `memory.events`). Other processes of the container may still be running.
    OutOfMemory { id: String },
}

/// The record of a container's exit, `BUNDLE/exit.json`. The monitor writes the record to a
/// temporary file, calls fsync and renames the file before it reports the exit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The exit status as a shell reports it: 128 + N if the process was killed by signal N.
    pub code: i32,
    /// True if the kernel killed a process of the container because memory ran out.
    pub oom_killed: bool,
    /// The time of the exit in nanoseconds since 1970.
    pub finished_at: i64,
}

/// Returns the notice that an attached client receives in place of `bytes` bytes of output.
pub fn omission_notice(bytes: u64, newline: &str) -> String {
    format!(
        "{newline}[rrun: {bytes} bytes of output are left out here: this client reads too slowly]{newline}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_an_older_program_omits_has_a_default() {
        let hello = r#"{"pid":7,"pid1":null,"containers":[]}"#;
        let hello: Hello = serde_json::from_str(hello).unwrap();
        assert_eq!((hello.holder, hello.passes_after), (None, false));
        assert!(!hello.relays && !hello.relays_terminals);

        let attach = r#"{"id":"a","stdin":true,"stdout":true,"stderr":false}"#;
        let attach: Attach = serde_json::from_str(attach).unwrap();
        assert!(!attach.relays_terminal);

        let create = r#"{"id":"a","bundle":"/b","runtime":["rrun"],"cgroup":"/c","log":null,
            "terminal":false,"stdin":false,"stdin_once":false}"#;
        let create: Create = serde_json::from_str(create).unwrap();
        assert!(!create.native && create.namespaces_of.is_empty());

        let pod = r#"{"id":"a","hostname":null,"new_ipc":true,"shared_pid":false}"#;
        let pod: Pod = serde_json::from_str(pod).unwrap();
        assert_eq!((pod.users, pod.runtime, pod.pause), (None, None, None));
    }

    #[test]
    fn a_field_that_a_newer_program_adds_is_ignored() {
        let exit = r#"{"code":1,"oom_killed":false,"finished_at":2,"core_dumped":true}"#;
        assert!(serde_json::from_str::<ExitRecord>(exit).is_ok());
    }

    #[test]
    fn the_names_in_the_json_equal_those_of_the_first_version() {
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
            pause: Some(Pause {
                cgroup: "/c".into(),
                oom_score_adj: -998,
            }),
        };
        assert_eq!(
            serde_json::to_string(&pod).unwrap(),
            r#"{"id":"a","hostname":null,"new_ipc":false,"shared_pid":true,"users":{"uid_map":"0 1 1\n","gid_map":"0 2 1\n"},"runtime":null,"pause":{"cgroup":"/c","oom_score_adj":-998}}"#
        );
    }
}
