//! Tests with a state that another user can change. The runtime must not act on such a state with the
//! rights of its caller.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, Run, command, only_looked_up, strace_opens, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        root_does_not_act_on_a_container_that_another_user_can_change,
        Need::Rrun
    ),
    test!(
        root_does_not_use_states_that_a_user_mounted,
        Need::Rrun,
        USERS_OVERLAY
    ),
    test!(
        root_does_not_use_a_path_that_another_user_can_change,
        Need::Rrun
    ),
    test!(
        a_user_can_use_the_directories_of_the_users_group,
        Need::Rrun
    ),
    test!(
        a_state_is_opened_only_if_it_is_a_regular_file,
        Need::Rrun,
        Need::Program("strace")
    ),
    test!(
        a_state_with_the_id_or_the_cgroup_of_something_else_is_refused,
        Need::Rrun
    ),
];

const USER: u32 = 1000;

/// The kernel permits overlays in user namespaces since version 5.11.
const USERS_OVERLAY: Need = Need::Works(
    "overlays in the user namespaces of unprivileged users",
    "setpriv --reuid 1000 --regid 1000 --clear-groups unshare --user --map-root-user --mount \
     mount -t overlay -o lowerdir=/usr:/etc overlay /mnt",
);

fn directory(bundle: &Bundle) -> PathBuf {
    bundle.root().join(bundle.id())
}

/// Replaces the field `field` of the container's state.
fn forge(bundle: &Bundle, field: &str, value: Value) -> Result {
    let path = directory(bundle).join("state.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path)?)?;
    state[field] = value;
    Ok(fs::write(&path, state.to_string())?)
}

/// The commands that act on a container, with their arguments before and after the container's id.
const ACTIONS: [(&[&str], &[&str]); 11] = [
    (&["start"], &[]),
    (&["exec"], &["/bin/inside", "exit", "0"]),
    (&["ps"], &[]),
    (&["events", "--stats"], &[]),
    (&["pause"], &[]),
    (&["resume"], &[]),
    (&["update", "--memory-swap", "100000000"], &[]),
    (&["kill"], &["KILL"]),
    (&["kill", "--all"], &["KILL"]),
    (&["delete"], &[]),
    (&["delete", "--force"], &[]),
];

fn fail(bundle: &Bundle, actions: &[(&[&str], &[&str])], why: &str) -> Result {
    for (before, after) in actions {
        let words = [*before, &[bundle.id()], *after].concat();
        bundle.runtime(&words).end()?.fails_with(why)?;
    }
    Ok(())
}

fn root_does_not_act_on_a_container_that_another_user_can_change() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let proof = bundle.join("proof");
    let hook =
        json!({ "path": "/bin/sh", "args": ["sh", "-c", format!("touch {}", proof.display())] });
    forge(&bundle, "hooks", json!({ "poststop": [hook] }))?;
    let path = directory(&bundle);
    let root = bundle.root();
    let state = path.join("state.json");
    // The owners and modes of the --root directory, of the container's directory and of its state.
    let safe = [(0, 0o700), (0, 0o700), (0, 0o600)];
    let give = |attributes: [(u32, u32); 3]| -> Result {
        for (path, (user, mode)) in [&root, &path, &state].into_iter().zip(attributes) {
            chown(path, Some(user), Some(user))?;
            fs::set_permissions(path, Permissions::from_mode(mode))?;
        }
        Ok(())
    };
    let unsafe_modes = [
        (0, (USER, 0o700)),
        (0, (0, 0o770)),
        (0, (0, 0o702)),
        (1, (USER, 0o700)),
        (1, (0, 0o770)),
        (1, (0, 0o702)),
        (2, (USER, 0o600)),
        (2, (0, 0o660)),
        (2, (0, 0o602)),
    ];
    for (index, wrong) in unsafe_modes {
        let mut attributes = safe;
        attributes[index] = wrong;
        give(attributes)?;
        // `delete --force` does not need the state.
        let actions = if index == 2 {
            &ACTIONS[..10]
        } else {
            &ACTIONS[..]
        };
        fail(&bundle, actions, "--any-owner")?;
        // These commands only print the state.
        bundle.runtime(&["list"]).ok()?.says(bundle.id())?;
        ensure_eq!(bundle.status()?, "running", "the status of the container");
    }
    give([(USER, 0o700), (USER, 0o700), (USER, 0o600)])?;
    ensure!(!proof.exists(), "the hook of the other user ran as root");
    bundle
        .runtime(&["--any-owner", "delete", "--force", bundle.id()])
        .ok()?;
    ensure!(!path.exists(), "the container was not deleted");
    Ok(())
}

fn as_user(words: &[&str]) -> Run {
    let user = USER.to_string();
    let setpriv = ["--reuid", &user, "--regid", &user, "--clear-groups"];
    command("setpriv", setpriv).args(words)
}

/// In an overlay of /usr and a directory of the user, the directory `lib` belongs to root, but the
/// files in it are the user's.
fn root_does_not_use_states_that_a_user_mounted() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let proof = bundle.join("proof");
    let hook =
        json!({ "path": "/bin/sh", "args": ["sh", "-c", format!("touch {}", proof.display())] });
    forge(
        &bundle,
        "hooks",
        json!({ "poststart": [hook], "poststop": [hook] }),
    )?;
    forge(&bundle, "id", json!("lib"))?;
    let home = bundle.join("home");
    for path in ["", "low", "low/lib", "merged"] {
        let path = home.join(path);
        fs::create_dir(&path)?;
        chown(path, Some(USER), Some(USER))?;
    }
    let forged = home.join("low/lib/state.json");
    fs::copy(directory(&bundle).join("state.json"), &forged)?;
    fs::set_permissions(&forged, Permissions::from_mode(0o644))?;
    chown(&forged, Some(USER), Some(USER))?;
    let script = "mount -t overlay -o lowerdir=/usr:$0/low overlay $0/merged && \
                  ln -s /proc/$$/root$0/merged $0/state && exec sleep 600";
    let text = home.display().to_string();
    let unshare = ["unshare", "--user", "--map-root-user", "--mount"];
    let words = [&unshare[..], &["sh", "-c", script, &text]].concat();
    let mut holder = as_user(&words).start()?;
    let link = home.join("state");
    wait_for("the user to mount the overlay", || {
        ensure!(holder.lives(), "{}", holder.stderr());
        Ok(fs::read_link(&link).ok())
    })?;
    ensure_eq!(
        (
            fs::metadata(link.join("lib"))?.uid(),
            fs::metadata(link.join("lib/state.json"))?.uid()
        ),
        (0, USER),
        "the owners of the directory and of the state in the overlay"
    );
    let below_proc = fs::read_link(&link)?;
    let above = home.join("low/../merged/../state");
    let linked = bundle.join("linked");
    symlink(&below_proc, &linked)?;
    for root in [&link, &below_proc, &above, &linked] {
        for (before, after) in ACTIONS {
            let words = [before, &["lib"], after].concat();
            let run = command(&runtime_program(), ["--root"])
                .arg(root)
                .args(&words);
            run.end()?.fails_with("--any-owner")?;
        }
        // A new container would be in the user's directory, too.
        let create = command(&runtime_program(), ["--root"])
            .arg(root)
            .dir(bundle.path());
        create
            .args(["create", "new"])
            .end()?
            .fails_with("--any-owner")?;
    }
    ensure!(!proof.exists(), "the hook of the other user ran as root");
    forge(&bundle, "id", json!(bundle.id()))?;
    forge(&bundle, "hooks", json!({}))?;
    ensure_eq!(bundle.status()?, "running", "the status of the container");
    holder.signal(nix::sys::signal::Signal::SIGKILL);
    holder.end()?;
    bundle.end()?;
    Ok(())
}

fn root_does_not_use_a_path_that_another_user_can_change() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let base = bundle.path();
    let make = |name: &str, user: u32, mode: u32| -> Result {
        let path = base.join(name);
        fs::create_dir_all(&path)?;
        chown(&path, Some(user), Some(user))?;
        Ok(fs::set_permissions(&path, Permissions::from_mode(mode))?)
    };
    for (name, user, mode) in [
        ("own", 0, 0o755),
        ("users", USER, 0o755),
        ("users/root's", 0, 0o700),
        ("group's", 0, 0o775),
        ("group's/root's", 0, 0o700),
        ("all", 0, 0o777),
        ("sticky", 0, 0o1777),
        ("sticky/root's", 0, 0o700),
        ("sticky/users", USER, 0o700),
        ("group's sticky", 0, 0o1775),
    ] {
        make(name, user, mode)?;
    }
    let link = |name: &str, target: &str, user: u32| -> Result {
        symlink(target, base.join(name))?;
        Ok(std::os::unix::fs::lchown(
            base.join(name),
            Some(user),
            Some(user),
        )?)
    };
    link("link", "own", 0)?;
    link("sticky/link", "../own", 0)?;
    link("sticky/user's link", "../own", USER)?;
    link("link to user", "users/../users/root's", 0)?;
    link("loop", "loop", 0)?;
    let call = |name: &str| {
        let run = command(&runtime_program(), ["--root"]).arg(base.join(name));
        run.args(["kill", "missing", "KILL"]).end()
    };
    for name in [
        "own",
        "own/new/newer",
        "link",
        "link/../own/./new",
        "sticky/root's",
        "sticky/link",
        "group's sticky/new",
        "sticky/new",
    ] {
        call(name)?.fails_with("container does not exist: missing")?;
    }
    for name in [
        "users",
        "users/root's",
        "users/new",
        "group's",
        "group's/root's",
        "all",
        "all/new",
        "sticky/users",
        "sticky/user's link",
        "link to user",
        "loop",
    ] {
        call(name)?.fails_with("--any-owner")?;
    }
    let run = command(&runtime_program(), ["--any-owner", "--root"]).arg(base.join("users/root's"));
    let output = run.args(["kill", "missing", "KILL"]).end()?;
    output.fails_with("container does not exist: missing")
}

/// With the umask 002, the group of a user can write to the user's directories.
fn a_user_can_use_the_directories_of_the_users_group() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let home = bundle.join("home");
    fs::create_dir(&home)?;
    fs::set_permissions(&home, Permissions::from_mode(0o775))?;
    let program = runtime_program();
    let root = home.display().to_string();
    let words = [&program, "--root", &root, "kill", "missing", "KILL"];
    let in_namespace = [&["unshare", "--user", "--map-root-user"][..], &words].concat();
    for words in [&words[..], &in_namespace] {
        chown(&home, Some(USER), Some(USER))?;
        let output = as_user(words).end()?;
        output.fails_with("container does not exist: missing")?;
    }
    chown(&home, Some(USER), Some(USER + 1))?;
    as_user(&words).end()?.fails_with("--any-owner")
}

/// Opening a device calls its driver. Opening a FIFO can block.
fn a_state_is_opened_only_if_it_is_a_regular_file() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let path = directory(&bundle);
    let state = path.join("state.json");
    fs::rename(&state, bundle.join("saved"))?;
    for directory in [&path, &bundle.root()] {
        chown(directory, Some(USER), Some(USER))?;
    }
    let device = |path: &Path| {
        let mode = nix::sys::stat::Mode::S_IRWXU;
        let null = nix::sys::stat::makedev(1, 3);
        nix::sys::stat::mknod(path, nix::sys::stat::SFlag::S_IFCHR, mode, null)
    };
    for kind in ["FIFO", "character device", "symbolic link"] {
        match kind {
            "FIFO" => nix::unistd::mkfifo(&state, nix::sys::stat::Mode::S_IRWXU)?,
            "character device" => device(&state)?,
            _ => symlink("/dev/null", &state)?,
        }
        for words in [&["list"][..], &["state", bundle.id()]] {
            let traces = bundle.join(&format!("{kind} {}", words[0]));
            let output = strace_opens(&traces)?
                .arg(runtime_program())
                .args(bundle.flags())
                .args(words)
                .end()?;
            ensure!(
                output.stderr.contains("it is not a regular file"),
                "the error does not report the type of the file:\n{}",
                output.told()
            );
            ensure!(
                only_looked_up(&traces, "/state.json")?,
                "{words:?} did not find the file"
            );
        }
        fs::remove_file(&state)?;
    }
    for directory in [&path, &bundle.root()] {
        chown(directory, Some(0), Some(0))?;
    }
    fs::rename(bundle.join("saved"), &state)?;
    bundle.end()?;
    Ok(())
}

fn a_state_with_the_id_or_the_cgroup_of_something_else_is_refused() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    bundle.start()?;
    let cgroup = bundle.join("cgroup");
    fs::create_dir(&cgroup)?;
    for file in ["freeze", "events", "kill", "procs"] {
        let path = cgroup.join(format!("cgroup.{file}"));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)?;
    }
    let climbing = format!("/sys/fs/cgroup/..{}", cgroup.display());
    let own = bundle.cgroup();
    for wrong in [json!(cgroup), json!(climbing), json!("/sys/fs/cgroup")] {
        forge(&bundle, "cgroup", wrong)?;
        // `delete --force` finds the cgroup in another way.
        let (_, actions) = ACTIONS.split_last().ok_or("no command")?;
        fail(&bundle, actions, "is not the path of a cgroup")?;
    }
    forge(&bundle, "cgroup", json!(own))?;
    forge(&bundle, "id", json!("other"))?;
    let output = bundle.runtime(&["kill", bundle.id(), "KILL"]).end()?;
    output.fails_with("it is the state of container other")?;
    bundle.end()?;
    ensure!(!own.exists(), "`delete --force` did not remove the cgroup");
    Ok(())
}
