#!/usr/bin/env bash
# The target that rrun itself is built for: musl, which rustup adds if it can, else the host's own.
# Prints its name.
#
# rrun lives for two milliseconds, three times for each container. glibc takes half of one before
# main(): it asks the processor about its caches, and in a virtual machine the hypervisor answers
# each such question (CPUID). musl asks nothing.
set -euo pipefail

musl=$(uname -m)-unknown-linux-musl
there() { [[ -d $(rustc --print sysroot)/lib/rustlib/$musl/lib ]]; }

there || timeout 120 rustup target add "$musl" >&2 || true
if there; then
    echo "$musl"
else
    echo "no Rust target $musl here: rrun is built with glibc, and starts slower" >&2
    rustc --print host-tuple
fi
