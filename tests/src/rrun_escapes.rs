//! The published ways out of a container, each as it was published, and its failure.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::{Value, json};

use crate::attacker::Exchange;
use crate::bundle::{Bundle, runtime_program};
use crate::machine::{Directory, Output, Result, command, full, note, program_path, wait_for};
use crate::needs::{Need, Test};
use crate::{ensure, ensure_eq, test};

pub const TESTS: &[Test] = &[
    test!(cve_2024_21626_a_leaked_descriptor_is_no_working_directory),
    test!(cve_2024_21626_no_descriptor_of_the_callers_leaks),
    test!(
        cve_2019_5736_the_runtimes_file_is_not_overwritten,
        Need::Rrun
    ),
    test!(cve_2016_9962_a_process_on_its_way_in_is_closed_to_the_container),
    test!(cve_2025_31133_masked_paths_are_masked_by_the_true_null),
    test!(
        cve_2025_52565_the_console_is_the_terminal_that_was_opened,
        Need::Rrun
    ),
    test!(cve_2025_52565_a_false_devpts_is_refused, Need::Rrun),
    test!(cve_2025_52881_nothing_is_written_to_a_false_proc),
    test!(cve_2025_52881_nothing_but_proc_is_mounted_on_proc),
    test!(
        cve_2019_19921_proc_is_protected_wherever_a_rename_takes_it,
        Need::Rrun
    ),
    test!(cve_2021_30465_a_mount_lands_in_the_container, Need::Rrun),
    test!(cve_2024_45310_nothing_is_made_on_the_host),
    test!(cve_2023_27561_and_28642_proc_and_sys_are_no_links),
    test!(cve_2022_29162_no_capability_is_inheritable),
    test!(special_files_neither_hang_nor_fool),
];

/// How often a race is tried.
fn rounds() -> usize {
    if full() { 500 } else { 40 }
}

/// A file of the host's that no container may see or change.
struct Secret(Directory);

const SECRET: &str = "the host's secret\n";

impl Secret {
    fn new() -> Result<Self> {
        let dir = Directory::new("secret")?;
        fs::write(dir.join("file"), SECRET)?;
        Ok(Secret(dir))
    }

    fn path(&self) -> PathBuf {
        self.0.join("file")
    }

    /// From any directory of the host's.
    fn upwards(&self) -> String {
        format!("../../../../../../../..{}", self.path().display())
    }

    fn unseen(&self, output: &Output) -> Result {
        ensure!(
            !output.stdout.contains(SECRET.trim()),
            "it was read:\n{}",
            output.told()
        );
        Ok(())
    }

    fn unchanged(&self) -> Result {
        ensure_eq!(fs::read_to_string(self.path())?, SECRET, "the host's file");
        let names = fs::read_dir(self.0.path())?.count();
        ensure_eq!(names, 1, "files in the host's directory");
        Ok(())
    }
}

/// `bundle.runtime`, by a caller that has left / open as descriptor 9.
fn leaking(bundle: &Bundle, args: &[&str]) -> crate::machine::Run {
    let program = runtime_program();
    command(
        "/bin/sh",
        ["-c", "exec 9</ && exec \"$@\"", "sh", &program, "--root"],
    )
    .arg(bundle.root())
    .args(args)
    .dir(bundle.path())
}

fn cve_2024_21626_a_leaked_descriptor_is_no_working_directory() -> Result {
    let secret = Secret::new()?;
    let mut bundle = Bundle::new(&["cat", &secret.upwards()])?;
    symlink("/proc/self/fd/9", bundle.join("rootfs/tmp/nine"))?;
    symlink("/proc/self/fd/9/../..", bundle.join("rootfs/tmp/up"))?;
    let mut places: Vec<String> = (3..=14).map(|n| format!("/proc/self/fd/{n}")).collect();
    places.extend(["/tmp/nine", "/tmp/up", "/proc/1/cwd", "/proc/self/root/.."].map(str::to_owned));
    for place in &places {
        bundle.set("/process/cwd", json!(place)).write_config()?;
        let output = leaking(&bundle, &["run", bundle.id()]).end()?;
        secret.unseen(&output)?;
        ensure!(output.code != 0, "cwd {place}: {}", output.told());
    }

    let bundle = Bundle::new(&["sleep", "600"])?;
    symlink("/proc/self/fd/9", bundle.join("rootfs/tmp/nine"))?;
    bundle.start()?;
    for place in &places {
        let args = [
            "exec",
            "--cwd",
            place,
            bundle.id(),
            "/bin/inside",
            "cat",
            &secret.upwards(),
        ];
        let output = leaking(&bundle, &args).end()?;
        secret.unseen(&output)?;
        ensure!(output.code != 0, "exec --cwd {place}: {}", output.told());
    }
    bundle.end()?;
    Ok(())
}

fn cve_2024_21626_no_descriptor_of_the_callers_leaks() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    bundle.write_config()?;
    let report = leaking(&bundle, &["run", bundle.id()]).ok()?.json()?;
    let only_standard = |report: &Value| -> Result {
        let all: Vec<String> = report["fds"]
            .as_object()
            .map(|all| all.keys().cloned().collect())
            .unwrap_or_default();
        ensure_eq!(all, ["0", "1", "2"], "descriptors");
        Ok(())
    };
    only_standard(&report)?;
    bundle.args(&["sleep", "600"]).start()?;
    let args = ["exec", bundle.id(), "/bin/inside", "report"];
    only_standard(&leaking(&bundle, &args).ok()?.json()?)?;
    bundle.end()?;
    Ok(())
}

fn cve_2019_5736_the_runtimes_file_is_not_overwritten() -> Result {
    // A copy, in case it does not hold.
    let copies = Directory::new("runtime")?;
    let copy = copies.join("rrun");
    let original = program_path(&runtime_program()).ok_or("no runtime in PATH")?;
    fs::copy(&original, &copy)?;
    let copy = copy.to_string_lossy().into_owned();

    let mut bundle = Bundle::new(&["attack", "overwrite", "6"])?;
    bundle.set("/root/readonly", json!(false));
    fs::write(bundle.join("rootfs/bin/script"), "#!/proc/self/exe\n")?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(bundle.join("rootfs/bin/script"), mode)?;
    symlink("/proc/self/exe", bundle.join("rootfs/bin/link"))?;
    let mut attacker = bundle.run_beside()?;
    wait_for("the attacker", || {
        Ok(attacker.stdout().contains("ready").then_some(()))
    })?;
    for program in ["/bin/script", "/bin/link", "/proc/self/exe"] {
        for _ in 0..10 {
            // rrun, executed in the container, with whatever it makes of its arguments.
            let root = bundle.root();
            let root = root.to_string_lossy();
            let args = ["--root", &*root, "exec", bundle.id(), program, "list"];
            command(&copy, args).end()?;
        }
    }
    let output = attacker.end()?;
    ensure!(!output.stdout.contains("overwrote"), "{}", output.told());
    ensure!(output.stdout.contains("done"), "{}", output.told());
    ensure!(
        fs::read(&copy)? == fs::read(&original)?,
        "the runtime's file has changed"
    );
    note(format!(
        "CVE-2019-5736: {}",
        output.stdout.replace('\n', "; ")
    ));

    // And as the container's own first process.
    for program in ["/bin/script", "/bin/link"] {
        bundle
            .set("/process/args", json!([program, "list"]))
            .write_config()?;
        let root = bundle.root();
        let root = root.to_string_lossy();
        command(&copy, ["--root", &*root, "run", bundle.id()])
            .dir(bundle.path())
            .end()?;
        ensure!(
            fs::read(&copy)? == fs::read(&original)?,
            "the runtime's file has changed"
        );
    }
    Ok(())
}

fn cve_2016_9962_a_process_on_its_way_in_is_closed_to_the_container() -> Result {
    let bundle = Bundle::new(&["attack", "pry", "4"])?;
    let mut attacker = bundle.run_beside()?;
    wait_for("the attacker", || {
        Ok(attacker.stdout().contains("ready").then_some(()))
    })?;
    bundle.exec(&[], &["exit", "0"]).ok()?;
    // Until it ends, and nobody can come in any more.
    while bundle.exec(&[], &["exit", "0"]).end()?.code == 0 {}
    let output = attacker.end()?;
    ensure!(output.stdout.contains("done"), "{}", output.told());
    for word in ["looked into", "opened the memory"] {
        ensure!(!output.stdout.contains(word), "{}", output.told());
    }
    Ok(())
}

/// A volume for /dev with the usual nodes, and what an attacker adds.
fn dev_volume() -> Result<Directory> {
    let dir = Directory::new("dev")?;
    for (name, minor) in [
        ("null", 3),
        ("zero", 5),
        ("full", 7),
        ("random", 8),
        ("urandom", 9),
    ] {
        let mode = Mode::from_bits_truncate(0o666);
        mknod(&dir.join(name), SFlag::S_IFCHR, mode, makedev(1, minor))?;
    }
    mknod(
        &dir.join("tty"),
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o666),
        makedev(5, 0),
    )?;
    fs::create_dir(dir.join("pts"))?;
    fs::create_dir(dir.join("shm"))?;
    fs::create_dir(dir.join("mqueue"))?;
    Ok(dir)
}

fn replace_dev(bundle: &mut Bundle, source: &Path) {
    bundle.set(
        "/mounts/1",
        json!({ "destination": "/dev", "type": "bind", "source": source, "options": ["bind"] }),
    );
}

const CORE_PATTERN: &str = "/proc/sys/kernel/core_pattern";

fn cve_2025_31133_masked_paths_are_masked_by_the_true_null() -> Result {
    let before = fs::read_to_string(CORE_PATTERN)?;
    // /dev/null of the image's leads to a file that root of the host's may write.
    let mut bundle = Bundle::new(&["write", "/proc/keys", "|/evil"])?;
    symlink(CORE_PATTERN, bundle.join("rootfs/dev/null"))?;
    if let Some(Value::Array(all)) = bundle.config.pointer_mut("/mounts") {
        all.retain(|mount| {
            !mount["destination"]
                .as_str()
                .unwrap_or_default()
                .starts_with("/dev")
        });
    }
    bundle.set("/root/readonly", json!(false));
    bundle.call(&["run"])?.end()?;
    ensure_eq!(fs::read_to_string(CORE_PATTERN)?, before, "core_pattern");

    // And by a rename at the right moment, in a volume that another container shares.
    let volume = dev_volume()?;
    symlink(CORE_PATTERN, volume.join("link"))?;
    let mut bundle = Bundle::new(&["stat", "/proc/keys"])?;
    replace_dev(&mut bundle, volume.path());
    bundle.write_config()?;
    let race = Exchange::start(&volume.join("null"), &volume.join("link"));
    let mut made = 0;
    for _ in 0..rounds() {
        let output = bundle.runtime(&["run", bundle.id()]).end()?;
        if output.code != 0 {
            continue;
        }
        made += 1;
        let stat = output.json()?;
        ensure_eq!(stat["kind"], "character device", "/proc/keys");
        ensure_eq!(stat["device"], json!([1, 3]), "/proc/keys");
    }
    ensure!(made > 0, "no container was made at all");
    ensure_eq!(fs::read_to_string(CORE_PATTERN)?, before, "core_pattern");
    note(format!(
        "CVE-2025-31133: {made} of {} made, {} exchanges",
        rounds(),
        race.times()
    ));
    Ok(())
}

fn cve_2025_52565_the_console_is_the_terminal_that_was_opened() -> Result {
    let before = fs::read_to_string(CORE_PATTERN)?;
    let volume = dev_volume()?;
    symlink(CORE_PATTERN, volume.join("link"))?;
    fs::write(volume.join("console"), "")?;
    let mut bundle = Bundle::new(&["write", "/dev/console", "|/evil"])?;
    replace_dev(&mut bundle, volume.path());
    bundle
        .set("/process/terminal", json!(true))
        .write_config()?;
    let race = Exchange::start(&volume.join("console"), &volume.join("link"));
    let mut made = 0;
    for _ in 0..rounds() {
        let output = bundle.runtime(&["run", bundle.id()]).end()?;
        made += usize::from(output.code == 0);
        ensure_eq!(fs::read_to_string(CORE_PATTERN)?, before, "core_pattern");
    }
    ensure!(made > 0, "no container was made at all");
    note(format!(
        "CVE-2025-52565: {made} of {} made, {} exchanges",
        rounds(),
        race.times()
    ));
    Ok(())
}

fn cve_2025_52565_a_false_devpts_is_refused() -> Result {
    let before = fs::read_to_string(CORE_PATTERN)?;
    for kind in ["link", "fifo", "file", "device", "nothing"] {
        let volume = dev_volume()?;
        let ptmx = volume.join("pts/ptmx");
        let mode = Mode::from_bits_truncate(0o666);
        match kind {
            "link" => symlink(CORE_PATTERN, &ptmx)?,
            "fifo" => nix::unistd::mkfifo(&ptmx, mode)?,
            "file" => fs::write(&ptmx, "")?,
            "device" => mknod(&ptmx, SFlag::S_IFCHR, mode, makedev(5, 2))?,
            _ => {}
        }
        let mut bundle = Bundle::new(&["write", "/dev/console", "|/evil"])?;
        replace_dev(&mut bundle, volume.path());
        if let Some(Value::Array(all)) = bundle.config.pointer_mut("/mounts") {
            all.retain(|mount| mount["destination"] != "/dev/pts");
        }
        bundle.set("/process/terminal", json!(true));
        bundle.call(&["run"])?.exits(1)?;
        ensure_eq!(fs::read_to_string(CORE_PATTERN)?, before, "core_pattern");
    }
    Ok(())
}

/// A directory that looks like /proc, where each file that a runtime writes leads to the secret.
fn false_proc(dir: &Path, secret: &Secret) -> Result {
    for parent in [
        "self/attr",
        "self/task/1",
        "sys/net/ipv4",
        "sys/kernel",
        "thread-self/attr",
    ] {
        fs::create_dir_all(dir.join(parent))?;
    }
    for file in [
        "self/attr/exec",
        "self/attr/keycreate",
        "thread-self/attr/exec",
        "self/oom_score_adj",
        "self/setgroups",
        "self/uid_map",
        "self/timens_offsets",
        "sys/net/ipv4/ip_default_ttl",
        "sysrq-trigger",
    ] {
        symlink(secret.path(), dir.join(file))?;
        // Where an absolute link ends in the container.
    }
    Ok(())
}

fn cve_2025_52881_nothing_is_written_to_a_false_proc() -> Result {
    let secret = Secret::new()?;
    // No /proc is asked for, and the image brings its own.
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    if let Some(Value::Array(all)) = bundle.config.pointer_mut("/mounts") {
        all.retain(|mount| mount["destination"] != "/proc");
    }
    false_proc(&bundle.join("rootfs/proc"), &secret)?;
    let inside = bundle.rootfs().join(secret.path().strip_prefix("/")?);
    fs::create_dir_all(inside.parent().ok_or("no parent")?)?;
    fs::write(&inside, SECRET)?;
    bundle
        .set("/root/readonly", json!(false))
        .set("/linux/sysctl", json!({ "net.ipv4.ip_default_ttl": "77" }))
        .set("/process/oomScoreAdj", json!(500));
    if bundle.call(&["create"])?.end()?.code == 0 {
        bundle.runtime(&["start", bundle.id()]).ok()?;
        bundle.exec(&[], &["exit", "0"]).end()?;
        bundle.end()?;
    }
    secret.unchanged()?;
    ensure_eq!(
        fs::read_to_string(&inside)?,
        SECRET,
        "the file that the false /proc leads to"
    );

    // A rename puts it there at the right moment.
    let mut bundle = Bundle::new(&["cat", "/proc/sys/net/ipv4/ip_default_ttl"])?;
    bundle
        .set("/linux/sysctl", json!({ "net.ipv4.ip_default_ttl": "77" }))
        .set("/root/readonly", json!(false))
        .write_config()?;
    fs::create_dir(bundle.join("rootfs/false"))?;
    false_proc(&bundle.join("rootfs/false"), &secret)?;
    let race = Exchange::start(&bundle.join("rootfs/proc"), &bundle.join("rootfs/false"));
    for _ in 0..rounds() {
        bundle.runtime(&["run", bundle.id()]).end()?;
        secret.unchanged()?;
    }
    drop(race);
    Ok(())
}

fn cve_2025_52881_nothing_but_proc_is_mounted_on_proc() -> Result {
    let volume = Directory::new("false-proc")?;
    for (destination, typ) in [
        ("/proc", "bind"),
        ("/proc/self", "bind"),
        ("/proc/sys", "bind"),
        ("/proc/self/attr", "bind"),
        ("/proc/1", "tmpfs"),
        ("/data/link/attr", "tmpfs"),
        ("/proc", "tmpfs"),
    ] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        symlink("/proc/self", bundle.join("rootfs/data/link"))?;
        let options = if typ == "bind" {
            json!(["rbind"])
        } else {
            json!([])
        };
        bundle.add(
            "/mounts",
            json!({ "destination": destination, "type": typ, "source": volume.path(), "options": options }),
        );
        bundle.call(&["run"])?.exits(1)?;
    }
    Ok(())
}

/// The mounts that a container's first process sees, from the host's side: mount point, options,
/// file system, options of the file system.
fn mounts_of(pid: i32) -> Result<Vec<[String; 4]>> {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let (own, system) = line.split_once(" - ")?;
            let mut own = own.split(' ').skip(4);
            let mut system = system.split(' ');
            Some([own.next()?, own.next()?, system.next()?, system.nth(1)?].map(str::to_owned))
        })
        .collect())
}

fn cve_2019_19921_proc_is_protected_wherever_a_rename_takes_it() -> Result {
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    bundle.write_config()?;
    symlink("/data", bundle.join("rootfs/link"))?;
    let mut made = 0;
    let race = Exchange::start(&bundle.join("rootfs/proc"), &bundle.join("rootfs/link"));
    for _ in 0..rounds() {
        let output = bundle.runtime(&["create", bundle.id()]).end()?;
        if output.code != 0 {
            continue;
        }
        made += 1;
        let mounts = mounts_of(bundle.pid()?)?;
        for (name, protection) in [
            ("sys", "ro,"),
            ("sysrq-trigger", "ro,"),
            ("kcore", ""),
            ("keys", ""),
        ] {
            if !Path::new("/proc").join(name).exists() {
                continue;
            }
            // Whatever its directory is called at the moment.
            let there = mounts.iter().find(|[point, ..]| {
                ["/proc", "/link"]
                    .iter()
                    .any(|place| *point == format!("{place}/{name}"))
            });
            ensure!(
                there.is_some_and(|[_, options, ..]| options.starts_with(protection)),
                "/proc/{name} is not protected: {mounts:#?}"
            );
        }
        bundle.end()?;
    }
    note(format!(
        "CVE-2019-19921: {made} of {} made, {} exchanges",
        rounds(),
        race.times()
    ));
    drop(race);
    // The link as the image brings it, with a volume below.
    bundle = Bundle::new(&["exit", "0"])?;
    fs::remove_dir(bundle.join("rootfs/proc"))?;
    symlink("data/level1/level2", bundle.join("rootfs/proc"))?;
    fs::create_dir_all(bundle.join("rootfs/data/level1/level2"))?;
    bundle.call(&["run"])?.exits(1)?;
    Ok(())
}

/// A volume in which a directory and a link to the host's are exchanged, and mounts at it.
fn racing_volume(bundle: &mut Bundle, host: &Path) -> Result<Directory> {
    let volume = Directory::new("shared")?;
    fs::create_dir(volume.join("dir"))?;
    symlink(host, volume.join("link"))?;
    bundle.add(
        "/mounts",
        json!({ "destination": "/data", "type": "bind", "source": volume.path(), "options": ["rbind"] }),
    );
    Ok(volume)
}

fn cve_2021_30465_a_mount_lands_in_the_container() -> Result {
    let secret = Secret::new()?;
    let before = fs::read_to_string("/proc/self/mountinfo")?.lines().count();
    let mut bundle = Bundle::new(&["sleep", "600"])?;
    let volume = racing_volume(&mut bundle, Path::new("/"))?;
    for destination in ["/data/dir", "/data/dir/tmp"] {
        bundle.add(
            "/mounts",
            json!({ "destination": destination, "type": "tmpfs", "source": "x", "options": ["size=1236k"] }),
        );
    }
    bundle.set("/root/readonly", json!(false)).write_config()?;
    let race = Exchange::start(&volume.join("dir"), &volume.join("link"));
    let mut made = 0;
    for _ in 0..rounds() {
        if bundle.runtime(&["create", bundle.id()]).end()?.code != 0 {
            continue;
        }
        made += 1;
        let mounts = mounts_of(bundle.pid()?)?;
        // What has landed on the host's is not in the container's list.
        let ours = mounts
            .iter()
            .filter(|mount| mount[3].contains("size=1236k"));
        ensure_eq!(
            ours.count(),
            2,
            "mounts that the container sees in {mounts:#?}"
        );
        bundle.end()?;
        secret.unchanged()?;
        let now = fs::read_to_string("/proc/self/mountinfo")?.lines().count();
        ensure_eq!(now, before, "mounts of the host");
    }
    note(format!(
        "CVE-2021-30465: {made} of {} made, {} exchanges",
        rounds(),
        race.times()
    ));
    Ok(())
}

fn cve_2024_45310_nothing_is_made_on_the_host() -> Result {
    let secret = Secret::new()?;
    let file = Directory::new("source")?;
    fs::write(file.join("file"), "text")?;
    let mut bundle = Bundle::new(&["exit", "0"])?;
    let volume = racing_volume(&mut bundle, secret.0.path())?;
    for (destination, source) in [
        ("/data/dir/a/b", file.path().to_owned()),
        ("/data/dir/c/file", file.join("file")),
        ("/data/dir/d", file.join("file")),
    ] {
        bundle.add(
            "/mounts",
            json!({ "destination": destination, "type": "bind", "source": source, "options": ["rbind"] }),
        );
    }
    bundle.set("/root/readonly", json!(false)).write_config()?;
    let race = Exchange::start(&volume.join("dir"), &volume.join("link"));
    let mut made = 0;
    for _ in 0..rounds() {
        made += usize::from(bundle.runtime(&["run", bundle.id()]).end()?.code == 0);
        secret.unchanged()?;
        // So that there is something to make each time.
        for path in [volume.path(), &bundle.rootfs()] {
            for name in ["dir", "link"] {
                for made in ["a", "c"] {
                    let _ = fs::remove_dir_all(path.join(name).join(made));
                }
                let _ = fs::remove_file(path.join(name).join("d"));
            }
        }
        secret.unchanged()?;
    }
    note(format!(
        "CVE-2024-45310: {made} of {} made, {} exchanges",
        rounds(),
        race.times()
    ));
    Ok(())
}

fn cve_2023_27561_and_28642_proc_and_sys_are_no_links() -> Result {
    for (name, to) in [
        ("proc", "data"),
        ("proc", "/data"),
        ("sys", "data"),
        ("sys", "../data"),
    ] {
        let bundle = Bundle::new(&["exit", "0"])?;
        fs::remove_dir(bundle.join("rootfs").join(name))?;
        symlink(to, bundle.join("rootfs").join(name))?;
        bundle.call(&["run"])?.exits(1)?;
    }
    Ok(())
}

fn cve_2022_29162_no_capability_is_inheritable() -> Result {
    let mut bundle = Bundle::new(&[])?;
    let none = "0000000000000000";
    ensure_eq!(bundle.report()?["status"]["CapInh"], none, "run");
    bundle.args(&["sleep", "600"]).start()?;
    let cases: [&[&str]; 3] = [&[], &["--cap", "CAP_NET_ADMIN"], &["--user", "1000"]];
    for options in cases {
        let report = bundle.exec(options, &["report"]).ok()?.json()?;
        ensure_eq!(report["status"]["CapInh"], none, "exec {options:?}");
    }
    bundle.end()?;
    Ok(())
}

fn special_files_neither_hang_nor_fool() -> Result {
    let fifo = |path: PathBuf| {
        let _ = fs::remove_file(&path);
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o666))
    };
    let source = Directory::new("source")?;
    fs::write(source.join("hosts"), "text")?;
    let bind = |destination: &str| {
        json!({
            "destination": destination, "type": "bind", "source": source.join("hosts"),
            "options": ["bind"],
        })
    };
    // A FIFO where a file is mounted, and where users are looked up.
    let mut bundle = Bundle::new(&["cat", "/etc/hosts"])?;
    fifo(bundle.join("rootfs/etc/hosts"))?;
    fifo(bundle.join("rootfs/etc/passwd"))?;
    bundle.add("/mounts", bind("/etc/hosts"));
    ensure_eq!(bundle.run()?.stdout, "text", "the file mounted on a FIFO");
    // A device, and a link to one.
    let mut bundle = Bundle::new(&["cat", "/etc/hosts"])?;
    let node = bundle.join("rootfs/etc/hosts");
    mknod(
        &node,
        SFlag::S_IFBLK,
        Mode::from_bits_truncate(0o600),
        makedev(8, 0),
    )?;
    bundle.add("/mounts", bind("/etc/hosts"));
    ensure_eq!(bundle.run()?.stdout, "text", "the file mounted on a device");
    // As the program, the working directory, a device of the default ones, the root.
    for (pointer, value, name) in [
        ("/process/args", json!(["/etc/fifo"]), "program"),
        ("/process/cwd", json!("/etc/fifo"), "working directory"),
        (
            "/mounts/1/destination",
            json!("/etc/fifo"),
            "mount point of a tmpfs",
        ),
        ("/root/path", json!("rootfs/etc/fifo"), "root"),
    ] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        fifo(bundle.join("rootfs/etc/fifo"))?;
        bundle.set(pointer, value);
        let output = bundle.call(&["run"])?.end()?;
        ensure!(output.code == 1, "a FIFO as {name}: {}", output.told());
    }
    let mut bundle = Bundle::new(&["exit", "0"])?;
    if let Some(Value::Array(all)) = bundle.config.pointer_mut("/mounts") {
        all.retain(|mount| {
            !mount["destination"]
                .as_str()
                .unwrap_or_default()
                .starts_with("/dev")
        });
    }
    bundle.set("/root/readonly", json!(false));
    fifo(bundle.join("rootfs/dev/null"))?;
    bundle.call(&["run"])?.end()?;
    Ok(())
}
