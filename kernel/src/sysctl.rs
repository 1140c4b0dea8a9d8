//! Parameters of the kernel in /proc/sys, sysctl(8).

/// A parameter that the kernel shows in each network namespace, although it applies to the whole
/// kernel (net/netfilter/nf_hooks_lwtunnel.c).
const GLOBAL: &str = "net.netfilter.nf_hooks_lwtunnel";

/// Returns whether a parameter belongs to a network namespace. `name` has dots as separators.
pub fn is_of_network_namespace(name: &str) -> bool {
    name.starts_with("net.") && name != GLOBAL
}
