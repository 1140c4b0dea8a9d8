//! CNI on a node: what Debian's plugins need, their configuration, and what they leave.

use std::fs;
use std::path::Path;

use crate::support::machine::Result;
use crate::support::needs::Need;
use crate::support::node::Node;

/// Debian's CNI plugins.
pub(crate) const PLUGINS: Need = Need::File("/usr/lib/cni/bridge");

/// A kernel whose iptables the plugins portmap and firewall can call.
pub(crate) const FIREWALL: Need = Need::Works(
    "iptables, which the plugins portmap and firewall call",
    "iptables -w -t nat -S && ip6tables -w -t nat -S && iptables -w -S",
);

/// Puts a configuration file in its place, as installers do.
pub(crate) fn write(node: &Node, file: &str, text: &str) -> Result {
    let new = node.join("cni").join(format!(".{file}"));
    fs::write(&new, text)?;
    Ok(fs::rename(new, node.join("cni").join(file))?)
}

/// What plugins keep outside of their configuration's reach.
pub(crate) fn tidy() {
    // Where systemd is, the package's tmpfiles.d has made this one, empty, at boot.
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
