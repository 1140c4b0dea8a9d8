//! What the tests of several subjects use: the harness, the machine, the programs under test, and their
//! clients. No subject imports from another one; what two of them need is here.

pub mod application;
pub mod attempts;
pub mod bundle;
pub mod caller;
pub mod calls;
pub mod certificates;
pub mod cgroup_use;
pub mod cluster;
pub mod cni;
pub mod cni_recorder;
pub mod counted_lines;
pub mod critest;
pub mod disk;
pub mod fields;
pub mod images;
pub mod inside;
pub mod kubelet;
pub mod leak_check;
pub mod machine;
pub mod mountinfo;
pub mod needs;
pub mod node;
pub mod pod_network;
pub mod reboot;
pub mod refusals;
pub mod seccomp;
pub mod secret;
pub mod spdy;
pub mod streams;
pub mod swap;
pub mod terminal;
pub mod user_namespace;
pub mod websocket;
