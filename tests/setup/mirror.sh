# shellcheck shell=bash
# This file is sourced after cache.sh, not run.
#
#   debian_mirror                       prints the Debian archive in apt's configuration, so that no
#                                       script contains the address of an archive
#   debian_root WHAT SUITE DIR PACKAGE… installs a Debian with these packages into an empty directory

debian_mirror() {
    local release
    release=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
    apt-get indextargets --format '$(REPO_URI) $(RELEASE)' |
        awk -v release="$release" '$2 == release { print $1; found = 1; exit } END { exit !found }'
}

# mmdebstrap installs all packages in one run of dpkg. That takes half the time of debootstrap,
# which installs them one by one. The archive may be an old copy whose Valid-Until has passed.
debian_root() {
    local what=$1 suite=$2 root=$3 log=$RRUN_CACHE/$1.log
    shift 3
    # Each package counts three times: it is fetched, unpacked and set up.
    mmdebstrap --verbose --mode=root --variant=minbase --include="$(IFS=,; echo "$*")" \
        --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Check-Valid-Until "false"' \
        "$suite" "$root" "$(debian_mirror)" 2>&1 </dev/null | tee "$log" |
        progress "the packages of the $what" "$((DEBIAN_ROOT_PACKAGES * 3))" '^(Get:[0-9]+ .*\[|Unpacking |Setting up )' steps ||
        { tail -n 20 "$log" >&2; die "installing the Debian packages of the $what failed, see $log"; }
    # mmdebstrap's settings for a fast dpkg must not stay in the root.
    rm -f "$root"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$root"/etc/apt/apt.conf.d/99mmdebstrap
}
