use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde_json::Value;

use crate::arguments::{Arguments, switch, value};
use crate::cgroup;
use crate::commands::globals::{Command, Globals, print};
use crate::error::{Context, Error, Result, refuse};
use crate::lifecycle::state::State;

pub(crate) const COMMAND: Command = Command {
    name: "events",
    usage: "[options] <container-id>",
    about: "print a container's resource usage, and an event for each of its processes that the kernel's OOM killer kills",
    flags: &[
        value(
            "interval",
            None,
            "time between two reports of the resource usage, such as 5s or 500ms (default: 5s)",
        ),
        switch("stats", None, "print the resource usage once and exit"),
    ],
    rest_is_foreign: false,
    call: events,
};

fn events(globals: &Globals, arguments: &Arguments) -> Result<u8> {
    let id = arguments.container_id()?;
    let interval = duration(arguments.value("interval").unwrap_or("5s"))?;
    let state = State::load(&globals.root, id)?;
    let Some(process) = state.open_process()? else {
        refuse!("container with id {id} is not running");
    };
    if arguments.is_set("stats") {
        print_event(id, "stats", Some(cgroup::stats(&state.cgroup)?))?;
        return Ok(0);
    }
    // The kernel wakes a process that polls memory.events when the file changes. Without the memory
    // controller, memory.events does not exist.
    let memory = rustix::fs::open(
        state.cgroup.join("memory.events"),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .ok();
    let mut killed = cgroup::oom_kills(&state.cgroup);
    let mut next = Instant::now() + interval;
    loop {
        let left = next.saturating_duration_since(Instant::now());
        let mut watched = vec![PollFd::new(&process, PollFlags::IN)];
        watched.extend(memory.iter().map(|file| PollFd::new(file, PollFlags::PRI)));
        let timeout = Timespec {
            tv_sec: left.as_secs() as _,
            tv_nsec: left.subsec_nanos() as _,
        };
        match poll(&mut watched, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno).doing(|| format!("watch container {id}")),
        }
        let exited = watched
            .first()
            .is_some_and(|process| !process.revents().is_empty());
        // Read memory.events after every poll, because otherwise the next poll returns immediately.
        let now = cgroup::oom_kills(&state.cgroup);
        if let Some(file) = &memory {
            let _ = rustix::io::pread(file, &mut [0u8; 512], 0);
        }
        for _ in killed..now {
            print_event(id, "oom", None)?;
        }
        killed = killed.max(now);
        if exited {
            return Ok(0);
        }
        if Instant::now() >= next {
            // The pidfd does not report the exit if a thread is traced and its tracer has not
            // reaped it.
            if state.open_process()?.is_none() {
                return Ok(0);
            }
            print_event(id, "stats", Some(cgroup::stats(&state.cgroup)?))?;
            next += interval;
        }
    }
}

/// Prints an event as one line.
fn print_event(id: &str, kind: &str, data: Option<Value>) -> Result<()> {
    // The JSON fields are in runc's order, because users grep for the beginning of the line.
    let (kind, id) = (Value::from(kind), Value::from(id));
    let data = data.map_or_else(String::new, |data| format!(",\"data\":{data}"));
    print(&format!("{{\"type\":{kind},\"id\":{id}{data}}}\n"))
}

/// Parses a duration in Go's format, such as `5s`, `1m30s` or `500ms`.
fn duration(text: &str) -> Result<Duration> {
    let wrong = || {
        Error::new(format!(
            "invalid value \"{text}\" for flag -interval: expected a time greater than 0, such as 5s or 500ms"
        ))
    };
    let (mut rest, mut total) = (text, Duration::ZERO);
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(wrong)?;
        let (number, after) = rest.split_at(digits);
        let unit = after
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(unit);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            _ => return Err(wrong()),
        };
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let part = Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())?;
        total = total.checked_add(part).ok_or_else(wrong)?;
        rest = after;
    }
    if total.is_zero() || total > Duration::from_secs(1 << 31) {
        return Err(wrong());
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_parsed_as_in_go() {
        for (text, milliseconds) in [
            ("5s", 5000),
            ("500ms", 500),
            ("1m30s", 90_000),
            ("0.5s", 500),
        ] {
            assert_eq!(
                duration(text).unwrap(),
                Duration::from_millis(milliseconds),
                "{text}"
            );
        }
        for text in ["", "0s", "5", "s", "-5s", "5x", "1s5", "1..5s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
