//! The common modules of the tests. These modules contain the harness, and code for the machine,
//! the programs under test and the clients of these programs. Test modules do not import each
//! other. All code that several test modules use is therefore in this directory.

pub(crate) mod application;
pub(crate) mod attempts;
pub(crate) mod bundle;
pub(crate) mod caller;
pub(crate) mod calls;
pub(crate) mod certificates;
pub(crate) mod cgroup_use;
pub(crate) mod cluster;
pub(crate) mod cni;
pub(crate) mod cni_recorder;
pub(crate) mod counted_lines;
pub(crate) mod critest;
pub(crate) mod disk;
pub(crate) mod errnos;
pub(crate) mod fault_plan;
pub(crate) mod fault_runs;
pub(crate) mod fields;
pub(crate) mod frames;
pub(crate) mod images;
pub(crate) mod inject;
pub(crate) mod inside;
pub(crate) mod kubelet;
pub(crate) mod leak_check;
pub(crate) mod machine;
pub(crate) mod mountinfo;
pub(crate) mod needs;
pub(crate) mod network_view;
pub(crate) mod node;
pub(crate) mod observed;
pub(crate) mod pod_network;
pub(crate) mod reboot;
pub(crate) mod refusals;
pub(crate) mod seccomp;
pub(crate) mod secret;
pub(crate) mod spdy;
pub(crate) mod streams;
pub(crate) mod swap;
pub(crate) mod terminal;
pub(crate) mod user_namespace;
pub(crate) mod websocket;
