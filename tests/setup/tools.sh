#!/usr/bin/env bash
# Builds programs that the tests of rrun use, each from its own source with its own build tools.
#
#   tests/setup/tools.sh [--peek] crictl    crictl
#   tests/setup/tools.sh [--peek] critest   the CRI's conformance suite
#   tests/setup/tools.sh [--peek] kubelet   the kubelet
#   tests/setup/tools.sh [--peek] kubelet-old   the kubelet of an older minor that is still supported
#   tests/setup/tools.sh [--peek] cluster   etcd and the rest of a Kubernetes cluster, kubectl
#   tests/setup/tools.sh [--peek] metrics   metrics-server, for `kubectl top` if memory is accounted
#   tests/setup/tools.sh [--peek] youki     youki, a peer that only the benchmark needs
#   tests/setup/tools.sh [--peek] cargo-deny   cargo-deny, which the lints need
#
# Prints the directory with the binaries. --peek builds nothing, and fails if the directory does not
# exist.
set -euo pipefail
. "$(dirname -- "$0")/cache.sh"

CRI_TOOLS=v1.36.0
KUBERNETES=v1.36.3
KUBERNETES_OLD=v1.35.4
ETCD=v3.6.5
METRICS_SERVER=v0.7.2
YOUKI=0.7.0
CARGO_DENY=0.20.2

SCRATCHES=()
export GOFLAGS=-mod=mod CGO_ENABLED=0

# Creates a temporary Go module. `go install PKG@VERSION` would need a list of versions, which a
# minimal module proxy does not serve.
scratch_module() {
    SCRATCH=$(mktemp -d)
    SCRATCHES+=("$SCRATCH")
    trap 'rm -rf "${SCRATCHES[@]}"' EXIT
    cd "$SCRATCH"
    go mod init scratch
}

# go_program NAME-AND-VERSION COMMAND… PACKAGE: runs `go build` or `go test -c` and shows its
# progress. `go list` counts the packages to compile, and downloads their modules.
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

# kubernetes_module VERSION: creates a temporary module that can build the programs of Kubernetes.
kubernetes_module() {
    local version=$1 staged
    scratch_module
    go mod edit -require "k8s.io/kubernetes@$version"
    # The module k8s.io/kubernetes contains its libraries as directories. Other modules use them as
    # separate modules, whose versions have the major number 0 and the same minor and patch numbers.
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

# rust_program OUT NAME VERSION [OPTION…]: builds a program from crates.io, which takes some
# minutes.
rust_program() {
    local out=$1 name=$2 version=$3
    shift 3
    say "$name $version (some minutes)"
    nice -n 15 env CARGO_TARGET_DIR="$out/target" \
        cargo install "$name" --version "$version" --locked --root "$out/root" "$@"
    mv "$out/root/bin/$name" "$out/$name"
    rm -rf "$out/target" "$out/root"
}

build_youki() {
    rust_program "$1" youki "$YOUKI" --no-default-features --features v2
}

build_cargo-deny() {
    rust_program "$1" cargo-deny "$CARGO_DENY"
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
    cargo-deny) version=$CARGO_DENY ;;
    *) die "usage: ${0##*/} [--peek] crictl|critest|kubelet|kubelet-old|cluster|metrics|youki|cargo-deny" ;;
esac
# A tool's key covers only its own build functions and version, so that a change for another tool
# does not rebuild this one.
case $tool in
    youki | cargo-deny) builders=(rust_program) ;;
    *) builders=(scratch_module go_program kubernetes_module kubernetes_program) ;;
esac
key=$({ declare -f "build_$tool" "${builders[@]}"; echo "$version $(uname -m)"; } | sha256sum | cut -c1-12)
if [[ -n $peek ]]; then
    cache_peek "tools-$tool" "$key"
else
    cache_entry "tools-$tool" "$key" "build_$tool"
fi
