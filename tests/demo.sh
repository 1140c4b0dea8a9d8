#!/usr/bin/env bash
# The main job, with real output: an image built and pushed to a registry; by crictl a pod and its
# containers, with limits that are seen to hold, logs, exec, statistics, a forwarded port; then a container's life by hand with rrun. Each
# command is shown before its output. `make demo` sets everything up and runs it.
#
# It runs in a private view of this machine (tests/native/run) if there are cgroup v2 controllers,
# else in the guest machine (tests/vm/run). Nothing of it is left on the host.
set -euo pipefail
HERE=$(dirname -- "$(readlink -f -- "$0")")

outside() {
    local controllers=' '
    for file in /sys/fs/cgroup/cgroup.controllers /sys/fs/cgroup/unified/cgroup.controllers; do
        [[ ! -f $file ]] || controllers+="$(<"$file") "
    done
    if [[ $controllers == *' cpu '* && $controllers == *' memory '* && $controllers == *' pids '* ]]; then
        exec "$HERE/native/run" -- /src/tests/demo.sh inside
    fi
    echo "This host has no cgroup v2 controllers for CPU and memory: the demo runs in the guest machine, some twenty times slower."
    exec "$HERE/vm/run" --timeout 1200 -- /src/tests/demo.sh inside
}

# title TEXT: prints the title of a step, its number and the number of steps.
STEPS=$(grep -c '^    title ' "$0") step=0
title() {
    step=$((step + 1))
    printf '\n\e[1m## %d of %d: %s\e[0m\n' "$step" "$STEPS" "$*"
}

# show COMMAND…: the command as one would type it, then what it says.
show() {
    printf '\e[36m$ %s\e[0m\n' "$*"
    eval "$*"
}

# The same for a command that is meant to fail.
show_failure() {
    printf '\e[36m$ %s\e[0m\n' "$*"
    eval "$*" && { echo "that should have failed"; exit 1; }
    return 0
}

# What is on the machine that a container could leave behind.
inventory() {
    awk '{ print "mount", $5 }' /proc/self/mountinfo
    find /sys/fs/cgroup -mindepth 1 -type d -printf 'cgroup %p\n'
    # The bridge is the node's: it stays for the next pod.
    for interface in /sys/class/net/*; do
        [[ $interface == */rrun0 ]] || echo "interface ${interface##*/}"
    done
    ps -eo args= | grep -E '^(\S*/)?(rrun|sh -c|sleep|httpd|dd) ' | sed 's/^/process /' || true
    find /run/rrun/pods /run/netns /run/rrun/runtime /var/lib/rrun/containers /var/log/pods /run/demo \
        -mindepth 1 -maxdepth 2 -printf 'file %p\n' 2>/dev/null || true
}

# cpu_used CGROUP SECONDS: what the processes in it use of a CPU, in thousandths.
cpu_used() {
    local before after started ended
    before=$(awk '$1 == "usage_usec" { print $2 }' "$1/cpu.stat")
    started=${EPOCHREALTIME/./}
    sleep "$2"
    after=$(awk '$1 == "usage_usec" { print $2 }' "$1/cpu.stat")
    ended=${EPOCHREALTIME/./}
    echo "used $(((after - before) * 1000 / (ended - started)))m of a CPU over $2 s"
}

# Waits until a command succeeds, a minute at most.
until_ok() {
    local deadline=$((SECONDS + 60))
    while [[ $SECONDS -lt $deadline ]]; do
        "$@" >/dev/null 2>&1 && return
        sleep 0.2
    done
    echo "waited in vain for: $*"
    "$@"
}

exited() { [[ $(crictl inspect --output go-template --template '{{.status.state}}' "$1") == CONTAINER_EXITED ]]; }

services() {
    mkdir -p /etc/rrun/config.d /run/demo
    # Lowering oom_score_adj takes CAP_SYS_RESOURCE, which some hosts keep to themselves.
    [[ $((0x$(awk '/^CapEff/ { print $2 }' /proc/self/status) >> 24 & 1)) -eq 1 ]] ||
        echo 'restrict_oom_score_adj = true' >/etc/rrun/config.d/10-host.toml
    "$HERE/images/registry.sh" mirrors /etc/rrun/certs.d
    "$HERE/images/registry.sh" start
    printf 'runtime-endpoint: unix:///run/rrun/rrun-cri.sock\ntimeout: 120\n' >/etc/crictl.yaml
    rrun-cri >/run/rrun-cri.log 2>&1 &
    SERVER=$!
    until_ok crictl version || { cat /run/rrun-cri.log; exit 1; }
}

inside() {
    services
    cd /run/demo
    inventory | sort >/run/before

    title "An image, built of a test image and a page of our own, and pushed to a registry on 127.0.0.1:5000"
    show "skopeo --insecure-policy copy -q --src-tls-verify=false docker://127.0.0.1:5000/demo/busybox oci:layout:hello"
    echo '<h1>hello from rrun</h1>' >index.html
    show "umoci insert --image layout:hello index.html /www/index.html"
    show "umoci config --image layout:hello --config.cmd httpd --config.cmd -f --config.cmd -v --config.cmd -p --config.cmd 8080 --config.cmd -h --config.cmd /www"
    show "skopeo --insecure-policy copy -q --dest-tls-verify=false oci:layout:hello docker://127.0.0.1:5000/demo/hello:1"

    title "rrun-cri runs; crictl is told so by /etc/crictl.yaml"
    show "crictl version"
    show "crictl pull 127.0.0.1:5000/demo/hello:1"
    show "crictl images"

    title "A pod: an address of its own, no pause container"
    cat >pod.json <<'END'
{
  "metadata": { "name": "hello", "namespace": "default", "uid": "1" },
  "hostname": "hello",
  "log_directory": "/run/demo/logs",
  "linux": { "cgroup_parent": "/demo", "security_context": { "namespace_options": { "pid": 1 } } }
}
END
    show "cat pod.json"
    show "POD=\$(crictl runp pod.json)"
    show "crictl pods"
    show "IP=\$(crictl inspectp --output go-template --template '{{.status.network.ip}}' \$POD); echo \$IP"

    title "A container with requests of 100m and limits of 500m and 64Mi"
    cat >web.json <<'END'
{
  "metadata": { "name": "web" },
  "labels": { "io.kubernetes.pod.name": "hello", "io.kubernetes.pod.namespace": "default" },
  "image": { "image": "127.0.0.1:5000/demo/hello:1" },
  "log_path": "web.log",
  "linux": { "resources": { "cpu_shares": 102, "cpu_period": 100000, "cpu_quota": 50000,
                            "memory_limit_in_bytes": 67108864 },
             "security_context": { "namespace_options": { "pid": 1 } } }
}
END
    show "cat web.json"
    show "WEB=\$(crictl create \$POD web.json pod.json)"
    show "crictl start \$WEB"
    until_ok curl -fs "http://$IP:8080/"
    show "curl -s http://\$IP:8080/"
    show "crictl logs \$WEB"
    show "crictl exec -s \$WEB ps"
    show "crictl exec \$WEB sh -c 'echo by the streaming server, as kubectl exec does it'"
    show "crictl port-forward \$POD 8090:8080 >forward.log 2>&1 & FORWARD=\$!"
    until_ok curl -fs http://127.0.0.1:8090/
    show "curl -s http://127.0.0.1:8090/"
    show "kill \$FORWARD"
    wait "$FORWARD" 2>/dev/null || true
    GROUP=/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$(crictl inspect --output go-template --template '{{.info.pid}}' "$WEB")/cgroup")
    show "cd $GROUP; head cpu.weight cpu.max memory.max; cd - >/dev/null"

    title "The CPU limit holds: a process that spins gets half a CPU"
    sed -e 's/"web"/"spin"/; s/web.log/spin.log/; s/"image": {/"command": ["sh", "-c", "while :; do :; done"], "image": {/' web.json >spin.json
    show "SPIN=\$(crictl create \$POD spin.json pod.json); crictl start \$SPIN"
    GROUP=/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$(crictl inspect --output go-template --template '{{.info.pid}}' "$SPIN")/cgroup")
    sleep 1
    show "cpu_used \$GROUP 5"
    show "crictl update --cpu-quota 25000 \$SPIN"
    sleep 1
    show "cpu_used \$GROUP 5"
    show "crictl stats" | sed 's/\x1b\[2J\x1b\[H//'
    show "crictl stop --timeout 1 \$SPIN"

    title "The memory limit holds: an allocation of 200 MB is killed, and so reported"
    sed -e 's/"web"/"greedy"/; s/web.log/greedy.log/; s/"image": {/"command": ["dd", "if=\/dev\/zero", "of=\/dev\/null", "bs=200M"], "image": {/' web.json >greedy.json
    show "GREEDY=\$(crictl create \$POD greedy.json pod.json); crictl start \$GREEDY"
    until_ok exited "$GREEDY"
    show "crictl inspect --output go-template --template '{{.status.reason}}, exit code {{.status.exitCode}}' \$GREEDY; echo"
    [[ $(crictl inspect --output go-template --template '{{.status.reason}}' "$GREEDY") == OOMKilled ]]

    title "rrun-cri is killed and started again: the pod has not noticed"
    show "kill -KILL $SERVER"
    wait "$SERVER" 2>/dev/null || true
    show "curl -s http://\$IP:8080/"
    rrun-cri >>/run/rrun-cri.log 2>&1 &
    SERVER=$!
    until_ok crictl version
    show "crictl ps --all"

    title "Everything is removed"
    show "crictl stop --timeout 1 \$WEB"
    show "crictl rm \$WEB \$SPIN \$GREEDY"
    show "crictl stopp \$POD"
    show "crictl rmp \$POD"
    show "crictl rmi 127.0.0.1:5000/demo/hello:1"
    show "crictl ps --all; crictl pods"

    title "A container's life by hand: rrun has runc's command line"
    show "umoci raw unpack --image layout:hello rootfs"
    show "rrun spec"
    show "jq '.process.terminal = false | .process.args = [\"sleep\", \"600\"] | .linux.resources.memory.limit = 33554432' config.json > c && mv c config.json"
    show "rrun create --pid-file pid by-hand </dev/null"
    show "rrun state by-hand"
    show "rrun start by-hand"
    show "rrun list"
    show "rrun exec by-hand sh -c 'echo I am \$(id -un) on \$(hostname), with \$(cat /sys/fs/cgroup/memory.max) bytes; ps'"
    show "rrun ps by-hand"
    show_failure "rrun delete by-hand"
    show "rrun kill by-hand KILL"
    until_ok stopped
    show "rrun delete by-hand"
    show "rrun list"
    show_failure "rrun run no-such-bundle --bundle /nowhere"

    title "Nothing is left: mounts, cgroups, interfaces, processes and files before and after (the bridge rrun0 stays for the next pod)"
    cd /
    rm -rf /run/demo/* /run/rrun/runtime
    until_ok same
    show "diff /run/before /run/after && echo no difference"

    kill "$SERVER"
    wait "$SERVER" 2>/dev/null || true
    "$HERE/images/registry.sh" stop
}

stopped() { [[ $(rrun state by-hand | jq -r .status) == stopped ]]; }

same() {
    inventory | sort >/run/after
    diff /run/before /run/after
}

case ${1-} in
    inside) inside ;;
    '') outside ;;
    *) echo "usage: demo.sh"; exit 2 ;;
esac
