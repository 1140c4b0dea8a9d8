//! System call filters: `linux.seccomp` of config.json, compiled to the kernel's classic
//! BPF. See seccomp(2) and the kernel's Documentation/userspace-api/seccomp_filter.rst.
//!
//! In the order of the story: a [`profile`] is read and checked, each call's numbers come
//! from the [`table`], [`compile`] makes a program of them by means of [`bpf`], a process
//! loads it, and the [`listener`], if there is one, is told.

pub(crate) mod architecture;
mod bpf;
mod compile;
mod filter;
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
