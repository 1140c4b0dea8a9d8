# shellcheck shell=bash
# This file is sourced, not run. It implements the cache for the results of the set-up scripts.
#
#   cache_key WORD…              prints the key: a hash of the words and of the calling script
#   cache_entry NAME KEY BUILD   prints the path of the entry NAME-KEY; if the entry does not exist,
#                                calls the function BUILD with an empty directory to fill
#   say / die                    print a line with the elapsed seconds to stderr
#   progress WHAT TOTAL PATTERN UNIT   reads a command's output, and shows how many lines match
#   progress_size WHAT FILE MB   runs in parallel with a command, and shows the size of a file
#
# An entry is built under a temporary name and renamed when it is complete, so that the result of an
# interrupted build is never used. A lock prevents two callers from building the same entry.
# Entries are stored in RRUN_CACHE (default ~/.cache/rrun). When a new entry is built, entries of
# the same name that were not used for two weeks are deleted.

# Go and cargo require HOME.
export HOME=${HOME:-$(getent passwd "$EUID" | cut -d: -f6)}
export RRUN_CACHE=${RRUN_CACHE:-$HOME/.cache/rrun}
# The time at which the outermost script started.
export RRUN_STARTED=${RRUN_STARTED:-$EPOCHSECONDS}

say() { printf '[%4ds] %s\n' "$((EPOCHSECONDS - RRUN_STARTED))" "$*" >&2; }
die() { say "$*"; exit 1; }

# one_line: succeeds if progress is shown as one line that is overwritten. Steps that run in
# parallel would overwrite each other's line.
one_line() { [[ -t 2 && -z ${RRUN_SIDE_BY_SIDE-} ]]; }

# show_count WHAT DONE TOTAL UNIT: overwrites one line on a terminal. Otherwise prints a new line.
show_count() {
    local text
    # TOTAL is an estimate, so that DONE can exceed it.
    text=$(printf '[%4ds] %s: %d %s of about %d (%d %%)' "$((EPOCHSECONDS - RRUN_STARTED))" "$1" "$2" "$4" "$3" \
        "$(($2 * 100 / ($3 > $2 ? $3 : $2 + 1)))")
    if one_line; then
        printf '\r%s\e[K' "$text" >&2
    else
        printf '%s\n' "$text" >&2
    fi
}

# progress WHAT TOTAL PATTERN UNIT <OUTPUT: TOTAL is the number of lines that are expected to match
# PATTERN, an extended regular expression. Prints nothing in the first five seconds.
progress() {
    local what=$1 total=$2 pattern=$3 unit=$4 line count=0 shown=$EPOCHSECONDS pause=5
    [[ $total -gt 0 ]] || total=1
    while IFS= read -r line; do
        [[ $line =~ $pattern ]] || continue
        count=$((count + 1))
        [[ $((EPOCHSECONDS - shown)) -ge $pause ]] || continue
        show_count "$what" "$count" "$total" "$unit"
        shown=$EPOCHSECONDS
        if one_line; then pause=1; fi
    done
    ! one_line || printf '\r\e[K' >&2
}

# progress_size WHAT FILE MEGABYTES: shows the size of FILE every five seconds until it is killed.
progress_size() {
    local never
    # `read` waits with a timeout on a pipe to which no process writes. A `sleep` in its place would
    # continue to run after this function was killed.
    exec {never}<> <(:)
    while ! read -r -t 5 -u "$never"; do
        show_count "$1" "$(du -m "$2" 2>/dev/null | cut -f1)" "$3" MB
    done
}

cache_key() {
    { cat -- "$(readlink -f -- "$0")"; printf '%s\0' "$@"; } | sha256sum | cut -c1-12
}

cache_entry() {
    local name=$1 key=$2 build=$3
    local dest=$RRUN_CACHE/$name-$key lock partial
    mkdir -p "$RRUN_CACHE"
    if [[ ! -e $dest ]]; then
        exec {lock}>"$RRUN_CACHE/.$name.lock"
        flock -n "$lock" || { say "waiting for another build of $name"; flock "$lock"; }
        if [[ ! -e $dest ]]; then
            say "building $name-$key"
            # This process has the lock, so a directory of this name was left by a build that was
            # killed.
            rm -rf --one-file-system "$RRUN_CACHE/.partial-$name"
            partial=$RRUN_CACHE/.partial-$name
            mkdir "$partial"
            # The build does not inherit the lock. A daemon that the build started would keep the
            # lock. Bash does not stop at a failure within $(…), unless -e is set again.
            (set -e; "$build" "$partial" {lock}>&-) >&2
            [[ $? -eq 0 ]] || die "building $name-$key failed"
            mv "$partial" "$dest"
            find "$RRUN_CACHE" -mindepth 1 -maxdepth 1 -name "$name-????????????" \
                -mtime +14 -exec rm -rf --one-file-system {} +
            say "built $name-$key"
        fi
        exec {lock}>&-
    fi
    touch -c "$dest"
    printf '%s\n' "$dest"
}

# cache_peek NAME KEY: prints the path of the entry NAME-KEY. Fails if the entry does not exist.
cache_peek() {
    local dest=$RRUN_CACHE/$1-$2
    [[ -e $dest ]] && printf '%s\n' "$dest"
}
