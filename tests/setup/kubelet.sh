#!/usr/bin/env bash
# Runs kubelet in either view, by default without an API server. kubelet then runs the pods whose
# manifests are in a directory.
#
#   tests/setup/kubelet.sh start CRI-SOCKET [MANIFEST-DIR]    returns when kubelet answers
#   tests/setup/kubelet.sh stop
#
# CRI-SOCKET is a path or unix:// address. MANIFEST-DIR defaults to /etc/kubernetes/manifests, and
# kubelet reads it every second. kubelet answers requests to http://127.0.0.1:10255/pods and
# /healthz without credentials. It logs to /out/kubelet.log and stores its state in
# /var/lib/kubelet. It uses the cgroup driver that the runtime reports.
#
# Environment variables: KUBELET is the program (default: kubelet in PATH). KUBELET_CONFIG contains
# lines for its configuration. tests/setup/cluster.sh sets two more variables: KUBELET_KUBECONFIG is
# the configuration for reaching the API server, and KUBELET_ADDRESS the address that kubelet
# listens on.
set -euo pipefail

pid_file=/run/kubelet-test.pid
# kubelet runs in a separate cgroup, as a service does. In the root cgroup it would find no swap to
# assign to pods.
group=/sys/fs/cgroup/kubelet-test

# unless_configured KEY VALUE: prints the line, unless KUBELET_CONFIG has the key. YAML allows a key
# once.
unless_configured() {
    grep -q "^$1:" <<<"${KUBELET_CONFIG-}" || echo "$1: $2"
}

start() {
    local socket=$1 manifests=${2:-/etc/kubernetes/manifests} tries
    [[ $socket == *://* ]] || socket=unix://$socket
    mkdir -p "$manifests" /var/lib/kubelet /var/log/pods
    # Requests need no credentials, because the view is not reachable from other machines.
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
$(unless_configured imageGCHighThresholdPercent 100)
# The thresholds on disks are absolute, because 1 % of a large disk is more than the tests need.
$(unless_configured evictionHard '{memory.available: 50Mi, nodefs.available: 100Mi, imagefs.available: 100Mi}')
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

# Stops kubelet. The containers keep running, as they do on a node.
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
    # The processes that kubelet has started exit a moment later.
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
