"""keepd for sidebyside.py: the daemon stays up over a run's steps, every step is a keepctl command.

Reached as its users reach it: CPU, memory and writes of daemon and keepctl are counted together. W1 is captured as a `sqlite`
source (verify = quick, the default), the others as `files`. KEEPD_BIN names the directory of the binaries (default: the
release build of this checkout). `peak(tool)` gives the daemon's own peak memory.
"""
import os
import shlex
import signal
import subprocess
import time

from sidebyside import Tool

HERE = os.path.dirname(os.path.abspath(__file__))
BIN = os.environ.get("KEEPD_BIN", os.path.join(HERE, "..", "target", "release"))

CONFIG = """
[daemon]
state_dir = "{tmp}/state"
socket = "{tmp}/socket"
[encryption.main]
key_file = "{tmp}/key"
[destination.local]
service = "fs"
root = "{repo}"
encryption = "main"
[job.bench]
destinations = ["local"]
[[job.bench.source]]
name = "data"
{kind} = "{path}"
"""


class Keepd(Tool):
    name = "keepd"

    def __init__(self):
        self.daemon = None

    def binary(self, name):
        return os.path.realpath(os.path.join(BIN, name))

    def version(self):
        r = subprocess.run([self.binary("keepd"), "--version"], capture_output=True, text=True)
        return r.stdout.strip() if r.returncode == 0 else None

    def start(self, ctx):
        kind, path = ("sqlite", ctx["src"] + "/app.db") if ctx["workload"] == "w1" else ("files", ctx["src"])
        config = os.path.join(ctx["tmp"], "keepd.toml")
        with open(config, "w") as f:
            f.write(CONFIG.format(kind=kind, path=path, **ctx))
        subprocess.run([self.binary("keepd"), "key", "generate", ctx["tmp"] + "/key"], check=True, stdout=subprocess.DEVNULL)
        # sidebyside.py empties the repository's directory at first; the daemon is told by NOTIFY_SOCKET as systemd would be.
        log = open(os.path.join(ctx["tmp"], "keepd.log"), "ab")
        self.daemon = subprocess.Popen([self.binary("keepd"), "--config", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for _ in range(200):
            r = subprocess.run([self.binary("keepctl"), "--socket", ctx["tmp"] + "/socket", "-q", "status"], capture_output=True)
            if r.returncode != 4:
                return
            time.sleep(.05)
        raise SystemExit("keepd did not start; see %s/keepd.log" % ctx["tmp"])

    def stop(self, ctx):
        if self.daemon:
            self.daemon.send_signal(signal.SIGTERM)
            self.daemon.wait(60)
            self.daemon = None

    def extra_pids(self):
        return (self.daemon.pid,) if self.daemon else ()

    def step(self, step, ctx):
        ctl = shlex.join([self.binary("keepctl"), "--socket", ctx["tmp"] + "/socket", "--no-progress"])
        if step.startswith("backup"):
            return "exec %s -q backup bench" % ctl
        return {
            "list": "exec %s list" % ctl,
            "ls": "exec %s ls -R latest" % ctl,
            "check": "exec %s check local --read-data" % ctl,
            "restore": "exec %s -q restore latest --to %s" % (ctl, shlex.quote(ctx["dst"])),
            # To the last one: all others deleted, then what nothing needs.
            "prune": "for b in $(%s list | awk 'NR > 2 { print $1 }'); do %s delete --yes $b; done; %s prune local" % (ctl, ctl, ctl),
        }.get(step)


TOOLS = [Keepd()]
