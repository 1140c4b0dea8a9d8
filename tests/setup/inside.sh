#!/usr/bin/env bash
# Runs a command inside either view, after the set-up steps that both views have in common.
#
#   tests/setup/inside.sh CMD…
#
# The caller sets RRUN_TEST_VIEW and mounts the directories of a view: /src, /out, /images, /tools.
set -euo pipefail

ip link set lo up
# kubelet and etcd require a default route. The route uses an interface that is not connected to a
# network.
if ! ip link show uplink0 >/dev/null 2>&1; then
    ip link add uplink0 type dummy 2>/dev/null || {
        ip link add uplink0 type veth peer name uplink1
        ip link set uplink1 up
    }
    ip address add 192.0.2.2/24 dev uplink0
    ip link set uplink0 up
    ip route add default via 192.0.2.1
fi
echo 1 >/proc/sys/net/ipv4/ip_forward
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"

path=/usr/local/bin
for tool in /tools/*/; do
    # Tests select the older kubelet with the variable KUBELET, so it is not in PATH.
    [[ -d $tool && $tool != */kubelet-old/ ]] && path+=:${tool%/}
done
export PATH=$path:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin
[[ -e /etc/crictl.yaml ]] || cat >/etc/crictl.yaml <<'END'
runtime-endpoint: unix:///run/rrun/rrun-cri.sock
timeout: 60
END
export HOME=/root LANG=C.UTF-8 TERM=${TERM:-linux}
cd /root
exec "$@"
