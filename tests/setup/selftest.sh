#!/usr/bin/env bash
# Checks that both views behave as documented. Reports the checks as cargo reports tests, for
# tests/run.
set -uo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")
native=$HERE/../native/run
guest=$HERE/../vm/run
. "$HERE/../attempts.sh"
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT

the_native_view_returns_the_exit_status_of_the_command() {
    "$native" --out "$OUT" -- sh -c 'exit 42'
    [[ $? -eq 42 ]]
}

the_native_view_is_removed_when_its_command_exits() {
    local marker=selftest-$$
    "$native" --out "$OUT" -- sh -c "mkdir /sys/fs/cgroup/$marker && mount -t tmpfs $marker /mnt &&
        ip link add br-$$ type bridge && touch /run/$marker /var/lib/rrun/$marker && setsid sleep 1000.$$ &
        sleep 0.3" || return 1
    # None of the objects that the command created in the view may exist on the host.
    ! ip link show "br-$$" 2>/dev/null &&
        ! pgrep -f "sleep 1000[.]$$" &&
        [[ ! -e /run/$marker && ! -e /var/lib/rrun/$marker ]] &&
        ! grep -q "$marker" /proc/self/mountinfo &&
        ! unshare --mount bash -c "mount -t cgroup2 none /mnt && find /mnt -name $marker | grep ."
}

the_native_view_cannot_write_to_the_checkout() {
    "$native" --out "$OUT" -- sh -c '! touch /src/selftest 2>/dev/null'
}

a_file_that_a_command_writes_to_out_is_copied_to_the_host() {
    "$native" --out "$OUT" -- sh -c 'echo native >/out/native' && [[ $(<"$OUT/native") == native ]] &&
        "$guest" --timeout 120 --out "$OUT" -- sh -c 'echo guest >/out/guest' && [[ $(<"$OUT/guest") == guest ]]
}

the_guest_has_every_controller_and_returns_the_exit_status() {
    "$guest" --timeout 120 --out "$OUT" -- bash -c '
        for controller in cpu cpuset io memory pids hugetlb; do
            grep -qw $controller /sys/fs/cgroup/cgroup.subtree_control || exit 1
        done
        exit 43'
    [[ $? -eq 43 ]]
}

the_guest_boots_systemd_if_requested() {
    "$guest" --systemd --timeout 180 --out "$OUT" -- bash -c '
        [[ $(</proc/1/comm) == systemd ]] && busctl --quiet status org.freedesktop.systemd1 >/dev/null &&
            [[ $RRUN_TEST_VIEW == vm-systemd ]] && exit 44'
    [[ $? -eq 44 ]]
}

the_guest_is_switched_off_at_its_timeout() {
    "$guest" --timeout 12 --out "$OUT" -- sleep 1000
    [[ $? -eq 124 ]]
}

a_check_that_fails_once_is_reported_as_flaky_and_passes() {
    local mark=$OUT/mark printed
    rm -f "$mark"
    fails_once() { [[ -e $mark ]] || { : >"$mark"; echo 'too early'; return 1; }; }
    printed=$(passed=0 failed=0; attempt check fails_once; attempts_result)
    [[ $? -eq 0 && $printed == *'flaky: check'*'too early'*'test check ... ok'*'1 passed; 0 failed'* ]]
}

a_check_that_fails_twice_fails() {
    local printed
    printed=$(passed=0 failed=0; attempt check false; attempts_result)
    [[ $? -eq 1 && $printed == *'test check ... FAILED'*'1 failed'* ]]
}

for name in $(declare -F | awk '/ the_| a_/ { print $3 }'); do
    attempt "testbed::$name" "$name"
done
attempts_result
