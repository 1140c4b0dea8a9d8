#!/usr/bin/env bash
# Builds the Debian root of both test views: the native view (tests/native/run) and the guest
# machine (tests/vm/run). It contains systemd, current versions of rrun's peers and clients from
# sid, and a kernel with modules for the guest. Prints the root's directory.
#
#   tests/setup/root.sh
#
# The root is never changed: each view puts a writable overlay over it. Building takes about 2
# minutes.
set -euo pipefail
. "$(dirname -- "$0")/cache.sh"
. "$(dirname -- "$0")/mirror.sh"

# Each line of packages has one purpose, in this order: peers of rrun; peers of rrun-cri; images;
# the network; inspecting a system; PID 1 of the guest; programs that call rrun, and security;
# terminals, volumes and registries; measuring.
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
# The peers and clients have the versions that sid has on the day of the build. The guest's kernel
# is from a stable release, because a newer kernel does not run under every version of QEMU.
SUITE=sid
KERNEL_SUITE=trixie

kernel_package() {
    case $(dpkg --print-architecture) in
        amd64) echo linux-image-cloud-amd64 ;;
        arm64) echo linux-image-cloud-arm64 ;;
        *) die "the guest machine has no kernel for $(dpkg --print-architecture)" ;;
    esac
}

# apt uses a separate configuration for the kernel's suite. The package is unpacked, not installed,
# so that its scripts create no initramfs and no boot loader entry.
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
    [[ -n $release && -f $root/boot/vmlinuz-$release ]] || die "the kernel package contained no kernel"
    # The guest has no devices that need these modules.
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

    # Tests start the services that they need. No service is started at boot.
    for service in containerd docker apparmor apache-htcacheclean docker-registry podman podman-restart podman-auto-update \
        podman-clean-transient apt-daily apt-daily-upgrade dpkg-db-backup e2scrub_all \
        e2scrub_reap fstrim nftables systemd-networkd systemd-timesyncd systemd-pstore \
        networkd-dispatcher netavark-dhcp-proxy getty@tty1; do
        find "$root/etc/systemd/system" -name "$service.*" -type l -delete
    done

    # These files are the same on every machine, and do not depend on the machine that builds the
    # root.
    echo rrun-test >"$root/etc/hostname"
    printf '127.0.0.1 localhost\n127.0.1.1 rrun-test\n::1 localhost ip6-localhost\n' >"$root/etc/hosts"
    # Port 53 of 127.0.0.1 refuses queries at once. A name server that never answers delays kubelet
    # by 10 s for each pod.
    rm -f "$root/etc/resolv.conf"
    echo 'nameserver 127.0.0.1' >"$root/etc/resolv.conf"
    : >"$root/etc/fstab"
    echo rrun-test-root-machine-id | md5sum | cut -d' ' -f1 >"$root/etc/machine-id"
    passwd --root "$root" -d root >/dev/null
    mkdir -p "$root"/{src,out,images,tools,etc/rrun,opt/cni}
    # Clients search for CNI plugins in /opt/cni/bin by default.
    ln -sfn /usr/lib/cni "$root/opt/cni/bin"
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* \
        "$root"/usr/share/{doc,man,locale,info,lintian,bug} "$root"/etc/cni/net.d/* \
        "$root"/etc/apt/sources.list*
    say "the root is $(du -sm --one-file-system "$root" | cut -f1) MB"
}

cache_entry root "$(cache_key "$(dpkg --print-architecture)")" build_root
