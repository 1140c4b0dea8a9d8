#!/usr/bin/env bash
# What the tests and the demo stand on, in the order of need. What is in the cache costs nothing.
#
#   tests/setup/all.sh [demo | base | kubernetes]…    default: base kubernetes
#
#   demo          packages, the root, one image, crictl, the guest machine: 3 minutes from nothing
#   base          the same with all test images, critest: 5 minutes
#   kubernetes    kubelet and the rest of a cluster: 7 minutes more
set -euo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")
. "$HERE/cache.sh"

# Each set is what it adds to the ones before it.
demo() {
    "$HERE/packages.sh"
    # These are fetched and unpacked while Go compiles.
    { "$HERE/root.sh" && "$HERE/busybox.sh"; } >/dev/null &
    local fetched=$!
    disks crictl
    wait "$fetched"
    ROOT=$("$HERE/root.sh")
    [[ -n ${ALL_IMAGES-} ]] || "$HERE/../vm/disk.sh" "$("$HERE/../images/build.sh" --demo)" >/dev/null
    "$HERE/../vm/initramfs.sh" "$ROOT" >/dev/null
    "$HERE/../vm/disk.sh" "$ROOT" 12G >/dev/null
}

base() {
    ALL_IMAGES=1 demo
    "$HERE/../vm/disk.sh" "$("$HERE/../images/build.sh")" >/dev/null
    disks critest
}

kubernetes() {
    # What only `make test-full` runs.
    disks kubelet cluster ${RRUN_TEST_FULL:+kubelet-old metrics}
}

# disks TOOL…: builds them, and makes the guest's disks of them.
disks() {
    local name entry
    for name in "$@"; do
        entry=$("$HERE/tools.sh" "$name")
        "$HERE/../vm/disk.sh" "$entry" >/dev/null
    done
}

[[ $# -gt 0 ]] || set -- base kubernetes
for set in "$@"; do
    case $set in
        demo | base | kubernetes) "$set" ;;
        *) die "usage: tests/setup/all.sh [demo | base | kubernetes]…" ;;
    esac
done
say "set up ($*), in $RRUN_CACHE"
