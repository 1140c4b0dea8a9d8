//! Servers that are started and stopped by scripts of the test set-up.

use std::fs::File;
use std::process::{Command, Stdio};

use crate::Result;

/// Where the checkout is in a view.
const SOURCE: &str = "/src";

/// Something that runs until it is dropped.
pub(crate) struct Service {
    script: String,
    stop: Vec<String>,
    environment: Vec<(String, String)>,
    /// Where it answers, if its script tells.
    pub(crate) address: String,
}

impl Service {
    /// registry, containerd or rrun-cri.
    pub(crate) fn start(name: &str) -> Result<Self> {
        Self::with(name, &[])
    }

    /// The same, with this in its script's environment.
    pub(crate) fn with(name: &str, environment: &[(&str, &str)]) -> Result<Self> {
        let (start, stop) = (["start", name], ["stop", name]);
        Self::by("tests/bench/server", &start, &stop, environment)
    }

    /// kubelet, for the server at this address; it looks for manifests in this directory.
    pub(crate) fn kubelet(
        address: &str,
        manifests: &str,
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let start = ["start", address, manifests];
        Self::by("tests/setup/kubelet.sh", &start, &["stop"], environment)
    }

    fn by(
        script: &str,
        start: &[&str],
        stop: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let stop = stop.iter().map(|&word| word.to_owned()).collect();
        let environment = environment.iter();
        let mut service = Service {
            script: format!("{SOURCE}/{script}"),
            stop,
            environment: environment
                .map(|&(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            address: String::new(),
        };
        service.address = service.call(start)?;
        Ok(service)
    }

    /// Whether it is the one that was started by this name.
    pub(crate) fn is(&self, name: &str) -> bool {
        self.stop.iter().any(|word| word == name)
    }

    /// Stops it, for [`Service::begin`] to start it again.
    pub(crate) fn end(&self) -> Result {
        self.call(&self.stop).map(|_| ())
    }

    /// Starts it again; the script ends when it answers.
    pub(crate) fn begin(&self) -> Result<std::process::Child> {
        let start = self.stop.iter().map(|word| match word.as_str() {
            "stop" => "start",
            other => other,
        });
        Ok(Command::new(&self.script)
            .args(start)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?)
    }

    /// What the script says in its last line.
    fn call<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Result<String> {
        // A file, not a pipe, which a server would hold open.
        let said = std::env::temp_dir().join(format!("rrun-bench-service-{}", std::process::id()));
        let status = Command::new(&self.script)
            .args(arguments)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(File::create(&said)?)
            .stderr(std::fs::OpenOptions::new().append(true).open(&said)?)
            .status()
            .map_err(|error| format!("{}: {error}", self.script))?;
        let text = std::fs::read_to_string(&said)?;
        let _ = std::fs::remove_file(&said);
        if status.success() {
            Ok(text.lines().last().unwrap_or_default().trim().to_owned())
        } else {
            Err(text.trim().replace('\n', " | ").into())
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Err(error) = self.call(&self.stop) {
            eprintln!("{} {}: {error}", self.script, self.stop.join(" "));
        }
    }
}
