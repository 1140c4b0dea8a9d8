#!/usr/bin/env bash
# Creates an ext4 disk image from a cache entry, if it does not exist yet, and prints its path.
#
#   tests/vm/disk.sh ENTRY-DIR [SIZE]     default SIZE: the size of the entry and a quarter more
#
# The images are never changed: a guest writes to a temporary snapshot of an image.
set -euo pipefail
. "$(dirname -- "$0")/../setup/cache.sh"

ENTRY=$(readlink -f -- "$1")
SIZE=${2-}

build_disk() {
    local size=$SIZE holds
    holds=$(du -sm --apparent-size "$ENTRY" | cut -f1)
    [[ -n $size ]] || size=$((holds * 5 / 4 + 16))M
    truncate -s "$size" "$1/disk.img"
    progress_size "the disk of $name" "$1/disk.img" "$holds" &
    watcher=$!
    trap 'kill "$watcher"' EXIT
    # The disk is not used again after a crash, so it needs no journal, which is slow under
    # emulation.
    mkfs.ext4 -q -F -m 0 -O ^has_journal -E nodiscard -d "$ENTRY" "$1/disk.img"
}

name=$(basename -- "$ENTRY")
disk=$(cache_entry "disk-${name%-*}" "$(cache_key "$name" "$SIZE")" build_disk)
echo "$disk/disk.img"
