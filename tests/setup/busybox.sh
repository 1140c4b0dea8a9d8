#!/usr/bin/env bash
# Compiles a static busybox with every applet of its default configuration, from Debian's source.
# The guest machine's initramfs and all test images contain this busybox. Debian's own binaries are
# not suitable: they lack applets that critest runs. Their shell also runs applets without an exec,
# and the tests would observe that difference.
#
#   tests/setup/busybox.sh
#
# Prints a directory with bin/, sbin/ and usr/. The applets in it are hard links to one file.
set -euo pipefail
. "$(dirname -- "$0")/cache.sh"
. "$(dirname -- "$0")/mirror.sh"

SUITE=trixie
VERSION=1.37

build_busybox() {
    local out=$1 apt=$1/.build
    "$(dirname -- "$0")/packages.sh"
    mkdir -p "$apt"/{lists,cache,source}
    printf 'deb-src %s %s main\n' "$(debian_mirror)" "$SUITE" >"$apt/sources.list"
    local options=(-qq -o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update
    (cd "$apt/source" && apt-get "${options[@]}" source --download-only busybox)
    tar -C "$apt" -xf "$apt"/source/busybox_"$VERSION"*.orig.tar.*
    cd "$apt"/busybox-*/
    say "compiling busybox (about a minute)"
    make -s defconfig >/dev/null
    # tc does not compile against current kernel headers, and the tests do not need it.
    sed -i -E -e 's/^# (CONFIG_STATIC) is not set/\1=y/' \
        -e 's/^(CONFIG_TC|CONFIG_FEATURE_TC_INGRESS)=y/# \1 is not set/' \
        -e 's/^(CONFIG_INSTALL_APPLET_SYMLINKS)=y/# \1 is not set/' \
        -e 's/^# (CONFIG_INSTALL_APPLET_HARDLINKS) is not set/\1=y/' .config
    yes '' | make -s oldconfig >/dev/null || true
    nice -n 10 make -j"$(nproc)" busybox 2>&1 | tee "$apt/log" | progress busybox 750 '^  (CC|AR|LD|HOSTCC) ' files ||
        { tail -n 30 "$apt/log"; die "busybox does not compile"; }
    make -s install CONFIG_PREFIX="$out" >/dev/null
    rm -f "$out/linuxrc"
    cd /
    rm -rf "$apt"
    "$out/bin/busybox" ipcs >/dev/null
}

cache_entry busybox "$(cache_key "$(uname -m)")" build_busybox
