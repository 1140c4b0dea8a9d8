#!/usr/bin/env bash
# What `make demo` stands on: the test root and our binaries, made side by side.
set -euo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")
. "$HERE/cache.sh"
cd "$HERE/../.."

# rustc and Go have most of a minute in which the archive's packages come in.
"$HERE/packages.sh"
export RRUN_SIDE_BY_SIDE=1
"$HERE/all.sh" demo &
setup=$!
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$HERE/crates.sh" restore
say "compiling rrun, rrun-cri and rrun-monitor"
# As many crates as the lock file has, less some that are for other systems.
crates=$(grep -c '^name = ' Cargo.lock)
CARGO_TERM_COLOR=never make build 2>&1 | tee "$log" | progress "compiling rrun" "$crates" '^ +Compiling ' crates || {
    cat "$log"
    kill "$setup"
    exit 1
}
tail -n 3 "$log"
wait "$setup" || die "the set-up failed"
