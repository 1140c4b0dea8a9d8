#!/usr/bin/env bash
# Runs a complete Kubernetes cluster of one node, in either view: etcd, the API server, the
# controller manager, the scheduler, kube-proxy in nftables mode, and a kubelet that uses a running
# CRI server.
#
#   tests/setup/cluster.sh start CRI-SOCKET [MANIFEST-DIR]    returns when the node is ready
#   tests/setup/cluster.sh metrics                            adds the metrics API: metrics-server
#   tests/setup/cluster.sh stop
#
# kubectl uses the cluster with KUBECONFIG=/run/cluster/admin.conf. The logs are in /out/cluster/.
# The environment variables that configure kubelet are listed in tests/setup/kubelet.sh. No other
# user can reach this machine, so the API server's certificate is self-signed, and the credentials
# are tokens that each start generates.
set -euo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")

state=/run/cluster
export KUBECONFIG=$state/admin.conf KUBECACHEDIR=$state/cache
server=https://192.0.2.2:6443

# kubeconfig FILE TOKEN
kubeconfig() {
    cat >"$1" <<END
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "$server", insecure-skip-tls-verify: true}}]
users: [{name: user, user: {token: "$2"}}]
contexts: [{name: test, context: {cluster: test, user: user}}]
current-context: test
END
    chmod 600 "$1"
}

# daemon NAME ARGUMENT...
daemon() {
    local name=$1
    setsid "$@" >>"/out/cluster/$name.log" 2>&1 </dev/null &
    echo $! >"$state/$name.pid"
}

# until_true SECONDS WHAT CMD...
until_true() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [[ $SECONDS -lt $end ]] || { echo "$what: not reached before the timeout" >&2; tail -n 5 /out/cluster/*.log >&2; exit 1; }
        sleep 0.5
    done
}

node_is_ready() {
    [[ $(kubectl get nodes -o 'jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}') == True ]]
}

start() {
    local socket=$1 manifests=${2:-$state/manifests} node name
    node=$(hostname)
    mkdir -p "$state/certs" /out/cluster
    chmod 700 "$state"
    openssl genrsa -out "$state/accounts.key" 2048 2>/dev/null
    # Create the client certificate that the API server uses for extension API servers. The
    # certificate is self-signed, so it is also the certificate of its authority.
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=front -addext extendedKeyUsage=clientAuth \
        -keyout "$state/front.key" -out "$state/certs/front.crt" 2>/dev/null
    declare -A tokens
    for name in admin node manager scheduler proxy metrics; do
        tokens[$name]=$(openssl rand -hex 16)
        kubeconfig "$state/$name.conf" "${tokens[$name]}"
    done
    cat >"$state/tokens.csv" <<END
${tokens[admin]},admin,1,"system:masters"
${tokens[node]},system:node:$node,2,"system:nodes"
${tokens[manager]},system:kube-controller-manager,3,"system:masters"
${tokens[scheduler]},system:kube-scheduler,4,"system:masters"
${tokens[proxy]},system:kube-proxy,5,"system:node-proxier"
${tokens[metrics]},metrics-server,6,"system:masters"
END
    chmod 600 "$state/tokens.csv"

    daemon etcd --data-dir /var/lib/etcd --unsafe-no-fsync --logger zap --log-level warn \
        --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
        --listen-peer-urls http://127.0.0.1:2380
    daemon kube-apiserver --etcd-servers http://127.0.0.1:2379 --bind-address 192.0.2.2 \
        --advertise-address 192.0.2.2 --service-cluster-ip-range 10.96.0.0/16 --allow-privileged \
        --cert-dir "$state/certs" --token-auth-file "$state/tokens.csv" --authorization-mode Node,RBAC \
        --service-account-issuer https://kubernetes.default.svc \
        --service-account-key-file "$state/accounts.key" --service-account-signing-key-file "$state/accounts.key" \
        --kubelet-preferred-address-types InternalIP \
        --requestheader-client-ca-file "$state/certs/front.crt" --requestheader-username-headers X-Remote-User \
        --requestheader-group-headers X-Remote-Group --requestheader-extra-headers-prefix X-Remote-Extra- \
        --proxy-client-cert-file "$state/certs/front.crt" --proxy-client-key-file "$state/front.key"
    until_true 300 "the API server's health" kubectl get --raw /readyz
    daemon kube-controller-manager --kubeconfig "$state/manager.conf" --leader-elect=false \
        --service-account-private-key-file "$state/accounts.key" --root-ca-file "$state/certs/apiserver.crt" \
        --node-monitor-grace-period 5m
    daemon kube-scheduler --kubeconfig "$state/scheduler.conf" --leader-elect=false
    KUBELET_KUBECONFIG=$state/node.conf KUBELET_ADDRESS=0.0.0.0 \
        "$HERE/kubelet.sh" start "$socket" "$manifests"
    daemon kube-proxy --kubeconfig "$state/proxy.conf" --proxy-mode nftables --conntrack-max-per-core 0 \
        --cluster-cidr 10.88.0.0/16
    until_true 300 "the node's readiness" node_is_ready
    # Pods need the default service account, which the controller manager creates some time after
    # its start.
    until_true 120 "the default service account" kubectl get serviceaccount default
}

metrics_are_served() { kubectl get --raw /apis/metrics.k8s.io/v1beta1; }

# Starts metrics-server on the node itself, not in a pod, because no image of it is available.
metrics() {
    daemon metrics-server --kubeconfig "$state/metrics.conf" --authentication-kubeconfig "$state/metrics.conf" \
        --authorization-kubeconfig "$state/metrics.conf" --secure-port 4443 --cert-dir "$state/metrics-certs" \
        --kubelet-insecure-tls --kubelet-preferred-address-types InternalIP \
        --metric-resolution 15s --kubelet-request-timeout 12s
    kubectl apply -f - <<'END'
apiVersion: v1
kind: Service
metadata: {name: metrics-server, namespace: kube-system}
spec:
  ports: [{port: 443, targetPort: 4443}]
---
apiVersion: v1
kind: Endpoints
metadata: {name: metrics-server, namespace: kube-system}
subsets: [{addresses: [{ip: 192.0.2.2}], ports: [{port: 4443}]}]
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.metrics.k8s.io}
spec:
  group: metrics.k8s.io
  version: v1beta1
  service: {name: metrics-server, namespace: kube-system, port: 443}
  insecureSkipTLSVerify: true
  groupPriorityMinimum: 100
  versionPriority: 100
END
    until_true 300 "the metrics API" metrics_are_served
}

# Stops the processes that `start` and `metrics` started, in reverse order. Containers keep running.
stop() {
    local name pid tries
    "$HERE/kubelet.sh" stop
    for name in metrics-server kube-proxy kube-scheduler kube-controller-manager kube-apiserver etcd; do
        [[ -f $state/$name.pid ]] || continue
        pid=$(<"$state/$name.pid")
        kill "$pid" 2>/dev/null || true
        for ((tries = 0; tries < 100; tries++)); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
    ! command -v kube-proxy >/dev/null || kube-proxy --cleanup --proxy-mode nftables >/dev/null 2>&1 || true
    # The remaining rules are kubelet's own. A running kubelet creates them again every minute.
    for name in iptables ip6tables; do
        ! "$name-save" 2>/dev/null | grep -q KUBE- || "$name-save" | grep -v KUBE- | "$name-restore"
    done
    rm -rf "$state" /var/lib/etcd
}

case ${1-} in
    start) [[ $# -ge 2 ]] || { echo "usage: cluster.sh start CRI-SOCKET [MANIFEST-DIR]" >&2; exit 2; }; "$@" ;;
    metrics | stop) "$1" ;;
    *) echo "usage: cluster.sh start CRI-SOCKET [MANIFEST-DIR] | metrics | stop" >&2; exit 2 ;;
esac
