//! Functions that the commands `create` and `run` share.

use std::path::Path;

use crate::arguments::Arguments;
use crate::commands::globals::{Globals, pidfd_socket};
use crate::config::Config;
use crate::error::Result;
use crate::lifecycle::container_dir::directory;
use crate::lifecycle::create::CreateRequest;
use crate::lifecycle::notify_socket::{self, ServiceManager};
use crate::process::descriptors::Descriptors;

/// Returns the service manager that NOTIFY_SOCKET in rrun's environment specifies. Returns `None`
/// if this variable is not set. If the variable is set, this function also adds the mount of a
/// notification socket to `config`, and sets NOTIFY_SOCKET in the container's environment.
pub(crate) fn service_manager(
    globals: &Globals,
    id: &str,
    config: &mut Config,
) -> Result<Option<ServiceManager>> {
    let manager = ServiceManager::from_environment()?;
    if manager.is_some() {
        let directory = directory(&globals.root, id)?;
        let mount = notify_socket::mount(&directory, config.mounts.len())?;
        config.add_mount(mount, notify_socket::variable());
    }
    Ok(manager)
}

/// Returns the request to create the container that the flags describe. In this request, `waits` is
/// false, so the container does not wait for `start`.
pub(crate) fn request<'a>(
    globals: &'a Globals,
    arguments: &'a Arguments,
    config: &'a Config,
) -> Result<CreateRequest<'a>> {
    Ok(CreateRequest {
        root: &globals.root,
        id: arguments.container_id()?,
        config,
        waits: false,
        console_socket: None,
        pidfd_socket: pidfd_socket(arguments)?,
        pid_file: arguments.value("pid-file").map(Path::new),
        no_pivot: arguments.is_set("no-pivot"),
        new_keyring: !arguments.is_set("no-new-keyring"),
        systemd_cgroup: globals.systemd_cgroup,
        descriptors: Descriptors::default(),
        foreground: None,
        notify: None,
    })
}
