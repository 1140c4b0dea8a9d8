# shellcheck shell=bash
# Sourced, not run: debian_mirror prints the Debian archive that apt is configured with, so that
# no script writes one down.

debian_mirror() {
    local release
    release=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
    apt-get indextargets --format '$(REPO_URI) $(RELEASE)' |
        awk -v release="$release" '$2 == release { print $1; found = 1; exit } END { exit !found }'
}
