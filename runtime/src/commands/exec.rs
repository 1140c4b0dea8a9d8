use std::path::Path;

use crate::arguments::{Arguments, switch, value};
use crate::commands::globals::{
    CONSOLE_SOCKET, Command, Globals, PID_FILE, PIDFD_SOCKET, console_socket, descriptors,
    pidfd_socket,
};
use crate::config::spec::ProcessSpec;
use crate::error::{Error, Result, refuse};
use crate::lifecycle::container_dir::directory;
use crate::lifecycle::exec::{self, ExecRequest};
use crate::lifecycle::foreground::Foreground;
use crate::lifecycle::state::State;
use crate::process::terminal::connect_console;
use crate::process::{Process, capabilities};
use crate::sys::files::read_argument;
use rrun_kernel::id::Named;

pub(crate) const COMMAND: Command = Command {
    name: "exec",
    usage: "[options] <container-id> <program> [arguments...]  or  --process process.json <container-id>",
    about: "execute another program in a running container",
    flags: &[
        CONSOLE_SOCKET,
        PIDFD_SOCKET,
        value("cwd", None, "working directory in the container"),
        value(
            "env",
            Some('e'),
            "environment variable as name=value; can be given several times",
        ),
        switch("tty", Some('t'), "give the program a terminal"),
        value(
            "user",
            Some('u'),
            "user id, optionally followed by a colon and a group id",
        ),
        value(
            "additional-gids",
            Some('g'),
            "additional group id; can be given several times",
        ),
        value(
            "process",
            Some('p'),
            "JSON file that describes the process in the format of the field process of config.json",
        ),
        switch(
            "detach",
            Some('d'),
            "return when the program has started, without waiting for its exit",
        ),
        PID_FILE,
        value("process-label", None, "SELinux label of the program"),
        value("apparmor", None, "AppArmor profile of the program"),
        switch("no-new-privs", None, "set no_new_privs"),
        value(
            "cap",
            Some('c'),
            "capability to add; can be given several times",
        ),
        value(
            "preserve-fds",
            None,
            "number of additional descriptors, from 3 upwards, to pass to the program",
        ),
        value(
            "cgroup",
            None,
            "cgroup for the program, relative to the container's cgroup",
        ),
        switch(
            "ignore-paused",
            None,
            "execute the program even if the container is paused",
        ),
    ],
    rest_is_foreign: true,
    call: exec,
};

fn exec(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let Some((id, words)) = arguments.positional.split_first() else {
        refuse!("the argument for the container id is missing");
    };
    match execute(globals, arguments, id, words) {
        // Like runc, `exec` exits with status 255 if rrun itself fails. If the program fails,
        // `exec` exits with the program's exit status.
        Err(error) => {
            crate::log::fatal(&error.to_string());
            Ok(255)
        }
        ok => ok,
    }
}

fn execute(globals: &Globals, arguments: &Arguments, id: &str, words: &[String]) -> Result<u8> {
    let descriptors = descriptors(globals, arguments)?;
    let state = State::load(&globals.root, id)?;
    // While rrun creates the container, its first process can still be in the host's root.
    if state.is_being_created(&directory(&globals.root, id)?)? {
        refuse!("cannot exec in container {id}: the container is still being created");
    }
    let Some(init) = state.open_namespaces()? else {
        refuse!("cannot exec in a stopped container");
    };
    if crate::cgroup::is_frozen(&state.cgroup)? && !arguments.is_set("ignore-paused") {
        refuse!("cannot exec in a paused container (use --ignore-paused to override)");
    }
    let process = process(arguments, words, &state)?;
    let detach = arguments.is_set("detach");
    let console_socket = match (process.terminal, detach, console_socket(arguments)) {
        (true, _, Some(path)) => Some(connect_console(path)?),
        (true, true, None) => {
            refuse!(
                "--tty or process.terminal with --detach needs --console-socket, the socket that receives the terminal"
            )
        }
        (false, _, Some(_)) => refuse!(
            "--console-socket cannot be used, because neither --tty nor process.terminal requests a terminal"
        ),
        (_, _, None) => None,
    };
    let mut foreground = if detach {
        None
    } else {
        Some(Foreground::start()?)
    };
    let exec_process = exec::exec(ExecRequest {
        state: &state,
        init,
        process,
        // runc's format is `[<controller>:]<path>`. In cgroup v1, a process can have a different
        // cgroup for each controller. In cgroup v2, a process has only one cgroup. So rrun accepts
        // no controller in the value of --cgroup, and only removes a leading colon.
        sub_cgroup: arguments
            .value("cgroup")
            .map(|text| text.strip_prefix(':').unwrap_or(text)),
        foreground: foreground.as_mut(),
        console_socket,
        pidfd_socket: pidfd_socket(arguments)?,
        pid_file: arguments.value("pid-file").map(Path::new),
        descriptors,
    })?;
    let (pid, pidfd) = (exec_process.pid, &exec_process.pidfd);
    match (foreground, exec_process.terminal) {
        (None, _) => Ok(0),
        (Some(foreground), Some(master)) => foreground.relay(pid, pidfd, master),
        (Some(foreground), None) => foreground.wait(pid, pidfd),
    }
}

fn process(arguments: &Arguments, words: &[String], state: &State) -> Result<Process> {
    let mut spec = match arguments.value("process") {
        Some(path) => {
            let bytes = read_argument(Path::new(path))?;
            serde_json::from_slice::<ProcessSpec>(&bytes)
                .map_err(|error| Error::new(format!("parse {path}: {error}")))?
        }
        None => from_flags(arguments, words, &state.process)?,
    };
    inherit_unset(&mut spec, &state.process);
    let mut process = Process::from_spec(&spec)?;
    process.inherit(state.personality.as_ref(), state.memory_policy.as_ref())?;
    let added = capabilities::mask(arguments.values("cap"));
    process.capabilities.add(added);
    Ok(process)
}

/// Fills the unset fields of `spec` with the values of `own`. `spec` describes the process that
/// `exec` creates, and `own` describes the container's first process.
fn inherit_unset(spec: &mut ProcessSpec, own: &ProcessSpec) {
    fn inherit<T: Clone>(field: &mut Option<T>, own: &Option<T>) {
        if field.is_none() {
            field.clone_from(own);
        }
    }
    inherit(&mut spec.capabilities, &own.capabilities);
    inherit(&mut spec.apparmor_profile, &own.apparmor_profile);
    inherit(&mut spec.selinux_label, &own.selinux_label);
    inherit(&mut spec.rlimits, &own.rlimits);
    inherit(&mut spec.oom_score_adj, &own.oom_score_adj);
    inherit(&mut spec.io_priority, &own.io_priority);
    inherit(&mut spec.scheduler, &own.scheduler);
    inherit(&mut spec.exec_cpu_affinity, &own.exec_cpu_affinity);
}

/// Returns a copy of `own` with the changes that the flags specify. `own` describes the container's
/// first process.
fn from_flags(arguments: &Arguments, words: &[String], own: &ProcessSpec) -> Result<ProcessSpec> {
    if words.is_empty() {
        refuse!("exec needs either a program to execute or --process");
    }
    let mut spec = own.clone();
    spec.args = Some(words.to_vec());
    spec.terminal = arguments.is_set("tty");
    if let Some(cwd) = arguments.value("cwd") {
        spec.cwd = cwd.into();
    }
    let named = |flag: &str| arguments.value(flag).filter(|name| !name.is_empty());
    if let Some(profile) = named("apparmor") {
        spec.apparmor_profile = Some(profile.to_owned());
    }
    if let Some(label) = named("process-label") {
        spec.selinux_label = Some(label.to_owned());
    }
    spec.env
        .get_or_insert_default()
        .extend(arguments.values("env").map(str::to_owned));
    if arguments.is_set("no-new-privs") {
        spec.no_new_privileges = true;
    }
    let id = |text: &str| match Named::parse(text) {
        Named::Id(id) => Ok(id),
        Named::Name | Named::Invalid => {
            Err(Error::new(format!("{text} is not a user or group id")))
        }
    };
    let user = &mut spec.user;
    if let Some(text) = arguments.value("user") {
        let (uid, gid) = text
            .split_once(':')
            .map_or((text, None), |(u, g)| (u, Some(g)));
        user.uid = id(uid)?;
        if let Some(gid) = gid {
            user.gid = id(gid)?;
        }
    }
    let groups = arguments
        .values("additional-gids")
        .map(id)
        .collect::<Result<Vec<u32>>>()?;
    if !groups.is_empty() {
        user.additional_gids.get_or_insert_default().extend(groups);
    }
    Ok(spec)
}
