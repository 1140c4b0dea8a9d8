#!/usr/bin/env bash
# Serves the test images from a real registry (docker-registry), in either view.
#
#   tests/images/registry.sh start [PORT]           serves on 127.0.0.1, default port 5000; returns
#                                                   when the registry answers
#   tests/images/registry.sh stop [PORT]
#   tests/images/registry.sh mirrors DIR [PORT]     writes hosts.toml files to DIR (certs.d), which
#                                                   redirect the registries that tests use to it
#
# The registry serves a copy of /images/registry, so that tests can push to it. If REGISTRY_DATA is
# set, the registry serves that directory itself.
set -euo pipefail

command=${1-}
case $command in
    start | stop) port=${2:-5000} ;;
    mirrors) directory=$2 port=${3:-5000} ;;
    *) echo "usage: registry.sh start|stop [PORT] | mirrors DIR [PORT]" >&2; exit 2 ;;
esac
state=/run/test-registry-$port

start() {
    local data=${REGISTRY_DATA-}
    mkdir -p "$state"
    if [[ -z $data ]]; then
        data=/var/lib/registry/$port
        rm -rf "$data"
        mkdir -p "$data"
        # Symbolic links are sufficient. Copying the files would take long in a guest machine.
        cp -as /images/registry/. "$data/"
    fi
    cat >"$state/config.yml" <<END
version: 0.1
log: {level: error}
storage:
  filesystem: {rootdirectory: $data}
  delete: {enabled: true}
http: {addr: "127.0.0.1:$port"}
END
    OTEL_TRACES_EXPORTER=none setsid docker-registry serve "$state/config.yml" >"$state/log" 2>&1 </dev/null &
    echo $! >"$state/pid"
    local tries
    for ((tries = 0; tries < 300; tries++)); do
        curl -fs -o /dev/null "http://127.0.0.1:$port/v2/" && return
        kill -0 "$(<"$state/pid")" 2>/dev/null || break
        sleep 0.1
    done
    echo "the registry does not answer on port $port:" >&2
    cat "$state/log" >&2
    exit 1
}

stop() {
    [[ -f $state/pid ]] || return 0
    kill "$(<"$state/pid")" 2>/dev/null || true
    rm -rf "$state"
}

mirrors() {
    local host
    for host in registry.k8s.io gcr.io k8s.gcr.io docker.io; do
        mkdir -p "$directory/$host"
        cat >"$directory/$host/hosts.toml" <<END
server = "https://$host"

[host."http://127.0.0.1:$port"]
  capabilities = ["pull", "resolve"]
END
    done
    mkdir -p "$directory/127.0.0.1:$port"
    cat >"$directory/127.0.0.1:$port/hosts.toml" <<END
server = "http://127.0.0.1:$port"
END
}

"$command"
