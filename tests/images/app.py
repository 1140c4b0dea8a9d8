"""The application of kubelet's tests: a web service on port 5000.

What it answers shows where it runs and what it was given: version, host, addresses, environment,
the files of its volumes. /ready and /live can be told to fail; /burn and /grow use what a limit limits.
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
    """Every file in a volume, by name; what cannot be read is told too."""
    found = {}
    for path in sorted(pathlib.Path(directory).glob("*")):
        if path.is_file() and not path.name.startswith("."):
            try:
                found[path.name] = path.read_text(errors="replace")[:4096]
            except OSError as error:
                found[path.name] = str(error)
    return found


@app.get("/")
def tell():
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
    # As process 1 it has no default action for SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app.run(host="::", port=int(os.environ.get("APP_PORT", "5000")), threaded=True)
