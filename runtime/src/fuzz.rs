//! Fuzz targets for what a bundle, a root file system and systemd's D-Bus contain. `tests/fuzz` runs
//! them.

use crate::cgroup;
use crate::config::{Config, spec};
use crate::lifecycle::state::State;
use crate::process::Process;
use crate::process::environment::{complete, from_spec, home_in_passwd};
use crate::seccomp;

/// The name and the function of a fuzz target.
pub type FuzzTarget = (&'static str, fn(&[u8]));

/// The fuzz targets in this crate.
pub const TARGETS: &[FuzzTarget] = &[
    ("bundle", bundle),
    ("dbus", cgroup::fuzz_dbus_message),
    ("environment", environment),
    ("passwd", passwd),
    ("process", process),
    ("runtime-state", state),
    ("seccomp", seccomp::fuzz::profile),
];

/// Checks that an error has a message, and that the message is not as long as a large input.
pub(crate) fn assert_sentence(error: &impl std::fmt::Display) {
    let length = error.to_string().len();
    assert!((5..100_000).contains(&length), "{length} bytes: {error}");
}

/// Parses and checks a config.json that the CRI server wrote.
pub fn bundle_of_server(input: &[u8]) {
    serde_json::from_slice::<spec::Spec>(input).unwrap();
    bundle(input);
}

/// Parses and checks config.json. The root file system of the bundle is the directory `rootfs`.
fn bundle(input: &[u8]) {
    let directory = std::env::temp_dir().join("rrun-fuzz-bundle");
    let _ = std::fs::create_dir_all(directory.join("rootfs"));
    let Ok(spec) = serde_json::from_slice::<spec::Spec>(input) else {
        return;
    };
    match Config::from_spec(directory.clone(), spec) {
        Ok(config) => assert_eq!(config.rootfs, directory.join("rootfs")),
        Err(error) => assert_sentence(&error),
    }
}

/// Parses and checks the process of `exec --process`.
fn process(input: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<spec::ProcessSpec>(input) else {
        return;
    };
    if let Err(error) = Process::from_spec(&spec) {
        assert_sentence(&error);
    }
}

/// Completes an environment, in which each line of `input` is one entry. Each variable occurs only
/// once in the result.
fn environment(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let entries: Vec<String> = text.lines().map(str::to_owned).collect();
    match from_spec(&entries) {
        Ok(mut env) => {
            complete(&mut env, u32::MAX - 7, 1);
            let mut names: Vec<&[u8]> = env
                .iter()
                .filter_map(|entry| entry.to_bytes().split(|byte| *byte == b'=').next())
                .collect();
            let all = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), all);
        }
        Err(error) => assert_sentence(&error),
    }
}

/// Looks up home directories in /etc/passwd. A home directory must not add a line to the
/// environment.
fn passwd(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    for uid in [0, 1, 1000, u32::MAX] {
        if let Some(home) = home_in_passwd(&text, uid) {
            assert!(!home.is_empty() && !home.contains(['\n', '\0', ':']));
        }
    }
}

/// Parses state.json.
fn state(input: &[u8]) {
    let _ = serde_json::from_slice::<State>(input);
}
