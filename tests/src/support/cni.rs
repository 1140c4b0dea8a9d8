//! CNI on a node. This module defines what the tests of CNI plugins require from the machine. It
//! also writes the configuration of the plugins, and removes the files of the plugins.

use std::fs;
use std::path::Path;

use crate::support::machine::Result;
use crate::support::needs::Need;
use crate::support::node::Node;

/// Debian's CNI plugins.
pub(crate) const PLUGINS: Need = Need::File("/usr/lib/cni/bridge");

/// A machine on which iptables works. The CNI plugins `portmap` and `firewall` call iptables.
pub(crate) const FIREWALL: Need = Need::Works(
    "working iptables, which the CNI plugins portmap and firewall call",
    "iptables -w -t nat -S && ip6tables -w -t nat -S && iptables -w -S",
);

/// Writes a CNI configuration file and renames it to its final name, as the installers of CNI
/// plugins do.
pub(crate) fn write(node: &Node, file: &str, text: &str) -> Result {
    let new = node.join("cni").join(format!(".{file}"));
    fs::write(&new, text)?;
    Ok(fs::rename(new, node.join("cni").join(file))?)
}

/// Removes the files that CNI plugins store outside the test's directories.
pub(crate) fn tidy() {
    // On a machine with systemd, the tmpfiles.d entry of the plugins' package created the parent
    // directory /var/lib/cni/networks at boot. So this function removes only the test's own
    // directory there.
    let leases = if Path::new("/run/systemd/system").exists() {
        "/var/lib/cni/networks/wire"
    } else {
        "/var/lib/cni"
    };
    for file in ["/run/xtables.lock", "/run/cni", "/run/e2e-cni", leases] {
        let _ = fs::remove_file(file);
        let _ = fs::remove_dir_all(file);
    }
}
