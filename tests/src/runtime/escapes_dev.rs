//! Tests of published container escapes through files in the container's /dev, or through special
//! files at other paths. Each test runs a published attack without changes, and checks that the
//! attack fails.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::{Value, json};

use crate::support::bundle::{Bundle, runtime_program};
use crate::support::inside::attacker::{Exchange, rounds};
use crate::support::machine::{Directory, Result, note, only_looked_up, strace_opens};
use crate::support::needs::{Need, Test};
use crate::support::refusals::{complaint, refused};
use crate::{ensure, ensure_eq, test};

pub(crate) const TESTS: &[Test] = &[
    test!(cve_2025_31133_masked_paths_are_masked_with_the_real_null_device),
    test!(
        cve_2025_52565_dev_console_is_the_terminal_that_the_runtime_opened,
        Need::Rrun
    ),
    test!(cve_2025_52565_a_false_devpts_is_refused, Need::Rrun),
    test!(special_files_neither_block_nor_deceive_the_runtime),
    test!(
        a_special_file_is_refused_as_configuration_and_as_namespace,
        Need::Rrun
    ),
    test!(
        the_runtime_does_not_wait_for_a_fifo_on_its_command_line,
        Need::Rrun
    ),
    test!(
        the_runtime_opens_no_device_file_in_a_root_file_system,
        Need::Rrun,
        Need::Program("strace")
    ),
    test!(
        the_runtime_creates_no_devices_in_a_volume_to_which_a_link_at_dev_leads,
        Need::Rrun
    ),
    test!(
        the_runtime_creates_no_devices_in_a_volume_to_which_another_link_leads,
        Need::Rrun
    ),
    test!(a_volume_must_not_replace_dev_through_a_link, Need::Rrun),
    test!(the_runtime_does_not_change_the_hosts_dev, Need::Rrun),
    test!(a_standard_stream_is_not_the_hosts_null_device, Need::Rrun),
    test!(a_masked_file_is_not_the_hosts_null_device, Need::Rrun),
    test!(
        a_link_at_dev_does_not_lead_exec_to_the_hosts_null_device,
        Need::Rrun
    ),
];

/// Creates a volume for /dev with the usual device nodes. Each test adds the attacker's files to
/// the volume.
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

/// Removes the mounts at and below /dev. The runtime then creates the device files in the image's
/// /dev.
fn remove_dev_mounts(bundle: &mut Bundle) {
    if let Some(Value::Array(all)) = bundle.config.pointer_mut("/mounts") {
        all.retain(|mount| {
            !mount["destination"]
                .as_str()
                .unwrap_or_default()
                .starts_with("/dev")
        });
    }
    bundle.set("/root/readonly", json!(false));
}

const CORE_PATTERN: &str = "/proc/sys/kernel/core_pattern";

fn cve_2025_31133_masked_paths_are_masked_with_the_real_null_device() -> Result {
    let before = fs::read_to_string(CORE_PATTERN)?;
    // The image's /dev/null is a link to core_pattern, which the host's root can write.
    let mut bundle = Bundle::new(&["write", "/proc/keys", "|/evil"])?;
    symlink(CORE_PATTERN, bundle.join("rootfs/dev/null"))?;
    remove_dev_mounts(&mut bundle);
    bundle.call(&["run"])?.end()?;
    ensure_eq!(
        fs::read_to_string(CORE_PATTERN)?,
        before,
        "the content of the host's core_pattern"
    );

    // The second attack exchanges the null device and the link while the runtime creates the
    // container. An attacker in another container that shares the volume can make this exchange.
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
        ensure_eq!(
            stat["kind"],
            "character device",
            "the file type of the masked /proc/keys"
        );
        ensure_eq!(
            stat["device"],
            json!([1, 3]),
            "the device numbers of the masked /proc/keys"
        );
    }
    ensure!(
        made > 0,
        "no container was created at all, so the race was not tested"
    );
    ensure_eq!(
        fs::read_to_string(CORE_PATTERN)?,
        before,
        "the content of the host's core_pattern"
    );
    note(format!(
        "CVE-2025-31133: the runtime created {made} of {} containers, while the attacker exchanged two files {} times",
        rounds(),
        race.times()
    ));
    Ok(())
}

fn cve_2025_52565_dev_console_is_the_terminal_that_the_runtime_opened() -> Result {
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
        ensure_eq!(
            fs::read_to_string(CORE_PATTERN)?,
            before,
            "the content of the host's core_pattern"
        );
    }
    ensure!(
        made > 0,
        "no container was created at all, so the race was not tested"
    );
    note(format!(
        "CVE-2025-52565: the runtime created {made} of {} containers, while the attacker exchanged two files {} times",
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
        ensure_eq!(
            fs::read_to_string(CORE_PATTERN)?,
            before,
            "the content of the host's core_pattern"
        );
    }
    Ok(())
}

fn special_files_neither_block_nor_deceive_the_runtime() -> Result {
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
    // The mount point /etc/hosts is a FIFO. /etc/passwd, in which the runtime looks up users, is
    // also a FIFO.
    let mut bundle = Bundle::new(&["cat", "/etc/hosts"])?;
    fifo(bundle.join("rootfs/etc/hosts"))?;
    fifo(bundle.join("rootfs/etc/passwd"))?;
    bundle.add("/mounts", bind("/etc/hosts"));
    ensure_eq!(
        bundle.run()?.stdout,
        "text",
        "the content of the file mounted on a FIFO"
    );
    // The mount point /etc/hosts is a block device.
    let mut bundle = Bundle::new(&["cat", "/etc/hosts"])?;
    let node = bundle.join("rootfs/etc/hosts");
    mknod(
        &node,
        SFlag::S_IFBLK,
        Mode::from_bits_truncate(0o600),
        makedev(8, 0),
    )?;
    bundle.add("/mounts", bind("/etc/hosts"));
    ensure_eq!(
        bundle.run()?.stdout,
        "text",
        "the content of the file mounted on a device"
    );
    // The runtime must refuse a FIFO in each of these roles: program, working directory, mount
    // point of a tmpfs, root file system.
    for (pointer, value, role) in [
        ("/process/args", json!(["/etc/fifo"]), "program"),
        ("/process/cwd", json!("/etc/fifo"), "working directory"),
        (
            "/mounts/1/destination",
            json!("/etc/fifo"),
            "mount point of a tmpfs",
        ),
        ("/root/path", json!("rootfs/etc/fifo"), "root file system"),
    ] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        fifo(bundle.join("rootfs/etc/fifo"))?;
        bundle.set(pointer, value);
        let output = bundle.call(&["run"])?.end()?;
        ensure!(
            output.code == 1,
            "the runtime accepts a FIFO as the {role}:\n{}",
            output.told()
        );
    }
    let mut bundle = Bundle::new(&["exit", "0"])?;
    remove_dev_mounts(&mut bundle);
    fifo(bundle.join("rootfs/dev/null"))?;
    bundle.call(&["run"])?.end()?;
    Ok(())
}

fn a_special_file_is_refused_as_configuration_and_as_namespace() -> Result {
    let mode = Mode::from_bits_truncate(0o600);
    type Make = fn(&Path, Mode) -> nix::Result<()>;
    let places: [(&str, Make); 2] = [
        ("a FIFO", nix::unistd::mkfifo),
        ("a character device", |path, mode| {
            mknod(path, SFlag::S_IFCHR, mode, makedev(10, 200))
        }),
    ];
    for (what, make) in places {
        let words = format!("it is {what}, not a regular file");
        let bundle = Bundle::new(&["exit", "0"])?;
        let path = bundle.join("config.json");
        let _ = fs::remove_file(&path);
        make(&path, mode)?;
        refused(&bundle, &[&words])?;
        for kind in ["network", "user"] {
            let mut bundle = Bundle::new(&["exit", "0"])?;
            let path = bundle.join("namespace");
            make(&path, mode)?;
            bundle.without_namespace(kind);
            bundle.add("/linux/namespaces", json!({ "type": kind, "path": path }));
            bundle.write_config()?;
            refused(&bundle, &[&words])?;
        }
    }
    Ok(())
}

fn the_runtime_does_not_wait_for_a_fifo_on_its_command_line() -> Result {
    let bundle = Bundle::new(&["sleep", "600"])?;
    let fifo = |name: &str| -> Result<PathBuf> {
        let path = bundle.join(name);
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600))?;
        Ok(path)
    };
    // The runtime writes the process id to the file `.pid`, and renames this file to `pid`.
    let pid = fifo("pid")?;
    fifo(".pid")?;
    bundle.write_config()?;
    let create = bundle.runtime(&["create", "--pid-file"]);
    create.arg(&pid).arg(bundle.id()).ok()?;
    ensure_eq!(
        fs::read_to_string(&pid)?,
        bundle.pid()?.to_string(),
        "the content of the file with the process id"
    );
    bundle.runtime(&["start", bundle.id()]).ok()?;
    let fifo = fifo("fifo")?;
    for (command, flag, code) in [("exec", "--process", 255), ("update", "--resources", 1)] {
        let run = bundle.runtime(&[command, flag]).arg(&fifo);
        let output = run.arg(bundle.id()).exits(code)?;
        complaint(&output, &["it is a FIFO, not a regular file"])?;
    }
    bundle.end()?;
    Ok(())
}

fn the_runtime_opens_no_device_file_in_a_root_file_system() -> Result {
    let mut bundle = Bundle::new(&["report"])?;
    bundle.set("/process/env", json!(["PATH=/bin"]));
    bundle.add(
        "/mounts",
        json!({
            "destination": "/data", "type": "tmpfs", "source": "x", "options": ["tmpcopyup"],
        }),
    );
    // All devices are allowed, as in a privileged container.
    bundle.set(
        "/linux/resources/devices",
        json!([{ "allow": true, "access": "rwm" }]),
    );
    fs::create_dir_all(bundle.join("rootfs/data"))?;
    fs::create_dir_all(bundle.join("rootfs/etc"))?;
    fs::write(bundle.join("rootfs/data/file"), "text")?;
    fs::write(
        bundle.join("rootfs/etc/passwd"),
        "root:x:0:0::/from/passwd:/bin/sh\n",
    )?;
    let report = bundle.report()?;
    ensure_eq!(
        report["env"]["HOME"],
        "/from/passwd",
        "the variable HOME, which the runtime must read from the image's /etc/passwd (the container's report: {report})"
    );

    for path in ["etc/passwd", "data/node"] {
        let path = bundle.join("rootfs").join(path);
        let _ = fs::remove_file(&path);
        let mode = Mode::from_bits_truncate(0o666);
        // This device is /dev/zero, which can always be opened. So if the runtime opened the
        // device, the open would succeed and the trace would contain its path.
        mknod(&path, SFlag::S_IFCHR, mode, makedev(1, 5))?;
    }
    let traces = bundle.join("traces");
    let output = strace_opens(&traces)?
        .args([runtime_program().as_str(), "--root"])
        .arg(bundle.root())
        .args(["run", bundle.id()])
        .dir(bundle.path())
        .ok()?;
    let report: Value = serde_json::from_str(output.text())?;
    ensure_eq!(
        report["env"]["HOME"],
        "/",
        "the variable HOME in a container whose /etc/passwd is a device (the container's report: {report})"
    );
    // The runtime copies the device node without opening it.
    only_looked_up(&traces, "node")?;
    let looked_up = only_looked_up(&traces, "etc/passwd")?;
    ensure!(looked_up, "the runtime did not look up /etc/passwd");
    Ok(())
}

/// Returns a directory of the host that contains only the regular file `ptmx`.
fn volume_with_ptmx() -> Result<Directory> {
    let volume = Directory::new("volume")?;
    fs::write(volume.join("ptmx"), "kept")?;
    Ok(volume)
}

/// Checks that the runtime refuses the container, and that it does not change the volume.
fn refused_without_changes(bundle: &Bundle, volume: &Directory, words: &str) -> Result {
    bundle.write_config()?;
    refused(bundle, &[words])?;
    let mut names = Vec::new();
    for entry in fs::read_dir(volume.path())? {
        names.push(entry?.file_name());
    }
    ensure_eq!(names, ["ptmx"], "the files in the volume of the host");
    ensure_eq!(
        fs::read_to_string(volume.join("ptmx"))?,
        "kept",
        "the content of a file in the volume of the host"
    );
    Ok(())
}

fn bind(source: &Path, destination: &str) -> Value {
    json!({
        "destination": destination, "type": "bind", "source": source, "options": ["rbind"],
    })
}

fn the_runtime_creates_no_devices_in_a_volume_to_which_a_link_at_dev_leads() -> Result {
    let volume = volume_with_ptmx()?;
    for target in [
        "/data",
        "data",
        "../../data",
        "/data/below",
        "/other",
        "dev",
    ] {
        for volume_is_first in [false, true] {
            let mut bundle = Bundle::new(&["exit", "0"])?;
            fs::remove_dir(bundle.join("rootfs/dev"))?;
            symlink(target, bundle.join("rootfs/dev"))?;
            symlink("data", bundle.join("rootfs/other"))?;
            bundle.add("/mounts", bind(volume.path(), "/data"));
            if volume_is_first && let Some(mounts) = bundle.config["mounts"].as_array_mut() {
                mounts.rotate_right(1);
            }
            let refusal = "/dev in the container is a symbolic link";
            refused_without_changes(&bundle, &volume, refusal)?;
            // The mounts below /dev come before the mount at /dev.
            if let Some(mounts) = bundle.config["mounts"].as_array_mut() {
                mounts.reverse();
                mounts.sort_by_key(|mount| mount["destination"] != "/data");
            }
            refused_without_changes(&bundle, &volume, refusal)?;
            remove_dev_mounts(&mut bundle);
            refused_without_changes(&bundle, &volume, refusal)?;
        }
    }
    Ok(())
}

fn the_runtime_creates_no_devices_in_a_volume_to_which_another_link_leads() -> Result {
    let volume = volume_with_ptmx()?;
    for (link, target, device) in [
        ("dev/net", "/data", "/dev/net/tun"),
        ("dev/net", "../data", "/dev/net/below/tun"),
        ("opt", "data", "/opt/tun"),
        ("opt", "/data/missing", "/opt/below/tun"),
        ("data/unused", "/", "/data/tun"),
    ] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        symlink(target, bundle.join("rootfs").join(link))?;
        remove_dev_mounts(&mut bundle);
        bundle.add("/mounts", bind(volume.path(), "/data"));
        bundle.add("/linux/devices", tun(device));
        let refusal = "its path leads to another mount than the root directory and /dev";
        refused_without_changes(&bundle, &volume, refusal)?;
    }

    // The volume contains the node already.
    let node = volume.join("tun");
    mknod(
        &node,
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o666),
        makedev(10, 200),
    )?;
    let mut bundle = Bundle::new(&["stat", "/data/tun"])?;
    bundle.add("/mounts", bind(volume.path(), "/data"));
    bundle.add("/linux/devices", tun("/data/tun"));
    bundle.run()?;

    // The link leads to a directory of the root file system.
    let mut bundle = Bundle::new(&["stat", "/run/below/tun"])?;
    fs::create_dir(bundle.join("rootfs/var"))?;
    symlink("/run", bundle.join("rootfs/var/run"))?;
    bundle.add("/linux/devices", tun("/var/run/below/tun"));
    let stat = bundle.run()?.json()?;
    ensure_eq!(
        stat["device"],
        json!([10, 200]),
        "the device number of the node"
    );
    Ok(())
}

fn tun(path: &str) -> Value {
    json!({ "path": path, "type": "c", "major": 10, "minor": 200 })
}

fn a_volume_must_not_replace_dev_through_a_link() -> Result {
    let volume = volume_with_ptmx()?;
    for target in ["/dev", "dev", "tmp/../dev"] {
        let mut bundle = Bundle::new(&["exit", "0"])?;
        symlink(target, bundle.join("rootfs/link"))?;
        bundle.add("/mounts", bind(volume.path(), "/link"));
        refused_without_changes(&bundle, &volume, "/link in the container leads to /dev")?;
        remove_dev_mounts(&mut bundle);
        refused_without_changes(&bundle, &volume, "/link in the container leads to /dev")?;
    }
    // The link can lead to another directory of the container.
    let mut bundle = Bundle::new(&["cat", "/data/ptmx"])?;
    symlink("/data", bundle.join("rootfs/link"))?;
    bundle.add("/mounts", bind(volume.path(), "/link"));
    ensure_eq!(
        bundle.run()?.stdout,
        "kept",
        "the content of a file in the volume"
    );
    Ok(())
}

fn the_runtime_does_not_change_the_hosts_dev() -> Result {
    let names = || -> Result<Vec<_>> {
        let mut all = Vec::new();
        for entry in fs::read_dir("/dev")? {
            let entry = entry?;
            all.push((
                entry.file_name(),
                entry.file_type()?,
                fs::read_link(entry.path()).ok(),
            ));
        }
        all.sort_by(|(one, ..), (other, ..)| one.cmp(other));
        Ok(all)
    };
    let before = names()?;
    let mut bundle = Bundle::new(&["stat", "/dev/null"])?;
    remove_dev_mounts(&mut bundle);
    bundle.add("/mounts", bind(Path::new("/dev"), "/dev"));
    ensure_eq!(
        bundle.run()?.json()?["device"],
        json!([1, 3]),
        "the number of the device /dev/null"
    );
    ensure_eq!(names()?, before, "the files in the host's /dev");
    Ok(())
}

/// Returns the time of the last change of the host's /dev/null, in seconds and nanoseconds.
fn null_change_time() -> std::io::Result<(i64, i64)> {
    fs::metadata("/dev/null").map(|file| (file.ctime(), file.ctime_nsec()))
}

/// The caller's standard input is the host's /dev/null. In a container without a user namespace, the
/// program is the owner of this file, and could change its mode with fchmod(2).
/// A program that watches the host's /dev/null with inotify(7) slows down all programs that use it.
fn a_masked_file_is_not_the_hosts_null_device() -> Result {
    let bundle = Bundle::new(&["sleep", "1000"])?;
    bundle.start()?;
    let id = |path: &Path| {
        let stat = fs::metadata(path)?;
        Ok::<_, std::io::Error>((stat.dev(), stat.ino()))
    };
    let root = PathBuf::from(format!("/proc/{}/root", bundle.pid()?));
    let masked = id(&root.join("proc/keys"))?;
    ensure!(
        masked != id(Path::new("/dev/null"))?,
        "the masked /proc/keys is the host's /dev/null"
    );
    ensure_eq!(
        masked,
        id(&root.join("dev/null"))?,
        "the file that masks /proc/keys"
    );
    bundle.end().map(drop)
}

fn a_standard_stream_is_not_the_hosts_null_device() -> Result {
    let before = null_change_time()?;
    let change = ["call", &libc::SYS_fchmod.to_string(), "0", "438"];
    let mut bundle = Bundle::new(&change)?;
    ensure_eq!(
        bundle.run()?.text(),
        "0",
        "the result of fchmod(2) in `run`"
    );
    bundle.args(&["sleep", "1000"]).start()?;
    let null = PathBuf::from(format!("/proc/{}/root/dev/null", bundle.pid()?));
    bundle.exec(&[], &change).ok()?;
    // `exec` cannot trust the container's /dev/null.
    fs::remove_file(&null)?;
    bundle.exec(&[], &change).ok()?;
    fs::write(&null, "no device")?;
    bundle.exec(&[], &change).ok()?;
    fs::remove_file(&null)?;
    symlink("zero", &null)?;
    bundle.exec(&[], &change).ok()?;
    let read = bundle.exec(&[], &["cat"]).ok()?;
    ensure_eq!(read.stdout, "", "the data in the standard input");
    bundle.end()?;
    ensure_eq!(
        null_change_time()?,
        before,
        "the time of the last change of the host's /dev/null"
    );
    Ok(())
}

/// A process of the container can replace /dev with a link to `/proc/PID/root/dev`, where the process
/// PID is in the host's root.
fn a_link_at_dev_does_not_lead_exec_to_the_hosts_null_device() -> Result {
    let before = null_change_time()?;
    let mut bundle = Bundle::new(&["sleep", "1000"])?;
    remove_dev_mounts(&mut bundle);
    bundle.without_namespace("pid").start()?;
    let dev = bundle.rootfs().join("dev");
    fs::rename(&dev, bundle.rootfs().join("old-dev"))?;
    symlink("/proc/1/root/dev", &dev)?;
    let change = ["call", &libc::SYS_fchmod.to_string(), "0", "438"];
    ensure_eq!(
        bundle.exec(&[], &change).ok()?.text(),
        "0",
        "the result of fchmod(2) in `exec`"
    );
    bundle.end()?;
    ensure_eq!(
        null_change_time()?,
        before,
        "the time of the last change of the host's /dev/null"
    );
    Ok(())
}
