"""Export and import of portable archives, beside tar with gzip and zstd on the same bytes. Called by archive.sh."""

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work" / "archive"
BINARIES = HERE.parent / "target" / "release"


def run(command, **more):
    return subprocess.run(command, check=True, **more)


def timed(command):
    began = time.monotonic()
    out = subprocess.run(command, shell=isinstance(command, str), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    took = time.monotonic() - began
    if out.returncode:
        sys.exit(f"{command}: {out.returncode}\n{out.stderr.decode()}")
    return took


class Daemon:
    def __init__(self, sources):
        self.dir = Path(tempfile.mkdtemp(dir=WORK))
        run([BINARIES / "keepd", "key", "generate", self.dir / "main.key"], stdout=subprocess.DEVNULL)
        text = f'[daemon]\nstate_dir = "{self.dir}/state"\nsocket = "{self.dir}/keepd.sock"\n[encryption.main]\nkey_file = "{self.dir}/main.key"\n'
        for name in ("here", "there"):
            text += f'[destination.{name}]\nservice = "fs"\nroot = "{self.dir}/{name}"\nencryption = "main"\n'
        text += '[job.bench]\ndestinations = ["here"]\n'
        for kind, path in sources:
            text += f'[[job.bench.source]]\nname = "{path.name.split(".")[0]}"\n{kind} = "{path}"\n'
        (self.dir / "keepd.toml").write_text(text)
        self.log = open(self.dir / "log", "w")
        self.process = subprocess.Popen([BINARIES / "keepd", "--config", self.dir / "keepd.toml"], stdout=self.log, stderr=self.log)
        while not (self.dir / "keepd.sock").exists():
            time.sleep(0.05)

    def ctl(self, *arguments):
        return [str(BINARIES / "keepctl"), "--socket", str(self.dir / "keepd.sock"), "-q", *map(str, arguments)]

    def measured(self, *arguments):
        """Seconds, and the daemon's peak memory meanwhile in MiB."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        took = timed(self.ctl(*arguments))
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return took, int(peak.split()[1]) / 1024

    def forget(self):
        """An import begins with an empty repository."""
        shutil.rmtree(self.dir / "there", ignore_errors=True)

    def end(self):
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.dir)


def workload(name, scale):
    """The paths that are backed up, with their kinds."""
    root = HERE / ".work" / "data" / (name if scale == 1 else f"{name}-{scale}")
    if not (root / "spec.json").exists():
        run([sys.executable, HERE / "workloads.py", "gen", name, "--root", root, "--scale", str(scale)])
    if name == "w1":
        return [("sqlite", next((root / "src").rglob("*.db")))]
    return [("files", root / "src")]


def one(name, scale, rounds):
    sources = workload(name, scale)
    paths = [path for _, path in sources]
    size = sum(f.lstat().st_size for p in paths for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file())
    daemon = Daemon(sources)
    run(daemon.ctl("backup", "bench"), stdout=subprocess.DEVNULL)
    tar = f"tar -C {paths[0].parent} -cf - {paths[0].name}"
    out = daemon.dir / "out"
    out.mkdir()
    rows = {}

    def note(what, took, peak=None, of=None):
        rows.setdefault(what, {"took": [], "peak": 0, "bytes": 0})
        rows[what]["took"].append(took)
        rows[what]["peak"] = max(rows[what]["peak"], peak or 0)
        rows[what]["bytes"] = of.stat().st_size if of and of.exists() else rows[what]["bytes"]

    def peer(what, command, file):
        def step():
            file.unlink(missing_ok=True)
            note(what, timed(f"{command} > {file}"), of=file)
        return step

    def export(suffix):
        def step():
            file = out / f"keepd{suffix}"
            file.unlink(missing_ok=True)
            Path(f"{file}.key").unlink(missing_ok=True)
            took, peak = daemon.measured("export", "latest", "-o", file)
            note(f"keepctl export {suffix}", took, peak, file)
        return step

    def bring(suffix):
        def step():
            daemon.forget()
            key = out / f"keepd{suffix}.key"
            key = ["--key", key] if key.exists() else []
            took, peak = daemon.measured("import", out / f"keepd{suffix}", *key, "--destination", "there")
            note(f"keepctl import {suffix}", took, peak)
        return step

    def extract(what, command):
        def step():
            to = daemon.dir / "extracted"
            to.mkdir()
            note(what, timed(f"{command} | tar -C {to} -xf -"))
            shutil.rmtree(to)
        return step

    suffixes = [".tar.zst", ".tar.zst.enc", ".tar.gz", ".tar.gz.enc"]
    first = [peer("tar | zstd -3 -T2", f"{tar} | zstd -q -3 -T2", out / "peer.zst"), peer("tar | gzip", f"{tar} | gzip", out / "peer.gz")]
    for _ in range(rounds):
        steps = first + [export(s) for s in suffixes]
        random.shuffle(steps)
        for step in steps:
            step()
        steps = [extract("zstd -d | tar -x", f"zstd -dcq {out}/peer.zst"), extract("gzip -d | tar -x", f"gzip -dc {out}/peer.gz")]
        steps += [bring(s) for s in suffixes]
        random.shuffle(steps)
        for step in steps:
            step()
    daemon.end()
    print(f"\n{name}, {size / 1e9:.2f} GB of contents, medians of {rounds}\n\n| | seconds | beside its peer | peak MiB | MB |\n|---|---|---|---|---|")
    for what, row in rows.items():
        took = statistics.median(row["took"])
        peer_name = "tar | gzip" if ".gz" in what else "tar | zstd -3 -T2"
        beside = took / statistics.median(rows[peer_name]["took"])
        print(f"| {what} | {took:.2f} | {beside:.2f} | {row['peak']:.0f} | {row['bytes'] / 1e6:.0f} |")


if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    rounds, scale = int(sys.argv[1]), float(sys.argv[2])
    for name in ("w1", "w2"):
        one(name, scale, rounds)
