#!/usr/bin/env bash
# Builds a Debian root for checking on x86-64 that everything compiles for arm64. It is used if
# rustup cannot download the target. The root contains Rust with the standard library of both
# architectures, and a C cross-compiler for the C code of dependencies. Prints the root's directory.
# Takes about a minute.
#
#   tests/setup/arm64.sh
set -euo pipefail
. "$(dirname -- "$0")/cache.sh"
. "$(dirname -- "$0")/mirror.sh"

SUITE=sid
PACKAGES=(cargo rustc gcc libc6-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross)

build_arm64() {
    local root=$1 apt=$1/tmp/apt
    "$(dirname -- "$0")/packages.sh"
    say "a Debian root of $SUITE with Rust (about a minute)"
    DEBIAN_ROOT_PACKAGES=120 debian_root arm64 "$SUITE" "$root" "${PACKAGES[@]}"
    mkdir -p "$apt"/{lists,cache}
    printf 'deb [arch=arm64] %s %s main\n' "$(debian_mirror)" "$SUITE" >"$apt/sources.list"
    local options=(-qq -o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root
        -o APT::Architecture=arm64 -o APT::Architectures=arm64)
    apt-get "${options[@]}" update
    (cd "$apt" && apt-get "${options[@]}" download libstd-rust-dev)
    dpkg-deb -x "$apt"/libstd-rust-dev_*.deb "$apt/unpacked"
    cp -a "$apt/unpacked/usr/lib/rustlib/aarch64-unknown-linux-gnu" "$root/usr/lib/rustlib/"
    rm -rf "$apt" "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}
    mkdir -p "$root"/{cargo,src,target}
}

cache_entry arm64 "$(cache_key)" build_arm64
