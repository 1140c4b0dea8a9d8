//! The CRI server `rrun-cri` and the monitor `rrun-monitor` that it starts for each pod.
//!
//! ARCHITECTURE.md tells which room holds what. Nothing here depends on the OCI runtime's
//! crate: runtimes are run by their command line.

pub mod cgroup;
pub mod config;
pub mod container;
pub mod descriptors;
pub mod error;
pub mod events;
pub mod handlers;
pub mod image;
pub mod in_flight;
pub mod journal;
pub mod layer;
pub mod memory;
pub mod metrics;
pub mod monitor;
pub mod monitor_client;
pub mod mount_attributes;
pub mod network;
pub mod node;
pub mod reconcile;
pub mod record;
pub mod regular_file;
pub mod reload;
pub mod sandbox;
pub mod selinux;
pub mod server;
pub mod services;
pub mod slow;
pub mod stats;
pub mod store;
pub mod streaming;
pub mod surroundings;
