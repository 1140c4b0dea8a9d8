//! Starts and stops servers with scripts.

use std::fs::File;
use std::process::{Command, Stdio};

use crate::Result;

/// The path of the checkout in the native view and in the guest machine.
const SOURCE: &str = "/src";

/// A server that runs until this value is dropped.
pub(crate) struct Service {
    script: String,
    stop: Vec<String>,
    environment: Vec<(String, String)>,
    /// The server's address, if its script prints one.
    pub(crate) address: String,
}

impl Service {
    /// Starts the registry, containerd or rrun-cri.
    pub(crate) fn start(name: &str) -> Result<Self> {
        Self::with(name, &[])
    }

    /// Starts the registry, containerd or rrun-cri, with additional environment variables for its
    /// script.
    pub(crate) fn with(name: &str, environment: &[(&str, &str)]) -> Result<Self> {
        let (start, stop) = (["start", name], ["stop", name]);
        Self::run_script("tests/bench/server", &start, &stop, environment)
    }

    /// Starts kubelet for the server at `address`. kubelet reads the pods in the directory
    /// `manifests`.
    pub(crate) fn kubelet(
        address: &str,
        manifests: &str,
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let start = ["start", address, manifests];
        Self::run_script("tests/setup/kubelet.sh", &start, &["stop"], environment)
    }

    fn run_script(
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

    /// Returns whether the server was started with the name `name`.
    pub(crate) fn is_named(&self, name: &str) -> bool {
        self.stop.iter().any(|word| word == name)
    }

    /// Stops the server. [`Service::begin`] can start it again.
    pub(crate) fn end(&self) -> Result {
        self.call(&self.stop).map(|_| ())
    }

    /// Starts the server again. The returned process is the script. The script exits when the
    /// server answers.
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

    /// Runs the script and returns the last line of its output.
    fn call<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Result<String> {
        // The output is written to a file. The server would keep a pipe open, and this program
        // would never reach the end of the script's output.
        let output =
            std::env::temp_dir().join(format!("rrun-bench-service-{}", std::process::id()));
        let status = Command::new(&self.script)
            .args(arguments)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(File::create(&output)?)
            .stderr(std::fs::OpenOptions::new().append(true).open(&output)?)
            .status()
            .map_err(|error| format!("{}: {error}", self.script))?;
        let text = std::fs::read_to_string(&output)?;
        let _ = std::fs::remove_file(&output);
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
