//! rrun, an OCI runtime: it makes, starts, enters and removes containers as the
//! specification at <https://github.com/opencontainers/runtime-spec> describes them, with
//! runc's command line.
//!
//! The modules in the order of the story: a command ([`commands`]) reads the configuration
//! ([`config`]), [`birth`] makes cgroup and process, [`init`] is that process's way to its
//! program, [`gate`] is where it waits for `start`, [`entry`] is how others join it later.

pub mod arguments;
pub mod birth;
pub mod capabilities;
pub mod cgroup;
pub mod channel;
pub mod claim;
pub mod commands;
pub mod config;
pub mod copy_up;
pub mod dbus;
pub mod descriptors;
pub mod devices;
pub mod entry;
pub mod environment;
pub mod error;
pub mod executable;
pub mod foreground;
pub mod gate;
pub mod hooks;
pub mod idmap;
pub mod init;
pub mod log;
pub mod lsm;
pub mod memory_policy;
pub mod mount_options;
pub mod mounts;
pub mod namespaces;
pub mod net_devices;
pub mod notify_socket;
pub mod number_list;
pub mod personality;
pub mod process;
pub mod procfs;
pub mod regular_file;
pub mod removal;
pub mod resctrl;
pub mod rootfs;
pub mod scheduling;
pub mod seccomp;
pub mod signals;
pub mod spec;
pub mod state;
pub mod syscalls;
pub mod sysctl;
pub mod terminal;
pub mod time;
