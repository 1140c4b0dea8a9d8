#!/usr/bin/env bash
# Prints the target that rrun itself is built for. That is the musl target if it is installed or
# rustup can install it, and otherwise the host's target.
#
# rrun runs for two milliseconds, three times for each container. glibc takes half a millisecond
# before main(): it queries the processor's caches with the instruction CPUID, which a virtual
# machine's hypervisor has to emulate. musl does not use CPUID.
set -euo pipefail

musl=$(uname -m)-unknown-linux-musl
is_installed() { [[ -d $(rustc --print sysroot)/lib/rustlib/$musl/lib ]]; }

is_installed || timeout 120 rustup target add "$musl" >&2 || true
if is_installed; then
    echo "$musl"
else
    echo "the Rust target $musl is not installed: rrun is built with glibc, and starts slower" >&2
    rustc --print host-tuple
fi
