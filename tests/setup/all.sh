#!/usr/bin/env bash
# Everything that `make test` stands on, in the order of need. What is in the cache costs nothing;
# from nothing it takes about 15 minutes on two cores.
set -euo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")
. "$HERE/cache.sh"

"$HERE/packages.sh"
ROOT=$("$HERE/root.sh")
"$HERE/busybox.sh" >/dev/null
images=$("$HERE/../images/build.sh")
[[ $(uname -m) != x86_64 ]] || "$HERE/arm64.sh" >/dev/null
tools=()
names=(cri kubelet cluster)
# What only `make test-full` runs.
[[ -z ${RRUN_TEST_FULL-} ]] || names+=(kubelet-old metrics)
for name in "${names[@]}"; do
    tools+=("$("$HERE/tools.sh" "$name")")
done
"$HERE/../vm/initramfs.sh" "$ROOT" >/dev/null
"$HERE/../vm/disk.sh" "$ROOT" 12G >/dev/null
for entry in "$images" "${tools[@]}"; do
    "$HERE/../vm/disk.sh" "$entry" >/dev/null
done
say "set up, in $RRUN_CACHE"
