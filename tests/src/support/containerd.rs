//! A containerd with its own directories, which tests control with ctr.

use crate::support::caller::Leftovers;
use crate::support::machine::{Directory, Result, Run, Running, command, wait_for};
use crate::support::needs::Need;

pub(crate) const CTR: Need = Need::Program("ctr");
pub(crate) const CONTAINERD: Need = Need::Program("containerd");

/// The paths that containerd uses outside its own directory. Shims create their sockets at fixed
/// paths, and containers in containerd's namespace `default` have cgroups below the cgroup
/// `default`.
const SHARED: &[&str] = &[
    "/run/containerd",
    "/var/lib/containerd",
    "/sys/fs/cgroup/default",
];

pub(crate) struct Containerd {
    server: Option<Running>,
    _leftovers: Leftovers,
    pub(crate) directory: Directory,
}

impl Containerd {
    pub(crate) fn start() -> Result<Containerd> {
        let directory = Directory::new("containerd")?;
        let at = |name: &str| directory.join(name).display().to_string();
        std::fs::write(
            directory.join("config.toml"),
            format!(
                "version = 3\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.cri.v1.images\", \
                 \"io.containerd.cri.v1.runtime\", \"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{}\"\n",
                at("root"),
                at("state"),
                at("socket"),
            ),
        )?;
        let leftovers = Leftovers::of(directory.path(), SHARED);
        let server = command("containerd", ["--config", &at("config.toml")]).start()?;
        let containerd = Containerd {
            server: Some(server),
            _leftovers: leftovers,
            directory,
        };
        wait_for("containerd to respond to `ctr version`", || {
            let output = containerd.ctr(&["version"]).end()?;
            Ok((output.code == 0).then_some(()))
        })?;
        Ok(containerd)
    }

    /// Returns the words with which a command calls ctr.
    pub(crate) fn client(&self) -> Vec<String> {
        let socket = self.directory.join("socket").display().to_string();
        vec!["ctr".to_owned(), "--address".to_owned(), socket]
    }

    pub(crate) fn ctr(&self, args: &[&str]) -> Run {
        command("env", self.client()).args(args)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.signal(nix::sys::signal::Signal::SIGTERM);
            let _ = server.end();
        }
    }
}
