//! Checks a configuration without changing the node. If a configuration has several mistakes, the
//! error describes only the first one in the order of the checks.

use std::path::{Path, PathBuf};

use super::error::ConfigError;
use super::runtime_handler::RuntimeHandler;
use super::table::Config;
use crate::cgroup;
use crate::container::seccomp::SeccompProfile;
use crate::streaming::tls;

/// Returns the configuration in the form that the server uses. Defaults that depend on other keys
/// or on the node are filled in, and values are normalised. This call blocks on disk I/O.
pub(super) fn checked(mut config: Config) -> Result<Config, ConfigError> {
    look_up_programs(&mut config);
    listen(&config)?;
    streams(&config)?;
    terminals(&config)?;
    default_runtime(&config)?;
    cgroup_parent(&mut config)?;
    for dir in &config.cdi_spec_dirs {
        absolute("cdi_spec_dirs", dir)?;
    }
    seccomp_profile(&mut config)?;
    selinux_categories(&config)?;
    paths(&config)?;
    config.cni.check().map_err(refused)?;
    config.image.check().map_err(refused)?;
    let (cert, key) = (&config.stream_tls_cert, &config.stream_tls_key);
    tls::acceptor(cert.as_ref(), key.as_ref()).map_err(refused)?;
    config.network.check().map_err(refused)?;
    Ok(config)
}

fn refused((key, reason): (&'static str, String)) -> ConfigError {
    ConfigError::Value { key, reason }
}

/// Adds the built-in rrun handler to the runtimes, and looks up the binaries of all runtimes and of
/// the monitor.
pub(super) fn look_up_programs(config: &mut Config) {
    let name = RuntimeHandler::BUILT_IN.to_owned();
    let built_in = config.runtimes.entry(name);
    built_in.or_insert_with(RuntimeHandler::built_in);
    for handler in config.runtimes.values_mut() {
        handler.path = look_up(&handler.path);
    }
    config.monitor = look_up(&config.monitor);
}

/// If the name `program` contains no slash, looks up the program in the directory of rrun-cri, then
/// in PATH. If the program is not found, returns the name unchanged. The server then reports the
/// error when it runs the program.
fn look_up(program: &Path) -> PathBuf {
    if program.components().count() != 1 || program.is_absolute() {
        return program.to_owned();
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(Path::to_owned));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| program.to_owned())
}

fn listen(config: &Config) -> Result<(), ConfigError> {
    let listen = &config.listen;
    match listen.strip_prefix("unix://") {
        Some(path) if path.starts_with('/') => Ok(()),
        _ => {
            let reason = format!("{listen:?} must be unix:// followed by an absolute path");
            Err(refused(("listen", reason)))
        }
    }
}

fn streams(config: &Config) -> Result<(), ConfigError> {
    let lonely = match (&config.stream_tls_cert, &config.stream_tls_key) {
        (Some(_), None) => Some(("stream_tls_cert", "stream_tls_key")),
        (None, Some(_)) => Some(("stream_tls_key", "stream_tls_cert")),
        _ => None,
    };
    if let Some((key, missing)) = lonely {
        let reason =
            format!("a certificate and its key must be set together: {missing} is missing");
        return Err(refused((key, reason)));
    }
    if config.stream_idle_timeout == 0 {
        let reason = "a timeout of 0 s would close every stream immediately".to_owned();
        return Err(refused(("stream_idle_timeout", reason)));
    }
    Ok(())
}

fn terminals(config: &Config) -> Result<(), ConfigError> {
    /// The largest value of devpts's option `max`, `NR_UNIX98_PTY_MAX` in linux/devpts_fs.h.
    const MOST: u32 = 1 << 20;
    if config.container_terminals.get() > MOST {
        let reason = format!("the value must be at most {MOST}");
        return Err(refused(("container_terminals", reason)));
    }
    Ok(())
}

fn default_runtime(config: &Config) -> Result<(), ConfigError> {
    let name = &config.default_runtime;
    if config.runtimes.contains_key(name) {
        return Ok(());
    }
    let reason = format!("the section [runtime.{name}] does not exist");
    Err(refused(("default_runtime", reason)))
}

/// Normalises default_cgroup_parent. The default and the required form of this key's value depend
/// on the cgroup driver.
fn cgroup_parent(config: &mut Config) -> Result<(), ConfigError> {
    let parent = cgroup::of_pod(config.cgroup_driver, config.default_cgroup_parent());
    let parent = parent.map_err(|error| refused(("default_cgroup_parent", error.to_string())))?;
    config.default_cgroup_parent = Some(parent);
    Ok(())
}

/// Checks unset_seccomp_profile and stores its canonical name.
fn seccomp_profile(config: &mut Config) -> Result<(), ConfigError> {
    let profile = SeccompProfile::parse(&config.unset_seccomp_profile)
        .map_err(|reason| refused(("unset_seccomp_profile", reason)))?;
    config.unset_seccomp_profile = profile.to_string();
    Ok(())
}

fn selinux_categories(config: &Config) -> Result<(), ConfigError> {
    let categories = config.selinux_category_range;
    if (2..=1024).contains(&categories) {
        return Ok(());
    }
    let reason = format!("{categories} is outside the range 2 to 1024");
    Err(refused(("selinux_category_range", reason)))
}

fn paths(config: &Config) -> Result<(), ConfigError> {
    for dir in config.cni_bin_dirs() {
        absolute("cni_bin_dir", &dir)?;
    }
    for (key, path) in [
        ("state", Some(&config.state)),
        ("root", Some(&config.root)),
        ("netns_dir", Some(&config.netns_dir)),
        ("cni_conf_dir", Some(&config.cni_conf_dir)),
        ("registry_config_path", Some(&config.registry_config_path)),
        ("stream_tls_cert", config.stream_tls_cert.as_ref()),
        ("stream_tls_key", config.stream_tls_key.as_ref()),
    ] {
        if let Some(path) = path {
            absolute(key, path)?;
        }
    }
    Ok(())
}

fn absolute(key: &'static str, path: &Path) -> Result<(), ConfigError> {
    if path.is_absolute() {
        return Ok(());
    }
    let reason = format!("{} is not an absolute path", path.display());
    Err(refused((key, reason)))
}
