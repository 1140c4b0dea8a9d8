#!/usr/bin/env bash
# kubelet on its own (no API server), in either view: runs the pods whose manifests lie in a directory.
#
#   tests/setup/kubelet.sh start CRI-SOCKET [MANIFEST-DIR]    returns when it answers
#   tests/setup/kubelet.sh stop
#
# CRI-SOCKET is a path or unix:// address; MANIFEST-DIR defaults to /etc/kubernetes/manifests and is
# looked at every second. http://127.0.0.1:10255/pods and /healthz answer without credentials. Logs
# to /out/kubelet.log; its own state is /var/lib/kubelet. The cgroup driver is the runtime's.
#
# From the environment: KUBELET, the program (default: the one in PATH); KUBELET_CONFIG, lines for its
# configuration; KUBELET_KUBECONFIG and KUBELET_ADDRESS, the API server that it belongs to and where
# it is to be reached by that (tests/setup/cluster.sh).
set -euo pipefail

pid_file=/run/kubelet-test.pid
# A group of its own, as a service has: in the root's kubelet finds no swap to share out.
group=/sys/fs/cgroup/kubelet-test

# unless_told KEY VALUE: a key may be there once only.
unless_told() {
    grep -q "^$1:" <<<"${KUBELET_CONFIG-}" || echo "$1: $2"
}

start() {
    local socket=$1 manifests=${2:-/etc/kubernetes/manifests} tries
    [[ $socket == *://* ]] || socket=unix://$socket
    mkdir -p "$manifests" /var/lib/kubelet /var/log/pods
    # The image service's address is the runtime's. Nothing here is reachable from elsewhere.
    cat >/var/lib/kubelet/config.yaml <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: $socket
staticPodPath: $manifests
fileCheckFrequency: 1s
syncFrequency: 10s
failSwapOn: false
readOnlyPort: 10255
address: ${KUBELET_ADDRESS:-127.0.0.1}
authentication:
  anonymous: {enabled: true}
  webhook: {enabled: false}
authorization: {mode: AlwaysAllow}
enableServer: true
resolvConf: /etc/resolv.conf
$(unless_told imageGCHighThresholdPercent 100)
$(unless_told evictionHard '{memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}')
${KUBELET_CONFIG-}
END
    if [[ $(</proc/self/cgroup) == 0::/ ]]; then
        mkdir -p "$group"
        echo $$ >"$group/cgroup.procs"
    fi
    setsid "${KUBELET:-kubelet}" ${KUBELET_KUBECONFIG:+--kubeconfig "$KUBELET_KUBECONFIG" --node-ip 192.0.2.2} --config /var/lib/kubelet/config.yaml --v "${KUBELET_VERBOSITY:-2}" \
        >>/out/kubelet.log 2>&1 </dev/null &
    echo $! >"$pid_file"
    for ((tries = 0; tries < 600; tries++)); do
        curl -fs -o /dev/null http://127.0.0.1:10255/pods && return
        kill -0 "$(<"$pid_file")" 2>/dev/null || break
        sleep 0.1
    done
    echo "kubelet does not answer on port 10255:" >&2
    tail -n 20 /out/kubelet.log >&2
    exit 1
}

# Its containers stay, as they do on a node.
stop() {
    [[ -f $pid_file ]] || return 0
    local pid tries
    pid=$(<"$pid_file")
    kill "$pid" 2>/dev/null || true
    for ((tries = 0; tries < 300; tries++)); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    rm -f "$pid_file"
    # Whatever it has started ends a moment later.
    for ((tries = 0; tries < 50; tries++)); do
        [[ ! -d $group ]] || rmdir "$group" 2>/dev/null || { sleep 0.1; continue; }
        break
    done
}

case ${1-} in
    start) [[ $# -ge 2 ]] || { echo "usage: kubelet.sh start CRI-SOCKET [MANIFEST-DIR]" >&2; exit 2; }; "$@" ;;
    stop) stop ;;
    *) echo "usage: kubelet.sh start CRI-SOCKET [MANIFEST-DIR] | stop" >&2; exit 2 ;;
esac
