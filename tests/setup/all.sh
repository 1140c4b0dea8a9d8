#!/usr/bin/env bash
# Installs and builds what the tests and the demo need. Entries that are in the cache are not
# rebuilt.
#
#   tests/setup/all.sh [demo | base | kubernetes]…    default: base kubernetes
#
#   demo          packages, the root, one image, crictl, the guest machine: 3 minutes if not cached
#   base          the same as demo, and all test images and critest: 5 minutes
#   kubernetes    kubelet and the other programs of a cluster: 7 minutes more
set -euo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")
. "$HERE/cache.sh"

demo() {
    "$HERE/packages.sh"
    # Fetch and unpack the root and compile busybox while Go compiles the tools.
    { "$HERE/root.sh" && "$HERE/busybox.sh"; } >/dev/null &
    local fetched=$!
    trap 'pkill -TERM -P "$fetched"' EXIT
    disks crictl
    wait "$fetched"
    trap - EXIT
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
    # Only `make test-full` uses kubelet-old and metrics.
    disks kubelet cluster ${RRUN_TEST_FULL:+kubelet-old metrics}
}

# disks TOOL…: builds these tools, and creates a disk for the guest machine from each of them.
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
say "the set-up of $* is complete, in $RRUN_CACHE"
