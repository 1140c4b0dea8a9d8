#!/usr/bin/env bash
# The Debian root that both test views stand on: the native one (tests/native/run) and the guest
# machine (tests/vm/run). Current peers and clients from sid, systemd, and a kernel with its
# modules for the guest. Prints its directory.
#
#   tests/setup/root.sh
#
# Nobody writes into it: both views put something of their own over it. Takes about 2 minutes.
set -euo pipefail
. "$(dirname -- "$0")/cache.sh"
. "$(dirname -- "$0")/mirror.sh"

# By what they are for: peers of rrun; peers of rrun-cri; images; network; looking around;
# PID 1 of the guest; callers of rrun and what confines; terminals, volumes, registries; measuring.
PACKAGES=(
    runc crun
    containerd podman conmon containernetworking-plugins
    docker-registry skopeo umoci
    nftables iptables iproute2 iputils-ping netcat-openbsd curl ca-certificates
    jq strace procps psmisc kmod less util-linux file
    systemd-sysv dbus
    docker.io docker-cli uidmap passt apparmor sudo python3-seccomp
    tmux socat conntrack fuse3 attr zstd openssl apache2-utils
    hyperfine
)
# The peers' and clients' versions are sid's of the day; the guest's kernel is a known one, since
# a new one may not run under every QEMU.
SUITE=sid
KERNEL_SUITE=trixie

kernel_package() {
    case $(dpkg --print-architecture) in
        amd64) echo linux-image-cloud-amd64 ;;
        arm64) echo linux-image-cloud-arm64 ;;
        *) die "no guest kernel is known for $(dpkg --print-architecture)" ;;
    esac
}

# An apt of its own for the kernel's suite: the package is unpacked, not installed, so that no
# initramfs or boot loader is made for it.
unpack_kernel() {
    local root=$1 apt=$1/tmp/kernel-apt package
    mkdir -p "$apt"/{lists,cache}
    printf 'deb %s %s main\n' "$(debian_mirror)" "$KERNEL_SUITE" >"$apt/sources.list"
    local options=(-qq -o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update
    package=$(apt-cache "${options[@]}" depends --important "$(kernel_package)" |
        awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }')
    say "kernel $package"
    (cd "$apt" && apt-get "${options[@]}" download "$package")
    dpkg-deb -x "$apt"/linux-image-*.deb "$apt/unpacked"
    cp -a "$apt/unpacked/boot/." "$root/boot/"
    mkdir -p "$root/usr/lib/modules"
    cp -a "$apt"/unpacked/{usr/,}lib/modules/. "$root/usr/lib/modules/" 2>/dev/null || true
    rm -rf "$apt"
    local release
    release=$(ls "$root/usr/lib/modules")
    [[ -n $release && -f $root/boot/vmlinuz-$release ]] || die "the kernel package held no kernel"
    # No device of these is in the guest.
    (cd "$root/usr/lib/modules/$release/kernel" &&
        rm -rf sound drivers/{media,gpu,infiniband,hid,usb,scsi,target,nvdimm,ata,mmc,pcmcia,input,iio,hwmon})
    depmod -b "$root" "$release"
}

build_root() {
    local root=$1 service
    "$(dirname -- "$0")/packages.sh"
    say "a Debian root of $SUITE (about a minute)"
    DEBIAN_ROOT_PACKAGES=350 debian_root root "$SUITE" "$root" "${PACKAGES[@]}"
    unpack_kernel "$root"

    # Tests start what they need; at boot nothing comes up by itself.
    for service in containerd docker apparmor apache-htcacheclean docker-registry podman podman-restart podman-auto-update \
        podman-clean-transient apt-daily apt-daily-upgrade dpkg-db-backup e2scrub_all \
        e2scrub_reap fstrim nftables systemd-networkd systemd-timesyncd systemd-pstore \
        networkd-dispatcher netavark-dhcp-proxy getty@tty1; do
        find "$root/etc/systemd/system" -name "$service.*" -type l -delete
    done

    # The same on every machine, and telling nothing of the one that built it.
    echo rrun-test >"$root/etc/hostname"
    printf '127.0.0.1 localhost\n127.0.1.1 rrun-test\n::1 localhost ip6-localhost\n' >"$root/etc/hosts"
    # Refuses at once; a name server that never answers stalls kubelet for 10 s a pod.
    rm -f "$root/etc/resolv.conf"
    echo 'nameserver 127.0.0.1' >"$root/etc/resolv.conf"
    : >"$root/etc/fstab"
    echo rrun-test-root-machine-id | md5sum | cut -d' ' -f1 >"$root/etc/machine-id"
    passwd --root "$root" -d root >/dev/null
    mkdir -p "$root"/{src,out,images,tools,etc/rrun,opt/cni}
    # Where clients look for CNI plugins by default.
    ln -sfn /usr/lib/cni "$root/opt/cni/bin"
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* \
        "$root"/usr/share/{doc,man,locale,info,lintian,bug} "$root"/etc/cni/net.d/* \
        "$root"/etc/apt/sources.list*
    say "the root is $(du -sm --one-file-system "$root" | cut -f1) MB"
}

cache_entry root "$(cache_key "$(dpkg --print-architecture)")" build_root
