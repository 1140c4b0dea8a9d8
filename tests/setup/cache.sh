# shellcheck shell=bash
# Sourced, not run: the cache that every set-up script builds into.
#
#   cache_key WORD…              the key: a hash over the words and the calling script itself
#   cache_entry NAME KEY BUILD   prints the path of the entry NAME-KEY; if it is not there,
#                                runs the function BUILD with an empty directory to fill
#   say / die                    a line with elapsed seconds, on stderr
#   progress WHAT TOTAL PATTERN UNIT   reads a command's output, shows how many of its lines match
#   progress_size WHAT FILE MB   runs beside a command, and shows how much of a file is written
#
# An entry is built under a temporary name and renamed when complete, so an interrupted build
# never counts; under a lock, so two callers never build the same thing twice.
# Entries live in RRUN_CACHE (default ~/.cache/rrun); those unused for two weeks are dropped
# when a newer one of the same name is built.

# Go and cargo will not run without one.
export HOME=${HOME:-$(getent passwd "$EUID" | cut -d: -f6)}
export RRUN_CACHE=${RRUN_CACHE:-$HOME/.cache/rrun}
# Seconds count from the outermost script's start.
export RRUN_STARTED=${RRUN_STARTED:-$EPOCHSECONDS}

say() { printf '[%4ds] %s\n' "$((EPOCHSECONDS - RRUN_STARTED))" "$*" >&2; }
die() { say "$*"; exit 1; }

# Whether progress is shown as one line that changes. Steps that run side by side would overwrite
# each other's line.
one_line() { [[ -t 2 && -z ${RRUN_SIDE_BY_SIDE-} ]]; }

# show_count WHAT DONE TOTAL UNIT: changes one line on a terminal, and prints a new line elsewhere.
show_count() {
    local text
    # TOTAL is an estimate, so that DONE may be more.
    text=$(printf '[%4ds] %s: %d %s of about %d (%d %%)' "$((EPOCHSECONDS - RRUN_STARTED))" "$1" "$2" "$4" "$3" \
        "$(($2 * 100 / ($3 > $2 ? $3 : $2 + 1)))")
    if one_line; then
        printf '\r%s\e[K' "$text" >&2
    else
        printf '%s\n' "$text" >&2
    fi
}

# progress WHAT TOTAL PATTERN UNIT <OUTPUT: TOTAL is how many lines are expected to match PATTERN,
# an extended regular expression. Prints nothing in the first five seconds.
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

# progress_size WHAT FILE MEGABYTES: shows the size of FILE every five seconds, until it is killed.
progress_size() {
    local never
    # Nothing is ever written to this pipe. If this function is killed, a `sleep` would outlive it.
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
            # Under the lock, whatever has this name was left by a build that died.
            rm -rf --one-file-system "$RRUN_CACHE/.partial-$name"
            partial=$RRUN_CACHE/.partial-$name
            mkdir "$partial"
            # The lock must not outlive us in a daemon that the build leaves behind.
            # Bash does not stop at a failure within $(…), unless -e is set again.
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

# cache_peek NAME KEY: the path of the entry if it is there, else fails.
cache_peek() {
    local dest=$RRUN_CACHE/$1-$2
    [[ -e $dest ]] && printf '%s\n' "$dest"
}
