"""The application that kubelet's tests run: a web service on port 5000.

Its answer to / shows where it runs and how it is configured: version, host, addresses, environment and
the files of its volumes. POST /fail/ready and /fail/live make these probes fail. /burn uses CPU time
and /grow uses memory, so that tests can reach a limit.
"""

import os
import pathlib
import signal
import socket
import sys
import threading
import time

from flask import Flask, abort, jsonify, request

app = Flask(__name__)
failing = set()
hoard = []


def files(directory):
    """Returns the content of each file in a volume, by name, or the error of reading it."""
    found = {}
    for path in sorted(pathlib.Path(directory).glob("*")):
        if path.is_file() and not path.name.startswith("."):
            try:
                found[path.name] = path.read_text(errors="replace")[:4096]
            except OSError as error:
                found[path.name] = str(error)
    return found


@app.get("/")
def describe():
    return jsonify(
        version=os.environ.get("APP_VERSION"),
        host=socket.gethostname(),
        client=request.remote_addr,
        user=[os.getuid(), os.getgid(), sorted(os.getgroups())],
        environment={name: value for name, value in os.environ.items() if name.startswith("APP_")},
        config=files("/config"),
        secret=files("/secret"),
        downward=files("/downward"),
        shared=files("/shared"),
    )


@app.get("/ready")
@app.get("/live")
def probe():
    name = request.path.strip("/")
    if name in failing:
        abort(503)
    return "ok\n"


@app.post("/fail/<name>")
def fail(name):
    failing.add(name)
    return "ok\n"


@app.post("/burn/<int:seconds>")
def burn(seconds):
    def spin():
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass

    threading.Thread(target=spin, daemon=True).start()
    return "ok\n"


@app.post("/grow/<int:megabytes>")
def grow(megabytes):
    hoard.append(b"x" * (megabytes << 20))
    return "ok\n"


@app.get("/slow/<float:seconds>")
def slow(seconds):
    time.sleep(seconds)
    return "ok\n"


if __name__ == "__main__":
    # The kernel ignores SIGTERM for process 1 of a container, unless the process handles the
    # signal.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app.run(host="::", port=int(os.environ.get("APP_PORT", "5000")), threaded=True)
