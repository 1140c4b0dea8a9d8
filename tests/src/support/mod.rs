//! What the tests of several subjects use: the harness, the machine, the programs under test, and their
//! clients. No subject imports from another one; what two of them need is here.

pub mod application;
pub mod attempts;
pub mod bundle;
pub mod caller;
pub mod cgroup_use;
pub mod cluster;
pub mod cni_recorder;
pub mod inside;
pub mod kubelet;
pub mod leak_check;
pub mod machine;
pub mod needs;
pub mod node;
pub mod reboot;
pub mod secret;
