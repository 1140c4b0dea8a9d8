#!/usr/bin/env bash
# Builds the guest's initramfs. It contains busybox, the disk driver (a module of Debian's kernel)
# and initramfs-init. Prints the path of the image.
#
#   tests/vm/initramfs.sh ROOT-DIR
set -euo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")
. "$HERE/../setup/cache.sh"

ROOT=$1
BUSYBOX=$("$HERE/../setup/busybox.sh")

build_initramfs() {
    local out=$1 tree=$1/tree release module modules
    release=$(ls "$ROOT/usr/lib/modules")
    mkdir -p "$tree"/{bin,proc,sys,dev,root,modules}
    cp "$BUSYBOX/bin/busybox" "$tree/bin/busybox"
    ln -s busybox "$tree/bin/sh"
    cp "$HERE/initramfs-init" "$tree/init"
    modules=$(modprobe -d "$ROOT/usr" -S "$release" --show-depends virtio_blk)
    while read -r insmod module _; do
        [[ $insmod == insmod ]] || continue
        case $module in
            *.xz) xz -dc "$module" ;;
            *.zst) zstd -dcq "$module" ;;
            *) cat "$module" ;;
        esac >"$tree/modules/$(basename "${module%.ko*}").ko"
        echo "$(basename "${module%.ko*}").ko" >>"$tree/modules/order"
    done <<<"$modules"
    (cd "$tree" && find . | cpio --quiet -o -H newc | gzip -1 >"$out/initramfs")
    rm -rf "$tree"
}

key=$(cache_key "$(basename "$ROOT")" "$(basename "$BUSYBOX")" "$(sha256sum <"$HERE/initramfs-init")")
entry=$(cache_entry initramfs "$key" build_initramfs)
echo "$entry/initramfs"
