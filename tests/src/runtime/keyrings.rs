//! Tests of the session keyring, in which a container's processes keep kernel keys. Keyrings have no
//! namespace, so only their names and permissions separate the keys of containers.

use std::fs;

use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::machine::{Result, Running, command, wait_for};
use crate::support::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(a_process_that_exec_starts_joins_the_containers_session_keyring),
    test!(
        exec_works_in_a_container_that_restricted_its_session_keyring,
        Need::Rrun
    ),
    test!(
        a_container_can_not_use_the_keys_of_another_container,
        Need::Rrun
    ),
    test!(
        a_container_can_not_use_a_keyring_that_exec_created,
        Need::Rrun
    ),
    test!(
        a_container_gets_no_keyring_that_another_container_created,
        Need::Rrun
    ),
    test!(
        a_container_can_not_replace_the_session_keyring_of_the_runtime,
        Need::Rrun
    ),
    test!(
        exec_works_although_its_caller_is_in_the_containers_session_keyring,
        Need::Rrun
    ),
];

fn a_process_that_exec_starts_joins_the_containers_session_keyring() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    let own = format!("_ses.{}", bundle.id());
    let keyring = |report: &Value| report["keyring"].as_str().unwrap_or_default().to_owned();
    let first = keyring(&bundle.report()?);
    ensure!(
        first.contains(&own),
        "the first process has the session keyring {first}, whose name does not contain {own}"
    );
    for user_namespace in [false, true] {
        if user_namespace {
            add_user_namespace(&mut bundle);
        }
        let running = bundle.args(&["keys", "hide"]).run_in_background()?;
        let (ring, _) = hidden(running)?;
        for _ in 0..2 {
            ensure_eq!(
                exec_keys(&bundle, &["session"])?.trim(),
                ring,
                "the session keyring of a process that `exec` starts (user namespace: {user_namespace})"
            );
        }
        bundle.end()?;
    }

    let shared = bundle
        .args(&["report"])
        .call(&["run", "--no-new-keyring"])?
        .ok()?
        .json()?;
    ensure!(
        !keyring(&shared).contains(&own),
        "the runtime creates the session keyring {own} despite --no-new-keyring"
    );
    Ok(())
}

fn exec_works_in_a_container_that_restricted_its_session_keyring() -> Result {
    let bundle = Bundle::new(&["keys", "restrict"])?;
    let restricted = first_line(&mut bundle.run_in_background()?)?;
    let first = exec_keys(&bundle, &["session"])?;
    let second = exec_keys(&bundle, &["session"])?;
    ensure!(
        first.trim() != restricted && first != second,
        "the processes that `exec` starts share the session keyring {second}"
    );
    bundle.end()?;
    Ok(())
}

fn a_container_can_not_use_the_keys_of_another_container() -> Result {
    for user_namespace in [false, true] {
        let mut victim = Bundle::new(&["keys", "hide"])?;
        let mut thief = Bundle::new(&["sleep", "600"])?;
        if user_namespace {
            add_user_namespace(&mut victim);
            add_user_namespace(&mut thief);
        }
        let (ring, key) = hidden(victim.run_in_background()?)?;
        thief.start()?;
        steals_nothing(&thief, &victim, &ring, &key)?;
        if user_namespace {
            let root = Bundle::new(&["sleep", "600"])?;
            root.start()?;
            steals_nothing(&root, &victim, &ring, &key)?;
            root.end()?;
        }
        thief.end()?;
        victim.end()?;
    }
    Ok(())
}

/// The first process leaves the container's keyring. The kernel then deletes the keyring, and `exec`
/// creates it again.
fn a_container_can_not_use_a_keyring_that_exec_created() -> Result {
    let victim = Bundle::new(&["keys", "leave"])?;
    let mut left = victim.run_in_background()?;
    wait_for("the first process to leave its keyring", || {
        Ok(left.stdout().contains("left").then_some(()))
    })?;
    let running = victim.exec(&[], &["keys", "hide"]).start()?;
    let (ring, key) = hidden(running)?;
    let thief = Bundle::new(&["sleep", "600"])?;
    thief.start()?;
    steals_nothing(&thief, &victim, &ring, &key)?;
    thief.end()?;
    victim.end()?;
    Ok(())
}

fn a_container_gets_no_keyring_that_another_container_created() -> Result {
    let victim = Bundle::new(&["keys", "session"])?;
    let name = format!("_ses.{}", victim.id());
    let thief = Bundle::new(&["keys", "occupy", &name])?;
    let mut running = thief.run_in_background()?;
    let occupied = first_line(&mut running)?;
    let output = victim.run()?;
    ensure!(
        output.stdout.trim() != occupied,
        "the container has the session keyring {occupied}, which another container created"
    );
    thief.end()?;
    Ok(())
}

/// `run` and `exec` in the foreground are the parent of the container's process. Hooks that they
/// execute later inherit their session keyring.
fn a_container_can_not_replace_the_session_keyring_of_the_runtime() -> Result {
    let mut bundle = Bundle::new(&["keys", "to-parent"])?;
    for terminal in [false, true] {
        let output = bundle.set("/process/terminal", json!(terminal)).run()?;
        ensure_eq!(output.text(), "Err(EPERM)", "the kernel's answer to `run`");
    }
    bundle
        .args(&["sleep", "600"])
        .set("/process/terminal", json!(false))
        .start()?;
    for options in [&[][..], &["--tty"]] {
        let output = bundle.exec(options, &["keys", "to-parent"]).ok()?;
        ensure_eq!(output.text(), "Err(EPERM)", "the kernel's answer to `exec`");
    }
    bundle.end()?;
    Ok(())
}

fn exec_works_although_its_caller_is_in_the_containers_session_keyring() -> Result {
    let bundle = Bundle::new(&["keys", "hide"])?;
    let (ring, _) = hidden(bundle.run_in_background()?)?;
    let state = fs::read(bundle.root().join(bundle.id()).join("state.json"))?;
    let state: Value = serde_json::from_slice(&state)?;
    let name = state["keyring"].as_str().unwrap_or_default();
    let inside = bundle.rootfs().join("bin/inside").display().to_string();
    let session = ["exec", bundle.id(), "/bin/inside", "keys", "session"];
    let output = command(&inside, ["keys", "join", name, &runtime_program()])
        .args(bundle.flags())
        .args(session)
        .ok()?;
    ensure_eq!(
        output.text(),
        ring,
        "the session keyring of the process that `exec` starts"
    );
    bundle.end()?;
    Ok(())
}

fn add_user_namespace(bundle: &mut Bundle) {
    let ids = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    bundle
        .add("/linux/namespaces", json!({ "type": "user" }))
        .set("/linux/uidMappings", ids.clone())
        .set("/linux/gidMappings", ids);
}

fn steals_nothing(thief: &Bundle, victim: &Bundle, ring: &str, key: &str) -> Result {
    let name = format!("_ses.{}", victim.id());
    ensure_eq!(
        exec_keys(thief, &["steal", &name, ring, key])?.trim(),
        "tried",
        "what a container can do with the keyring {ring} and the key {key} of another container"
    );
    Ok(())
}

fn exec_keys(bundle: &Bundle, args: &[&str]) -> Result<String> {
    let args = [&["keys"], args].concat();
    Ok(bundle.exec(&[], &args).ok()?.stdout)
}

/// Returns the numbers of the keyring and of the key that `inside keys hide` printed.
fn hidden(mut running: Running) -> Result<(String, String)> {
    let line = first_line(&mut running)?;
    let (ring, key) = line.split_once(' ').ok_or("the program printed no key")?;
    Ok((ring.to_owned(), key.to_owned()))
}

fn first_line(running: &mut Running) -> Result<String> {
    wait_for("the program to print a line", || {
        let output = running.stdout();
        Ok(output.split_once('\n').map(|(line, _)| line.to_owned()))
    })
}
