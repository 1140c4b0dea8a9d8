#!/usr/bin/env bash
# Keeps compiled dependencies outside the checkout, so that a fresh clone compiles only its own
# crates.
#
#   tests/setup/crates.sh restore     into a target directory that does not exist yet
#   tests/setup/crates.sh save        from one in which everything has been compiled, if none is kept
#
# The key covers what cargo's own fingerprints of dependencies cover: the compiler, the lock file,
# features, profiles and flags. cargo checks the fingerprints again, and compiles what does not
# match.
set -euo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")
. "$HERE/cache.sh"
cd "$HERE/../.."
target=${CARGO_TARGET_DIR:-$PWD/target}

# Crates lie in folders of the checkout, and in folders of these.
manifests() { find . -maxdepth 3 -name target -prune -o -name Cargo.toml -print | LC_ALL=C sort; }
key=$(cache_key "$(rustc -vV)" "$(manifests | xargs cat Cargo.lock .cargo/config.toml)")

# Removes the workspace's own crates, because cargo identifies those by their directory. All are named
# rrun or rrun-SOMETHING.
save() {
    local profile
    while read -r profile; do
        mkdir -p "$1/$profile"
        cp -a "$target/$profile"/{.fingerprint,build,deps} "$1/$profile/"
    done < <(cd "$target" && find . -mindepth 2 -maxdepth 4 -type d -name .fingerprint -printf '%h\n')
    find "$1" -mindepth 3 \( -name 'rrun*' -o -name 'librrun*' \) -prune -exec rm -rf {} +
    # All programs here are tests of the workspace's crates.
    find "$1" -path '*/deps/*' -type f -perm -u+x ! -name '*.so' -delete
}

case ${1-} in
    restore)
        entry=$(cache_peek crates "$key") || exit 0
        [[ ! -e $target ]] || exit 0
        mkdir -p "$(dirname "$target")"
        cp -a "$entry" "$target"
        touch -c "$entry"
        say "copied compiled dependencies from $entry"
        ;;
    save) cache_entry crates "$key" save >/dev/null ;;
    *) die "usage: tests/setup/crates.sh restore | save" ;;
esac
