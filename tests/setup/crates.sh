#!/usr/bin/env bash
# Compiled dependencies, kept outside the checkout: a fresh clone compiles only its own crates.
#
#   tests/setup/crates.sh restore     into a target directory that does not exist yet
#   tests/setup/crates.sh save        from one in which everything has been compiled, if none is kept
#
# The key is all that cargo's own fingerprints of dependencies hold: the compiler, the lock file,
# features and profiles, flags. cargo checks them again; what does not fit is compiled.
set -euo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")
. "$HERE/cache.sh"
cd "$HERE/../.."
target=${CARGO_TARGET_DIR:-$PWD/target}

key=$(cache_key "$(rustc -vV)" "$(cat Cargo.lock Cargo.toml ./*/Cargo.toml .cargo/config.toml)")

# Of the workspace's own crates nothing is kept, since cargo knows them by their directory.
save() {
    local profile
    while read -r profile; do
        mkdir -p "$1/$profile"
        cp -a "$target/$profile"/{.fingerprint,build,deps} "$1/$profile/"
    done < <(cd "$target" && find . -mindepth 2 -maxdepth 4 -type d -name .fingerprint -printf '%h\n')
    find "$1" -mindepth 3 \( -name 'rrun*' -o -name 'librrun*' \) -prune -exec rm -rf {} +
    # Programs: tests, which are the workspace's.
    find "$1" -path '*/deps/*' -type f -perm -u+x ! -name '*.so' -delete
}

case ${1-} in
    restore)
        entry=$(cache_peek crates "$key") || exit 0
        [[ ! -e $target ]] || exit 0
        mkdir -p "$(dirname "$target")"
        cp -a "$entry" "$target"
        touch -c "$entry"
        say "dependencies come compiled from $entry"
        ;;
    save) cache_entry crates "$key" save >/dev/null ;;
    *) die "usage: tests/setup/crates.sh restore | save" ;;
esac
