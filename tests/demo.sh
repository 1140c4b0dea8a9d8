#!/usr/bin/env bash
# Shows rrun's main functions with real output. Builds an image and pushes it to a registry. Uses
# crictl to run a pod and its containers, and shows limits, logs, exec, statistics and a forwarded
# port. Then creates and deletes a container directly with rrun. Each command is shown before its
# output. `make demo` builds everything and runs this script.
#
# If the host has cgroup v2 controllers, the demo runs in a private view of this machine
# (tests/native/run). If the host has no controllers, the demo runs in the guest machine
# (tests/vm/run). The demo leaves no files on the host.
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
    echo "This host has no cgroup v2 controllers for CPU, memory and processes. The demo runs in the guest machine, which is about twenty times slower."
    exec "$HERE/vm/run" --timeout 1200 -- /src/tests/demo.sh inside
}

# title TEXT: prints the title of a step, its number and the number of steps.
STEPS=$(grep -c '^    title ' "$0") step=0
title() {
    step=$((step + 1))
    printf '\n\e[1m## %d of %d: %s\e[0m\n' "$step" "$STEPS" "$*"
}

# show COMMAND…: prints a command as a user would type it, and then its output.
show() {
    printf '\e[36m$ %s\e[0m\n' "$*"
    eval "$*"
}

# show_failure COMMAND…: prints a command that must fail, and then its output.
show_failure() {
    printf '\e[36m$ %s\e[0m\n' "$*"
    eval "$*" && { echo "this command should have failed: $*"; exit 1; }
    return 0
}

# inventory: lists the objects on the machine that a container could leave behind.
inventory() {
    awk '{ print "mount", $5 }' /proc/self/mountinfo
    find /sys/fs/cgroup -mindepth 1 -type d -printf 'cgroup %p\n'
    # The bridge rrun0 is not in the list, because it remains for the node's next pod.
    for interface in /sys/class/net/*; do
        [[ $interface == */rrun0 ]] || echo "interface ${interface##*/}"
    done
    ps -eo args= | grep -E '^(\S*/)?(rrun|sh -c|sleep|httpd|dd) ' | sed 's/^/process /' || true
    find /run/rrun/pods /run/netns /run/rrun/runtime /var/lib/rrun/containers /var/log/pods /run/demo \
        -mindepth 1 -maxdepth 2 -printf 'file %p\n' 2>/dev/null || true
}

# cpu_used CGROUP SECONDS: prints the CPU usage of a cgroup's processes, in thousandths of a CPU.
cpu_used() {
    local before after started ended
    before=$(awk '$1 == "usage_usec" { print $2 }' "$1/cpu.stat")
    started=${EPOCHREALTIME/./}
    sleep "$2"
    after=$(awk '$1 == "usage_usec" { print $2 }' "$1/cpu.stat")
    ended=${EPOCHREALTIME/./}
    echo "used $(((after - before) * 1000 / (ended - started)))m of a CPU over $2 s"
}

# until_ok COMMAND…: repeats a command until it succeeds, for at most a minute.
until_ok() {
    local deadline=$((SECONDS + 60))
    while [[ $SECONDS -lt $deadline ]]; do
        "$@" >/dev/null 2>&1 && return
        sleep 0.2
    done
    echo "this command did not succeed within a minute: $*"
    "$@"
}

exited() { [[ $(crictl inspect --output go-template --template '{{.status.state}}' "$1") == CONTAINER_EXITED ]]; }

services() {
    mkdir -p /etc/rrun/config.d /run/demo
    # Lowering oom_score_adj requires CAP_SYS_RESOURCE, which some hosts do not grant to containers.
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

    title "An image is built from a test image and an HTML page, and pushed to a registry on 127.0.0.1:5000"
    show "skopeo --insecure-policy copy -q --src-tls-verify=false docker://127.0.0.1:5000/demo/busybox oci:layout:hello"
    echo '<h1>hello from rrun</h1>' >index.html
    show "umoci insert --image layout:hello index.html /www/index.html"
    show "umoci config --image layout:hello --config.cmd httpd --config.cmd -f --config.cmd -v --config.cmd -p --config.cmd 8080 --config.cmd -h --config.cmd /www"
    show "skopeo --insecure-policy copy -q --dest-tls-verify=false oci:layout:hello docker://127.0.0.1:5000/demo/hello:1"

    title "crictl connects to rrun-cri, whose socket is configured in /etc/crictl.yaml"
    show "crictl version"
    show "crictl pull 127.0.0.1:5000/demo/hello:1"
    show "crictl images"

    title "A pod has its own IP address, and no pause container"
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

    title "A container runs with a CPU request of 100m and limits of 500m CPU and 64Mi memory"
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
    show "crictl exec \$WEB sh -c 'echo this command used the streaming server, as kubectl exec does'"
    show "crictl port-forward \$POD 8090:8080 >forward.log 2>&1 & FORWARD=\$!"
    until_ok curl -fs http://127.0.0.1:8090/
    show "curl -s http://127.0.0.1:8090/"
    show "kill \$FORWARD"
    wait "$FORWARD" 2>/dev/null || true
    GROUP=/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$(crictl inspect --output go-template --template '{{.info.pid}}' "$WEB")/cgroup")
    show "cd $GROUP; head cpu.weight cpu.max memory.max; cd - >/dev/null"

    title "The CPU limit works: a busy loop gets half a CPU, and a quarter after crictl update"
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

    title "The memory limit works: a process that allocates 200 MB is killed, and the reason is OOMKilled"
    sed -e 's/"web"/"greedy"/; s/web.log/greedy.log/; s/"image": {/"command": ["dd", "if=\/dev\/zero", "of=\/dev\/null", "bs=200M"], "image": {/' web.json >greedy.json
    show "GREEDY=\$(crictl create \$POD greedy.json pod.json); crictl start \$GREEDY"
    until_ok exited "$GREEDY"
    show "crictl inspect --output go-template --template '{{.status.reason}}, exit code {{.status.exitCode}}' \$GREEDY; echo"
    [[ $(crictl inspect --output go-template --template '{{.status.reason}}' "$GREEDY") == OOMKilled ]]

    title "rrun-cri is killed and started again, and the pod continues to run"
    show "kill -KILL $SERVER"
    wait "$SERVER" 2>/dev/null || true
    show "curl -s http://\$IP:8080/"
    rrun-cri >>/run/rrun-cri.log 2>&1 &
    SERVER=$!
    until_ok crictl version
    show "crictl ps --all"

    title "The containers, the pod and the image are removed"
    show "crictl stop --timeout 1 \$WEB"
    show "crictl rm \$WEB \$SPIN \$GREEDY"
    show "crictl stopp \$POD"
    show "crictl rmp \$POD"
    show "crictl rmi 127.0.0.1:5000/demo/hello:1"
    show "crictl ps --all; crictl pods"

    title "A container is created, used and deleted with rrun, which has runc's command line"
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

    title "No mounts, cgroups, interfaces, processes or files remain (except the bridge rrun0, for the next pod)"
    cd /
    rm -rf /run/demo/* /run/rrun/runtime
    until_ok same
    show "diff /run/before /run/after && echo no differences"

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
