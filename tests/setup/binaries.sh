# shellcheck shell=bash
# Sourced, not run: binary_path NAME prints which build of one of our binaries a view gets.
#
# RRUN_BIN_DIR (directories, separated by colons) is searched in order if it is set; else the
# most recent build among the target directory's profiles is taken, which is what someone who has
# just run `cargo build` means.

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
