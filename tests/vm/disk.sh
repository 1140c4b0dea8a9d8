#!/usr/bin/env bash
# Turns a cache entry into an ext4 disk image, once, and prints the image's path.
#
#   tests/vm/disk.sh ENTRY-DIR [SIZE]     SIZE default: what it holds and a quarter more
#
# The images stay pristine: guests write into a throw-away overlay of them.
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
    # No journal: nobody reads the disk after a crash, and under emulation it costs time.
    mkfs.ext4 -q -F -m 0 -O ^has_journal -E nodiscard -d "$ENTRY" "$1/disk.img"
}

name=$(basename -- "$ENTRY")
disk=$(cache_entry "disk-${name%-*}" "$(cache_key "$name" "$SIZE")" build_disk)
echo "$disk/disk.img"
