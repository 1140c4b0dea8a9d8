# shellcheck shell=bash
# This file is sourced, not run. `make_view` creates the directory VIEW for the files of one run of
# tests/native/run or tests/vm/run, and opens the descriptor `view_lock`, which holds a lock on the
# directory. The caller deletes the directory.
#
# A directory without a lock is left from a killed run. It is deleted, because such directories can
# fill the disk. The first minute is the time that a new run has for its lock.

make_view() {
    local views=${RRUN_VIEWS:-/var/tmp/rrun-views}
    mkdir -p "$views"
    find "$views" -mindepth 1 -maxdepth 1 -mmin +1 \
        -exec flock --nonblock {} rm -rf --one-file-system {} \; || true
    VIEW=$(mktemp -d "$views/XXXXXXXX")
    exec {view_lock}<"$VIEW"
    flock "$view_lock"
}
