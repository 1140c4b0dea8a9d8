//! System call filters, which rrun compiles from `linux.seccomp` of config.json to the kernel's
//! classic BPF. See seccomp(2) and the kernel's Documentation/userspace-api/seccomp_filter.rst.
//!
//! The module [`profile`] checks a seccomp profile, and [`table`] contains the numbers of all
//! system calls. The module [`compile`] translates the profile to a program with the generator in
//! [`bpf`]. A process loads the program with the module [`filter`]. If the profile requires an
//! agent, [`listener`] sends the filter's listener to the agent.

pub(crate) mod architecture;
mod bpf;
mod compile;
mod filter;
#[cfg(feature = "fuzz")]
pub(crate) mod fuzz;
mod listener;
mod profile;
mod shared_page;
pub(crate) mod table;

pub(crate) use filter::{FLAGS, Filter, supports};
pub(crate) use listener::Agent;
pub(crate) use profile::{ACTIONS, OPERATORS};
pub(crate) use shared_page::{Report, SharedPage};

#[cfg(test)]
mod tests;
