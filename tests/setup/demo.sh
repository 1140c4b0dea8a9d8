#!/usr/bin/env bash
# Builds what `make demo` needs: the test root and rrun's binaries, in parallel.
set -euo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")
. "$HERE/cache.sh"
cd "$HERE/../.."

"$HERE/packages.sh"
# Downloading the root's packages takes most of a minute. Meanwhile rustc and Go use the processors.
export RRUN_SIDE_BY_SIDE=1
"$HERE/all.sh" demo &
setup=$!
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$HERE/crates.sh" restore
say "compiling rrun, rrun-cri and rrun-monitor"
# This number is an estimate, because some crates in the lock file are for other systems.
crates=$(grep -c '^name = ' Cargo.lock)
CARGO_TERM_COLOR=never make build 2>&1 | tee "$log" | progress "compiling rrun" "$crates" '^ +Compiling ' crates || {
    cat "$log"
    pkill -TERM -P "$setup"
    exit 1
}
tail -n 3 "$log"
wait "$setup" || die "the set-up failed"
