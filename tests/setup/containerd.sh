#!/usr/bin/env bash
# Runs containerd in either view, so that tests can compare rrun-cri with containerd. containerd
# uses runc and the CNI bridge plugin, as in a cluster.
#
#   tests/setup/containerd.sh start [REGISTRY-PORT]    returns when containerd answers; default port 5000
#   tests/setup/containerd.sh stop
#
# The environment variable RUNC can contain the path of another runtime.
#
# containerd answers on unix:///run/containerd/containerd.sock and logs to /out/containerd.log. It
# pulls images of registry.k8s.io and of the other names in tests/images/registry.sh from the local
# registry, which must already run. Its network configuration is in a separate directory, so that
# rrun-cri on the same machine continues to use its embedded network. Call crictl like this:
# `crictl -r unix:///run/containerd/containerd.sock`.
set -euo pipefail

socket=/run/containerd/containerd.sock
pid_file=/run/containerd-test.pid

start() {
    local port=${1:-5000} restrict=false runc=/usr/sbin/runc tries
    # Lowering oom_score_adj requires CAP_SYS_RESOURCE, and some hosts do not grant it to
    # containers.
    [[ $((0x$(awk '/^CapEff/ { print $2 }' /proc/self/status) >> 24 & 1)) -eq 1 ]] || restrict=true
    # The native view has no controllers if the host uses cgroup v1.
    grep -qw cpu /sys/fs/cgroup/cgroup.controllers ||
        runc=$(readlink -f -- "$(dirname -- "$0")")/runc-without-limits
    runc=${RUNC:-$runc}
    mkdir -p /etc/containerd/cni
    "$(dirname -- "$0")/../images/registry.sh" mirrors /etc/containerd/certs.d "$port"
    cat >/etc/containerd/config.toml <<END
version = 3

[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '/etc/containerd/certs.d'

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = 'registry.k8s.io/pause:3.9'

[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = $restrict

[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['/usr/lib/cni']
  conf_dir = '/etc/containerd/cni'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    BinaryName = '$runc'
    SystemdCgroup = $([[ $RRUN_TEST_VIEW == vm-systemd ]] && echo true || echo false)
END
    cat >/etc/containerd/cni/10-bridge.conflist <<'END'
{
  "cniVersion": "1.0.0",
  "name": "containerd",
  "plugins": [
    {
      "type": "bridge", "bridge": "cni-containerd", "isGateway": true, "ipMasq": true,
      "ipam": {
        "type": "host-local",
        "ranges": [[{"subnet": "10.88.0.0/16"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
END
    setsid containerd >/out/containerd.log 2>&1 </dev/null &
    echo $! >"$pid_file"
    for ((tries = 0; tries < 600; tries++)); do
        ctr --connect-timeout 1s version >/dev/null 2>&1 && return
        kill -0 "$(<"$pid_file")" 2>/dev/null || break
        sleep 0.1
    done
    echo "containerd does not answer on $socket:" >&2
    tail -n 20 /out/containerd.log >&2
    exit 1
}

stop() {
    [[ -f $pid_file ]] || return 0
    kill "$(<"$pid_file")" 2>/dev/null || true
    rm -f "$pid_file"
}

case ${1-} in
    start | stop) "$@" ;;
    *) echo "usage: containerd.sh start [REGISTRY-PORT] | stop" >&2; exit 2 ;;
esac
