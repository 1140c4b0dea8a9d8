//! The files of a pod: its directory, the files that its containers see in /etc, and /dev/shm.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rrun_proto::v1::DnsConfig;

use crate::selinux::label::Label;
use crate::selinux::relabel;
use rrun_calls::error::{During, Error, Result};

/// The size of /dev/shm (64 MiB), the same as with Docker and containerd.
const SHM_SIZE: &str = "64m";

/// The maximum number of inodes in /dev/shm. The kernel also subtracts 1 KiB of extended attributes
/// as one inode. Without this limit, extended attributes could use half of the node's memory,
/// because `SHM_SIZE` does not limit them. Files with content reach `SHM_SIZE` first.
const SHM_INODES: u32 = 1 << 16;

/// The size of the file system that contains the files in `POD_FILES`. Containers can write to
/// these files. Without this limit, a container could fill the file system of the server's state,
/// which all pods share. CVE-2020-8557 was a missing limit of a pod's /etc/hosts.
const ETC_SIZE: &str = "4m";

/// The maximum number of inodes in the same file system. It contains its root directory and the
/// files in `POD_FILES`. The other inodes are for extended attributes, see `SHM_INODES`.
const ETC_INODES: u32 = 16;

/// The maximum number of bytes that are copied from a file in the node's /etc.
const MAX_COPY_BYTES: u64 = 1 << 20;

/// Creates a directory and its missing parents, with access for root only.
pub(crate) fn private_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .during(|| format!("create the directory {}", path.display()))
}

/// Writes a file that the pod's containers can read.
pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).during(|| format!("write {}", path.display()))
}

/// Writes a file that only root can read. The file contains secrets, such as the environment of a
/// container.
pub(crate) fn write_secret(path: &Path, text: &[u8]) -> io::Result<()> {
    // Ours: only root can create an entry in a pod's directory.
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text)
}

/// Writes a record atomically: if the server is killed, the file contains either the old or the new
/// record.
pub(crate) fn write_record<T: serde::Serialize>(path: &Path, record: &T) -> Result<()> {
    let what = || format!("write the record {}", path.display());
    let json = serde_json::to_vec(record)
        .map_err(io::Error::from)
        .during(what)?;
    let new = path.with_extension("json.new");
    write_secret(&new, &json).during(what)?;
    std::fs::rename(&new, path).during(what)
}

/// Reads a record that [`write_record`] or the monitor wrote. Returns `None` if the record does not
/// exist or can't be parsed. Any other error must not count as a missing record, because the server
/// would then remove the object. Such an error can have a cause that passes, for example a lack of
/// descriptors, so the file is read a second time.
pub(crate) fn read_record<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    // Ours: only the server and the monitor write to this directory.
    let read = || match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    };
    let json = read().or_else(|_| read());
    let json = json.during(|| format!("read the record {}", path.display()))?;
    Ok(json.and_then(|json| serde_json::from_slice(&json).ok()))
}

/// The pod's files that containers see in /etc.
pub(crate) const POD_FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// The name of the directory that contains the files in `POD_FILES`. It is in the pod's directory.
pub(crate) const ETC: &str = "etc";

/// The name of the mount point of the pod's /dev/shm. It is in the pod's directory.
pub(crate) const SHM: &str = "shm";

/// Returns the directory of the pod's files in `POD_FILES`. `pod` is the pod's directory, which
/// contains the files itself if an older version of the server created the pod.
pub(crate) fn etc(pod: &Path) -> Result<PathBuf> {
    let dir = pod.join(ETC);
    let exists = dir.try_exists();
    let exists = exists.during(|| format!("find {}", dir.display()))?;
    Ok(if exists { dir } else { pod.to_owned() })
}

/// Mounts the file system for the pod's files in `POD_FILES`, and returns its directory.
pub(crate) fn mount_etc(pod: &Path) -> Result<PathBuf> {
    let dir = pod.join(ETC);
    let data = format!("mode=755,size={ETC_SIZE},nr_inodes={ETC_INODES}");
    mount_tmpfs(&dir, "etc", &data)?;
    Ok(dir)
}

/// Sets the SELinux label of the files in `POD_FILES` that exist.
pub(crate) fn label(pod: &Path, label: &Label) -> Result<()> {
    let dir = etc(pod)?;
    for path in POD_FILES.map(|name| dir.join(name)) {
        let exists = path.try_exists();
        if exists.during(|| format!("find {}", path.display()))? {
            relabel::one(&path, label)?;
        }
    }
    Ok(())
}

/// Makes the root user of the pod's user namespace the owner of the files in `POD_FILES`.
pub(crate) fn set_owner(pod: &Path, (uid, gid): (u32, u32)) -> Result<()> {
    let dir = etc(pod)?;
    for name in POD_FILES {
        let path = dir.join(name);
        match std::os::unix::fs::lchown(&path, Some(uid), Some(gid)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error)
                    .during(|| format!("change the owner of {} to {uid}:{gid}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Sets permissions for the runtime's access to the bundles from inside the pod's user namespace.
/// The directories in `all` are shared by all pods. Any user can then traverse these directories.
/// The directories in `own` belong to one pod, and only the group of the pod's root user can
/// traverse them.
pub(crate) fn let_through(all: &[&Path], own: &[&Path], gid: u32) -> Result<()> {
    let set = |path: &Path, mode: u32| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
            .during(|| format!("set the mode of {}", path.display()))
    };
    for path in all {
        let metadata = std::fs::metadata(path)
            .during(|| format!("read the attributes of {}", path.display()))?;
        set(path, metadata.mode() & 0o7777 | 0o011)?;
    }
    for path in own {
        std::os::unix::fs::lchown(path, None, Some(gid))
            .during(|| format!("change the group of {} to {gid}", path.display()))?;
        set(path, 0o710)?;
    }
    Ok(())
}

/// Mounts the /dev/shm that the pod's containers share. `root` contains the uid and the gid of the
/// owner of /dev/shm, and `label` is the SELinux label of /dev/shm.
pub(crate) fn mount_shm(pod: &Path, root: Option<(u32, u32)>, label: Option<&Label>) -> Result<()> {
    let (uid, gid) = root.unwrap_or_default();
    let mut data = format!("mode=1777,size={SHM_SIZE},nr_inodes={SHM_INODES},uid={uid},gid={gid}");
    if let Some(label) = label {
        data += &label.as_mount_option();
    }
    mount_tmpfs(&pod.join(SHM), "shm", &data)
}

/// Unmounts the pod's /dev/shm and the file system of the files in `POD_FILES`.
pub(crate) fn unmount_pod(pod: &Path) -> Result<()> {
    unmount(&pod.join(SHM))?;
    unmount(&pod.join(ETC))
}

/// Creates a directory and mounts a tmpfs on it. `source` is the name of the mount in
/// /proc/self/mountinfo, and `data` contains the options of the tmpfs.
fn mount_tmpfs(path: &Path, source: &str, data: &str) -> Result<()> {
    std::fs::create_dir_all(path).during(|| format!("create the directory {}", path.display()))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some(source), path, Some("tmpfs"), flags, Some(data))
        .map_err(io::Error::from)
        .during(|| format!("mount a tmpfs on {}", path.display()))
}

/// Unmounts all mounts that are stacked on `path`. A path without mounts is not an error.
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

/// Removes a directory and its contents. A missing directory is not an error.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    // A monitor that is exiting can create its log in the directory meanwhile. Other failures can
    // have a cause that passes, too, so the removal is repeated once.
    let removed = std::fs::remove_dir_all(path).or_else(|_| std::fs::remove_dir_all(path));
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).during(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Rejects values that would add a line or a word to resolv.conf(5).
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
                "the pod's dns_config.{field} contains {word:?}, which is not a single word"
            )));
        }
    }
    Ok(())
}

/// Returns the contents of resolv.conf(5) for the pod's DNS configuration. If the pod has no DNS
/// configuration, returns a copy of the node's resolv.conf.
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

/// Returns the contents of hosts(5) for a pod with its own network. Kubelet's containers do not see
/// this file, because kubelet mounts its own hosts file over it.
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

/// Reads a file of the node for a pod that uses the node's network, host name or DNS configuration.
/// Returns an empty string if the file does not exist.
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
    fn resolv_conf_has_one_line_for_each_server() {
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
    fn hosts_maps_the_pods_name_to_its_addresses() {
        let addresses = [
            IpAddr::from([10, 88, 0, 5]),
            IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 5]),
        ];
        assert!(hosts("web", &addresses).ends_with("10.88.0.5\tweb\nfd00::5\tweb\n"));
        assert!(!hosts("", &addresses).contains("10.88"));
    }

    /// The kernel supports extended attributes of users on a tmpfs since Linux 6.6. The function
    /// returns without a check on an older kernel.
    fn fill_with_attributes(file: &Path, most: usize) -> io::Result<()> {
        for number in 0..most {
            let (name, value) = (format!("user.{number}"), [1; 60_000]);
            match rustix::fs::setxattr(file, name, &value, rustix::fs::XattrFlags::CREATE) {
                Ok(()) => {}
                Err(rustix::io::Errno::NOSPC | rustix::io::Errno::OPNOTSUPP) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
        let bytes = most * 60_000;
        Err(io::Error::other(format!(
            "{} accepted {bytes} bytes of extended attributes",
            file.display()
        )))
    }

    #[test]
    fn extended_attributes_do_not_fill_the_memory_of_the_node()
    -> std::result::Result<(), Box<dyn std::error::Error>> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return Ok(());
        }
        let pod = std::env::temp_dir().join(format!("rrun-pod-files-{}", std::process::id()));
        let fill = || -> std::result::Result<(), Box<dyn std::error::Error>> {
            let etc = mount_etc(&pod).map_err(|error| error.to_string())?;
            for name in POD_FILES {
                std::fs::write(etc.join(name), name)?;
            }
            fill_with_attributes(&etc.join("hosts"), 1)?;
            mount_shm(&pod, None, None).map_err(|error| error.to_string())?;
            // As many files as SHM_SIZE has pages can have content.
            let pages = (64 << 20) / rustix::param::page_size();
            for number in 0..pages.min(1 << 14) {
                std::fs::File::create(pod.join(SHM).join(number.to_string()))?;
            }
            fill_with_attributes(&pod.join(SHM).join("0"), 2000)?;
            Ok(())
        };
        let filled = fill();
        unmount_pod(&pod).map_err(|error| error.to_string())?;
        let left = [SHM, ETC].map(|name| std::fs::read_dir(pod.join(name)).map(Iterator::count));
        std::fs::remove_dir_all(&pod)?;
        filled?;
        for left in left {
            assert_eq!(left?, 0);
        }
        Ok(())
    }
}
