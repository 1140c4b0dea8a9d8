#!/usr/bin/env bash
# The programs that test rrun from outside, built from their own sources by their own build tools.
#
#   tests/setup/tools.sh [--peek] crictl    crictl
#   tests/setup/tools.sh [--peek] critest   the CRI's conformance suite
#   tests/setup/tools.sh [--peek] kubelet   the kubelet
#   tests/setup/tools.sh [--peek] kubelet-old   the kubelet of an older minor that is still supported
#   tests/setup/tools.sh [--peek] cluster   etcd and the rest of a Kubernetes cluster, kubectl
#   tests/setup/tools.sh [--peek] metrics   metrics-server, for kubectl top where something counts memory
#   tests/setup/tools.sh [--peek] youki     youki, a peer that only the benchmark needs
#
# Prints the directory with the binaries. --peek builds nothing and fails if it is not there.
set -euo pipefail
. "$(dirname -- "$0")/cache.sh"

CRI_TOOLS=v1.36.0
KUBERNETES=v1.36.3
KUBERNETES_OLD=v1.35.4
ETCD=v3.6.5
METRICS_SERVER=v0.7.2
YOUKI=0.7.0

SCRATCHES=()
export GOFLAGS=-mod=mod CGO_ENABLED=0

# A scratch module: `go install PKG@VERSION` wants a version list, which a minimal proxy lacks.
scratch_module() {
    SCRATCH=$(mktemp -d)
    SCRATCHES+=("$SCRATCH")
    trap 'rm -rf "${SCRATCHES[@]}"' EXIT
    cd "$SCRATCH"
    go mod init scratch
}

# go_program NAME-AND-VERSION COMMAND… PACKAGE: runs `go build` or `go test -c` and shows its
# progress. `go list` counts the packages to compile, and fetches the modules for that.
go_program() {
    local what=$1 total log=$RRUN_CACHE/go.log.$$
    shift
    say "$what"
    total=$(go list -deps "${@: -1}" | wc -l)
    nice -n 15 "${@:1:$#-1}" -v -trimpath "${@: -1}" 2>&1 | tee "$log" | progress "$what" "$total" '^[a-z].*[^:]$' packages ||
        { tail -n 20 "$log" >&2; die "$what does not compile"; }
    rm -f "$log"
}

build_crictl() {
    scratch_module
    go mod edit -require "sigs.k8s.io/cri-tools@$CRI_TOOLS"
    go_program "crictl $CRI_TOOLS" go build -o "$1/crictl" \
        -ldflags "-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=${CRI_TOOLS#v}" \
        sigs.k8s.io/cri-tools/cmd/crictl
}

build_critest() {
    scratch_module
    go mod edit -require "sigs.k8s.io/cri-tools@$CRI_TOOLS"
    go_program "critest $CRI_TOOLS" go test -c -o "$1/critest" \
        -ldflags "-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=${CRI_TOOLS#v}" \
        sigs.k8s.io/cri-tools/cmd/critest
}

# kubernetes_module VERSION: a scratch module that can build what is in Kubernetes' own.
kubernetes_module() {
    local version=$1 staged
    scratch_module
    go mod edit -require "k8s.io/kubernetes@$version"
    # Inside that module its libraries are directories; outside they are modules of their own,
    # of the same release with the major version 0.
    staged=$(go mod download -json "k8s.io/kubernetes@$version" | jq -r .GoMod)
    sed -nE 's#^\s*(replace )?(k8s\.io/[a-z-]+) => \./staging/.*#\2#p' "$staged" | sort -u |
        while read -r module; do
            go mod edit -replace "$module=$module@v0.${version#v1.}"
        done
}

# kubernetes_program OUT VERSION PACKAGE
kubernetes_program() {
    go_program "${3##*/} $2" go build -o "$1/${3##*/}" \
        -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$2" "k8s.io/kubernetes/$3"
}

build_kubelet() {
    kubernetes_module "$KUBERNETES"
    kubernetes_program "$1" "$KUBERNETES" cmd/kubelet
}

build_kubelet-old() {
    kubernetes_module "$KUBERNETES_OLD"
    kubernetes_program "$1" "$KUBERNETES_OLD" cmd/kubelet
}

build_cluster() {
    local out=$1 program
    kubernetes_module "$KUBERNETES"
    for program in cmd/kube-{apiserver,controller-manager,scheduler,proxy} cmd/kubectl; do
        kubernetes_program "$out" "$KUBERNETES" "$program"
    done
    scratch_module
    go mod edit -require "go.etcd.io/etcd/server/v3@$ETCD"
    go_program "etcd $ETCD" go build -o "$out/etcd" -ldflags '-s -w' go.etcd.io/etcd/server/v3
}

build_metrics() {
    scratch_module
    go mod edit -require "sigs.k8s.io/metrics-server@$METRICS_SERVER"
    go_program "metrics-server $METRICS_SERVER" go build -o "$1/metrics-server" -ldflags '-s -w' \
        sigs.k8s.io/metrics-server/cmd/metrics-server
}

build_youki() {
    local out=$1
    say "youki $YOUKI (some minutes)"
    nice -n 15 env CARGO_TARGET_DIR="$out/target" \
        cargo install youki --version "$YOUKI" --locked --no-default-features --features v2 --root "$out/root"
    mv "$out/root/bin/youki" "$out/youki"
    rm -rf "$out/target" "$out/root"
}

peek=
[[ ${1-} == --peek ]] && { peek=1; shift; }
tool=${1-}
case $tool in
    crictl | critest) version=$CRI_TOOLS ;;
    kubelet) version=$KUBERNETES ;;
    kubelet-old) version=$KUBERNETES_OLD ;;
    cluster) version="$KUBERNETES $ETCD" ;;
    metrics) version=$METRICS_SERVER ;;
    youki) version=$YOUKI ;;
    *) die "usage: ${0##*/} [--peek] crictl|critest|kubelet|kubelet-old|cluster|metrics|youki" ;;
esac
# Keyed by its own recipe and version only: a change to another tool's does not rebuild this one.
key=$({ declare -f "build_$tool" scratch_module go_program kubernetes_module kubernetes_program; echo "$version $(uname -m)"; } | sha256sum | cut -c1-12)
if [[ -n $peek ]]; then
    cache_peek "tools-$tool" "$key"
else
    cache_entry "tools-$tool" "$key" "build_$tool"
fi
