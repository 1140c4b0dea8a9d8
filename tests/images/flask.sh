#!/usr/bin/env bash
# Builds the two lower layers of the Flask application's image: the directories base/ and install/
# in a cache entry. They have the content that a Dockerfile's `FROM debian` and `RUN apt-get install
# python3-flask` would create. Prints the path of the entry.
#
#   tests/images/flask.sh
set -euo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")
. "$HERE/../setup/cache.sh"
. "$HERE/../setup/mirror.sh"

SUITE=trixie

# Deletes files that an image does not need: apt's lists, translations, manuals, logs.
strip_tree() {
    rm -rf "${1:?}"/usr/share/{doc,man,locale,info,lintian,zoneinfo,bug,i18n} "${1:?}"/var/cache/{apt,debconf,ldconfig}/* \
        "${1:?}"/var/lib/apt/lists/* "${1:?}"/var/log/* "${1:?}"/etc/apt/sources.list* "${1:?}"/tmp/* "${1:?}"/dev/*
}

# Downloads the packages with the apt of the machine, which reads the list of installed packages
# from the image. So no program in the image needs a network.
fetch() {
    local base=$1 apt=$2
    mkdir -p "$apt"/{lists,cache/archives/partial,root}
    printf 'deb %s %s main\n' "$(debian_mirror)" "$SUITE" >"$apt/sources.list"
    local options=(-qq -o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root
        -o "Dir::State::status=$base/var/lib/dpkg/status" -o Debug::NoLocking=1)
    apt-get "${options[@]}" update
    apt-get "${options[@]}" install --yes --download-only --no-install-recommends python3-flask
}

# install_over BASE ARCHIVES UPPER OVER: writes the files that dpkg changes or adds on BASE to
# UPPER. Runs in a separate mount namespace.
install_over() {
    local base=$1 archives=$2 upper=$3 over=$4
    mkdir -p "$over"/{work,merged}
    mount -t overlay -o "lowerdir=$base,upperdir=$upper,workdir=$over/work" flask "$over/merged"
    mkdir "$over/merged/packages"
    mount --bind "$archives" "$over/merged/packages"
    # dpkg does not sort packages by their dependencies. Each round installs those that were
    # refused.
    DEBIAN_FRONTEND=noninteractive LC_ALL=C chroot "$over/merged" \
        sh -c 'for round in 1 2 3; do dpkg --install --recursive --skip-same-version /packages && exit; done; exit 1'
    # A .pyc file records the date of its source file. This script gives all files of a layer the
    # same date, so the dates that dpkg's .pyc files record no longer match their sources. Python
    # would then compile the library again at each start, which takes minutes under emulation. For
    # this reason, this command writes unchecked .pyc files, which Python does not compare with
    # their sources.
    LC_ALL=C chroot "$over/merged" \
        sh -c 'python3 -m compileall -qf --invalidation-mode unchecked-hash /usr/lib/python3*'
    umount "$over/merged/packages"
    rmdir "$over/merged/packages"
    umount "$over/merged"
}

build_flask() {
    local out=$1 upper
    say "debootstrap $SUITE and python3-flask (about 2 minutes)"
    debootstrap --variant=minbase --exclude=apt,e2fsprogs "$SUITE" "$out/base" "$(debian_mirror)" \
        >"$RRUN_CACHE/flask.log" 2>&1 || { tail -n 20 "$RRUN_CACHE/flask.log"; die "debootstrap failed"; }
    fetch "$out/base" "$out/apt" >>"$RRUN_CACHE/flask.log"
    mkdir "$out/install"
    export -f install_over
    unshare --mount --propagation private bash -euc 'install_over "$@"' install \
        "$out/base" "$out/apt/cache/archives" "$out/install" "$out/over" >>"$RRUN_CACHE/flask.log" 2>&1 ||
        { tail -n 20 "$RRUN_CACHE/flask.log"; die "installing python3-flask failed"; }
    # overlayfs marks a deleted file by a character device 0:0, and an OCI layer by a file named
    # .wh.NAME.
    find "$out/install" -type c | while read -r upper; do
        rm "$upper"
        : >"${upper%/*}/.wh.${upper##*/}"
    done
    strip_tree "$out/base"
    strip_tree "$out/install"
    rm -rf "$out/apt" "$out/over"
    say "the layers are $(du -sm "$out/base" "$out/install" | awk '{print $1}' | paste -sd+) MB"
}

cache_entry flask "$(cache_key "$(dpkg --print-architecture)")" build_flask
