#!/usr/bin/env bash
# Installs the Debian packages that the tests need on this machine, and each given PACKAGE. Needs
# root. Does nothing if all of them are installed.
#
#   tests/setup/packages.sh [PACKAGE…]
set -euo pipefail
. "$(dirname -- "$0")/cache.sh"
. "$(dirname -- "$0")/mirror.sh"

# mmdebstrap builds the test root, and debootstrap the lower layers of an image. e2fsprogs creates
# the guest's disks. secilc compiles the guest's SELinux policy. The other packages are needed for
# building busybox and for running the views.
PACKAGES=(mmdebstrap debootstrap e2fsprogs secilc cpio xz-utils zstd jq curl make gcc libc6-dev perl bzip2
    util-linux procps iproute2 kmod strace shellcheck ca-certificates)

missing() {
    local package
    for package in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
            echo "$package"
    done
}

case $(uname -m) in
    x86_64) qemu='qemu-system-x86' ;;
    aarch64) qemu='qemu-system-arm' ;;
    *) die "the guest machine does not support $(uname -m)" ;;
esac

apt_get() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 \
        --no-install-recommends "$@" >&2 </dev/null
}

for command in go cargo rustc; do
    command -v "$command" >/dev/null || die "$command is not in PATH: install Go and Rust before make setup"
done

exec {lock}>/run/lock/rrun-packages
flock "$lock"

to_install=$(missing "${PACKAGES[@]}" "$@")
if [[ -n $to_install ]]; then
    say "installing: ${to_install//$'\n'/ }"
    apt_get update
    # Names of packages contain no blanks, so that the variable can be split into words.
    # shellcheck disable=SC2086
    apt_get install $to_install
fi

# In QEMU 7.2 of Debian 12, current kernels crash with a double fault. QEMU 10 from its backports
# works.
qemu_major() { dpkg-query -W -f '${Version}' "$qemu" 2>/dev/null | sed 's/^[0-9]*://; s/\..*//'; }
if [[ $(qemu_major) -lt 10 ]]; then
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    candidate=$(apt-cache policy "$qemu" | awk '$1 == "Candidate:" { sub(/^[0-9]*:/, "", $2); print $2 }')
    if [[ ${candidate%%.*} =~ ^[0-9]+$ && ${candidate%%.*} -ge 10 ]]; then
        say "installing $qemu"
        apt_get install "$qemu"
        exit
    fi
    if ! apt-get indextargets --format '$(RELEASE)' | grep -qx "$codename-backports"; then
        say "adding $codename-backports to apt's sources"
        printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s-backports main\n' \
            "$(debian_mirror)" "$codename" >/etc/apt/sources.list.d/rrun-tests-backports.list
        apt_get update
    fi
    say "installing $qemu from $codename-backports"
    apt_get install -t "$codename-backports" "$qemu"
fi
