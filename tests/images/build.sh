#!/usr/bin/env bash
# Builds the test images, which tests/images/make.sh lists, from busybox. One application also uses
# Debian's python3-flask. Prints a directory with a registry's files, which contain all images, and
# with two archives. --peek builds nothing, and fails if the directory does not exist.
#
#   tests/images/build.sh [--demo] [--peek]
#
# --demo: builds only the image that the demo uses, unless all images are built already.
set -euo pipefail
HERE=$(readlink -f -- "$(dirname -- "$0")")
. "$HERE/../setup/cache.sh"

# build_images OUT [all | demo]
build_images() {
    local out=$1
    export RRUN_MAKING_IMAGES=${2:-all}
    cp -a "$("$HERE/../setup/busybox.sh")" "$out/busybox"
    # containerd's pods need a pause process. It waits, reaps the processes that it inherits, and
    # exits on SIGTERM and SIGINT. critest would mistake a shell or busybox for a process of the
    # container.
    gcc -static -Os -s -x c -o "$out/pause" - <<'END'
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void end(int signal) { (void)signal; _exit(0); }
static void reap(int signal) { (void)signal; while (waitpid(-1, 0, WNOHANG) > 0) ; }
int main(void)
{
    signal(SIGTERM, end);
    signal(SIGINT, end);
    signal(SIGCHLD, reap);
    for (;;)
        pause();
}
END
    # critest's test of no_new_privs runs this set-uid program.
    gcc -static -Os -s -x c -o "$out/nnp" - <<'END'
#include <stdio.h>
#include <unistd.h>
int main(void) { printf("Effective uid: %d\n", (int)geteuid()); return 0; }
END
    [[ $RRUN_MAKING_IMAGES == demo ]] || cp -a "$("$HERE/flask.sh")" "$out/flask"
    say "making and pushing the test images"
    "$HERE/../native/run" --out "$out" -- /src/tests/images/make.sh "$RRUN_MAKING_IMAGES"
    rm -rf "$out/busybox" "$out/flask" "$out/nnp" "$out/pause"
}

build_demo() { build_images "$1" demo; }

demo=
[[ ${1-} == --demo ]] && { demo=1; shift; }
key=$({ cat "$HERE"/{build,make,oci,flask}.sh "$HERE/app.py" "$HERE/../setup/busybox.sh"; uname -m; } | sha256sum | cut -c1-12)
if [[ ${1-} == --peek ]]; then
    cache_peek images "$key" || cache_peek images-demo "$key"
elif [[ -n $demo ]] && ! cache_peek images "$key"; then
    cache_entry images-demo "$key" build_demo
elif [[ -z $demo ]]; then
    cache_entry images "$key" build_images
fi
