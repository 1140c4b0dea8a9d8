//! The files of a pod: its directory, what its containers see in /etc, and /dev/shm.

use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rrun_proto::v1::DnsConfig;

use crate::selinux::label::Label;
use crate::selinux::relabel;
use rrun_calls::error::{During, Error, Result};

/// Bytes; what Docker and containerd give.
const SHM_SIZE: &str = "64m";

/// The most that is copied of a file of the node's /etc.
const MAX_COPY_BYTES: u64 = 1 << 20;

/// Makes a directory that only root reads; parents too.
pub(crate) fn private_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .during(|| format!("make the directory {}", path.display()))
}

pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).during(|| format!("write {}", path.display()))
}

/// Writes a record that a kill at any instruction leaves whole, in its old or its new form.
pub(crate) fn write_record<T: serde::Serialize>(path: &Path, record: &T) -> Result<()> {
    let what = || format!("write the record {}", path.display());
    let json = serde_json::to_vec(record)
        .map_err(io::Error::from)
        .during(what)?;
    let new = path.with_extension("json.new");
    std::fs::write(&new, json).during(what)?;
    std::fs::rename(&new, path).during(what)
}

/// A record as [`write_record`] left it; `None` if there is none.
pub(crate) fn read_record<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// What containers see of a pod's files.
const POD_FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Gives them, as far as they are there, an SELinux label.
pub(crate) fn label(dir: &Path, label: &Label) -> Result<()> {
    for path in POD_FILES.map(|name| dir.join(name)) {
        if path.exists() {
            relabel::one(&path, label)?;
        }
    }
    Ok(())
}

/// Gives what containers see of the pod's files to the root of its user namespace.
pub(crate) fn give_to(dir: &Path, (uid, gid): (u32, u32)) -> Result<()> {
    for name in POD_FILES {
        let path = dir.join(name);
        match std::os::unix::fs::lchown(&path, Some(uid), Some(gid)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).during(|| format!("give {} to {uid}:{gid}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Lets the runtime, once it is in the pod's user namespace, come to the bundles: anybody who knows
/// what to ask for can pass through the directories that all pods are in, the group of the pod's
/// root through the pod's own.
pub(crate) fn let_through(all: &[&Path], own: &[&Path], gid: u32) -> Result<()> {
    let set = |path: &Path, mode: u32| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
            .during(|| format!("set the mode of {}", path.display()))
    };
    for path in all {
        set(path, 0o711)?;
    }
    for path in own {
        std::os::unix::fs::lchown(path, None, Some(gid))
            .during(|| format!("give {} to the group {gid}", path.display()))?;
        set(path, 0o710)?;
    }
    Ok(())
}

/// Mounts the /dev/shm that the containers of the pod share, for this user and group, with this
/// SELinux label.
pub(crate) fn mount_shm(
    path: &Path,
    root: Option<(u32, u32)>,
    label: Option<&Label>,
) -> Result<()> {
    std::fs::create_dir_all(path).during(|| format!("make the directory {}", path.display()))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let (uid, gid) = root.unwrap_or_default();
    let mut data = format!("mode=1777,size={SHM_SIZE},uid={uid},gid={gid}");
    if let Some(label) = label {
        data += &label.as_mount_option();
    }
    mount(Some("shm"), path, Some("tmpfs"), flags, Some(data.as_str()))
        .map_err(io::Error::from)
        .during(|| format!("mount a tmpfs on {}", path.display()))
}

/// Unmounts whatever is mounted on `path`, every layer of it. Right also when nothing is.
pub(crate) fn unmount(path: &Path) -> Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(errno) => {
                return Err(io::Error::from(errno))
                    .during(|| format!("unmount {}", path.display()));
            }
        }
    }
}

/// Removes a directory and what is in it. Right also when nothing is there.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).during(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Refuses what would be another line, or another word, of resolv.conf(5).
pub(crate) fn check_dns(dns: &DnsConfig) -> Result<()> {
    let fields = [
        ("servers", &dns.servers),
        ("searches", &dns.searches),
        ("options", &dns.options),
    ];
    for (field, words) in fields {
        let odd = |word: &&String| {
            word.is_empty() || word.contains(|c: char| c.is_whitespace() || c.is_control())
        };
        if let Some(word) = words.iter().find(odd) {
            return Err(Error::invalid(format!(
                "the pod's dns_config.{field} has {word:?}, which is not one word"
            )));
        }
    }
    Ok(())
}

/// resolv.conf(5) of the pod's DNS configuration; without one, the node's.
pub(crate) fn resolv_conf(dns: Option<&DnsConfig>) -> String {
    let Some(dns) = dns.filter(|dns| **dns != DnsConfig::default()) else {
        return of_node("/etc/resolv.conf");
    };
    let mut text = String::new();
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    text
}

/// hosts(5) of a pod with a network of its own. Kubelet mounts its own over it.
pub(crate) fn hosts(hostname: &str, addresses: &[IpAddr]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    if !hostname.is_empty() {
        for address in addresses {
            let _ = writeln!(text, "{address}\t{hostname}");
        }
    }
    text
}

/// A file of the node for pods in the node's network; empty if there is none.
pub(crate) fn of_node(path: &str) -> String {
    let mut text = String::new();
    if let Ok(file) = std::fs::File::open(path) {
        let _ = io::Read::read_to_string(&mut io::Read::take(file, MAX_COPY_BYTES), &mut text);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_a_line_per_server() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.10".into(), "fd00::a".into()],
            searches: vec!["a.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(Some(&dns)),
            "search a.svc svc\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n"
        );
    }

    #[test]
    fn the_pods_name_has_the_pods_address() {
        let addresses = [
            IpAddr::from([10, 88, 0, 5]),
            IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 5]),
        ];
        assert!(hosts("web", &addresses).ends_with("10.88.0.5\tweb\nfd00::5\tweb\n"));
        assert!(!hosts("", &addresses).contains("10.88"));
    }
}
