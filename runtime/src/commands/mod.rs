//! The commands of rrun, such as `create` and `start`. Each command has its own file. A command
//! reads its arguments, calls the module that does the work, and reports the result.

mod create;
mod creation;
mod delete;
mod events;
mod exec;
mod features;
mod globals;
mod kill;
mod list;
mod pause;
mod ps;
mod resume;
mod run;
mod spec;
mod start;
mod state;
mod update;

use globals::{Command, Globals, print};

use std::ffi::{CStr, c_char, c_int};

use crate::arguments::{Arguments, Flag, describe, switch, value};
use crate::error::{Context, Error, Result, refuse};
use crate::lifecycle::state_root::StateRoot;
use crate::log;
use crate::mounts::readonly_exec;
use crate::process::descriptors;
use crate::sys::command_line;
use crate::sys::syscalls::default_signal;

const COMMANDS: [&Command; 15] = [
    &create::COMMAND,
    &start::COMMAND,
    &state::COMMAND,
    &kill::COMMAND,
    &delete::COMMAND,
    &run::COMMAND,
    &exec::COMMAND,
    &ps::COMMAND,
    &list::COMMAND,
    &pause::COMMAND,
    &resume::COMMAND,
    &update::COMMAND,
    &events::COMMAND,
    &spec::COMMAND,
    &features::COMMAND,
];

const GLOBAL_FLAGS: &[Flag] = &[
    value(
        "root",
        None,
        "directory for the states of containers (default: /run/rrun, or $XDG_RUNTIME_DIR/rrun for users other than root)",
    ),
    switch(
        "any-owner",
        None,
        "also act on containers whose directory belongs to another user",
    ),
    value(
        "log",
        None,
        "file to append the log to (default: standard error)",
    ),
    value(
        "log-format",
        None,
        "format of the log, text or json (default: text)",
    ),
    switch("debug", None, "also log debug messages"),
    switch(
        "systemd-cgroup",
        None,
        "let systemd create the cgroups; cgroupsPath must then have the form slice:prefix:name",
    ),
    value(
        "rootless",
        None,
        "true, false or auto (default); ignored, because rrun itself detects the privileges of its user",
    ),
    value(
        "criu",
        None,
        "ignored; accepted for compatibility with runc",
    ),
    switch("help", Some('h'), "show this text"),
    switch("version", Some('v'), "show the version"),
];

const DEFAULT_ROOT: &str = "/run/rrun";

/// runc's exit status for an unknown command.
const NO_SUCH_COMMAND: u8 = 3;

/// Converts the arguments of main to the words of the command line.
///
/// # Safety
/// `words` must point to `count` pointers to strings. Each string must end with NUL, and must be
/// valid and writable until the program exits.
pub unsafe fn words(count: c_int, words: *const *const c_char) -> Vec<&'static CStr> {
    let pointers = (0..usize::try_from(count).unwrap_or(0))
        // SAFETY: the caller guarantees that `words` points to `count` pointers.
        .map(|at| unsafe { *words.add(at) });
    // SAFETY: the caller guarantees that the pointers point to writable strings that end with NUL.
    unsafe { command_line::record(pointers.clone().skip(1)) };
    pointers
        // SAFETY: as above.
        .map(|word| unsafe { CStr::from_ptr(word) })
        .collect()
}

/// Runs the whole program, and returns its exit status.
pub fn main(words: Vec<&'static CStr>) -> u8 {
    match dispatch(words) {
        Ok(code) => code,
        Err(error) => {
            log::fatal(&error.to_string());
            1
        }
    }
}

fn dispatch(words: Vec<&'static CStr>) -> Result<u8> {
    let inherited = keep_out_of_containers(&words)?;
    let mut words = words
        .into_iter()
        .skip(1)
        .map(|word| {
            word.to_str()
                .map(str::to_owned)
                .map_err(|_| Error::new(format!("argument {word:?} is not UTF-8")))
        })
        .collect::<Result<Vec<String>>>()?
        .into_iter();
    let flags = Arguments::read(&mut words, GLOBAL_FLAGS, true)?;
    open_log(&flags)?;
    if flags.is_set("version") {
        print(&version())?;
        return Ok(0);
    }
    let Some((name, rest)) = flags.positional.split_first() else {
        print(&help())?;
        return Ok(0);
    };
    if flags.is_set("help") {
        print(&help())?;
        return Ok(0);
    }
    let (name, is_help) = match (name.as_str(), rest.first()) {
        ("help" | "h", Some(command)) if !command.starts_with('-') => (command, true),
        ("help" | "h", _) => {
            print(&help())?;
            return Ok(0);
        }
        _ => (name, false),
    };
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        // Refuse `checkpoint` and `restore` even with --help: callers run `checkpoint --help` to
        // find out whether the runtime supports checkpoints.
        if name == "checkpoint" || name == "restore" {
            refuse!("{name}: rrun does not support checkpoints of containers");
        }
        log::fatal(&format!("no such command: {name}"));
        return Ok(NO_SUCH_COMMAND);
    };
    if is_help || requests_help(command, rest) {
        print(&command_help(command))?;
        return Ok(0);
    }
    let globals = globals(&flags, inherited)?;
    let arguments = Arguments::read(rest.iter().cloned(), command.flags, command.rest_is_foreign)?;
    (command.call)(&globals, &arguments)
}

/// Prevents containers from reaching rrun's executable and the descriptors that rrun's caller left
/// open. If the command starts a process in a container, this function returns the numbers of these
/// descriptors.
///
/// rrun calls this function first, because this function can execute rrun again. The command line
/// is not parsed yet. If any word is `create`, `run` or `exec`, this function assumes that rrun
/// starts a process in a container. A wrong assumption does no harm.
fn keep_out_of_containers(words: &[&'static CStr]) -> Result<Vec<u32>> {
    readonly_exec::reserve_standard_descriptors()?;
    let enters_container = |word: &&CStr| matches!(word.to_bytes(), b"create" | b"run" | b"exec");
    let inherited = if words.iter().any(enters_container) {
        readonly_exec::protect(words)?;
        descriptors::inherited()?
    } else {
        descriptors::keep_from_hooks()?;
        Vec::new()
    };
    // If rrun's caller ignored SIGCHLD, the kernel would discard the exit statuses of rrun's
    // children.
    default_signal(libc::SIGCHLD).doing(|| "reset SIGCHLD to its default action")?;
    Ok(inherited)
}

fn open_log(flags: &Arguments) -> Result<()> {
    let format = match flags.value("log-format") {
        None | Some("text") => log::LogFormat::Text,
        Some("json") => log::LogFormat::Json,
        Some(other) => refuse!("invalid log-format {other:?}: expected text or json"),
    };
    log::open(flags.value("log"), format, flags.is_set("debug"))
}

fn globals(flags: &Arguments, inherited: Vec<u32>) -> Result<Globals> {
    if let Some(text) = flags.value("rootless")
        && !matches!(text, "true" | "false" | "auto" | "")
    {
        refuse!("invalid value {text:?} for --rootless: expected true, false or auto");
    }
    let root = match flags.value("root") {
        Some(root) => root.to_owned(),
        None => default_root(),
    };
    let root = root.as_str();
    Ok(Globals {
        root: StateRoot::new(
            std::path::absolute(root).doing(|| format!("--root {root}"))?,
            flags.is_set("any-owner"),
        ),
        default_root: flags.value("root").is_none(),
        systemd_cgroup: flags.is_set("systemd-cgroup"),
        inherited,
    })
}

/// Returns the default value of --root, which is the directory for the states of containers. For
/// users other than root, and for root in a user namespace, this directory is in $XDG_RUNTIME_DIR.
fn default_root() -> String {
    let Some(directory) = std::env::var("XDG_RUNTIME_DIR")
        .ok()
        .filter(|directory| directory.starts_with('/'))
    else {
        return DEFAULT_ROOT.to_owned();
    };
    let map = || std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let whole = |map: String| map.split_whitespace().eq(["0", "0", "4294967295"]);
    let root = rustix::process::geteuid().is_root();
    if root && (std::env::var("USER").is_ok_and(|name| name == "root") || whole(map())) {
        return DEFAULT_ROOT.to_owned();
    }
    format!("{directory}/rrun")
}

fn requests_help(command: &Command, rest: &[String]) -> bool {
    let own = if command.rest_is_foreign {
        1
    } else {
        rest.len()
    };
    rest.iter()
        .take(own)
        .take_while(|word| *word != "--")
        .any(|word| word == "--help" || word == "-h")
}

fn version() -> String {
    format!(
        "rrun version {}\nspec: {}\n",
        env!("CARGO_PKG_VERSION"),
        crate::config::spec::OCI_VERSION
    )
}

fn help() -> String {
    let mut text = String::from(
        "NAME:\n   rrun - OCI container runtime\n\nUSAGE:\n   rrun [global options] command [command options] [arguments...]\n\nCOMMANDS:\n",
    );
    for command in COMMANDS {
        text.push_str(&format!("   {:<9} {}\n", command.name, command.about));
    }
    text.push_str("   help, h   show this text, or the help text of the given command\n");
    text.push_str("\nGLOBAL OPTIONS:\n");
    text.push_str(&describe(GLOBAL_FLAGS));
    text
}

fn command_help(command: &Command) -> String {
    let mut text = format!(
        "NAME:\n   rrun {} - {}\n\nUSAGE:\n   rrun {} {}\n",
        command.name, command.about, command.name, command.usage
    );
    if !command.flags.is_empty() {
        text.push_str("\nOPTIONS:\n");
        text.push_str(&describe(command.flags));
    }
    text
}
