# shellcheck shell=bash
# This file is sourced, not run. `binary_path NAME` prints the path of the build of rrun's program
# NAME that a view uses.
#
# If RRUN_BIN_DIR is set, its directories (separated by colons) are searched in order. Otherwise the
# most recent build of any profile in the target directory is used, because a user who has just run
# `cargo build` expects that build.

BINARIES=(rrun rrun-cri rrun-monitor rrun-e2e rrun-bench)

binary_path() {
    local name=$1 dir newest='' target
    local -a dirs
    if [[ -n ${RRUN_BIN_DIR-} ]]; then
        IFS=: read -ra dirs <<<"$RRUN_BIN_DIR"
        for dir in "${dirs[@]}"; do
            [[ -x $dir/$name ]] && { readlink -f -- "$dir/$name"; return; }
        done
        return 1
    fi
    target=${CARGO_TARGET_DIR:-$CHECKOUT/target}
    for dir in "$target"/{debug,release,*-linux-*/{debug,release,dist}}; do
        [[ -x $dir/$name ]] || continue
        [[ -z $newest || $dir/$name -nt $newest ]] && newest=$dir/$name
    done
    [[ -n $newest ]] && readlink -f -- "$newest"
}
