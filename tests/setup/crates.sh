#!/usr/bin/env bash
# Stores compiled dependencies outside the checkout, so that a fresh clone compiles only its own
# crates.
#
#   tests/setup/crates.sh restore     copies them to the target directory, if that does not exist
#   tests/setup/crates.sh save        copies them from the target directory, if they are not stored yet
#
# The key covers the same inputs as cargo's fingerprints of dependencies: the compiler, the lock
# file, features, profiles and flags. cargo checks the fingerprints again, and compiles each
# dependency whose fingerprint does not match.
set -euo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")
. "$HERE/cache.sh"
cd "$HERE/../.."
target=${CARGO_TARGET_DIR:-$PWD/target}

# Crates are in folders of the checkout, and in subfolders of these folders.
manifests() { find . -maxdepth 3 -name target -prune -o -name Cargo.toml -print | LC_ALL=C sort; }
key=$(cache_key "$(rustc -vV)" "$(manifests | xargs cat Cargo.lock .cargo/config.toml)")

# The workspace's own crates are not stored, because cargo identifies them by their directory. The
# names of all these crates begin with rrun.
save() {
    local profile
    while read -r profile; do
        mkdir -p "$1/$profile"
        cp -a "$target/$profile"/{.fingerprint,build,deps} "$1/$profile/"
    done < <(cd "$target" && find . -mindepth 2 -maxdepth 4 -type d -name .fingerprint -printf '%h\n')
    find "$1" -mindepth 3 \( -name 'rrun*' -o -name 'librrun*' \) -prune -exec rm -rf {} +
    # All programs in these directories are tests of the workspace's crates.
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
