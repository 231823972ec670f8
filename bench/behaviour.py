#!/usr/bin/env python3
"""What the table beside the others does not show: `behaviour.py [--work DIR] [--only writer,increments,...]`.

  writer       latency of a live database's writer (small transactions without pause): alone, during a first capture, and, without
               keepd, while a reader holds a transaction as long, and beside four processes that only count
  increments   a hundred increments of a database mutated each time: restore of the first and the last, size of the repository
               against the distinct pages; once with a database that grows, once with one that keeps its size
  history      the unchanged run with 1, 100 and 1,000 older backups; then, with these 1,000: start to READY, `keepctl status`,
               resident memory and wakeups of the idle daemon
  scale        first backup and restore of w1 and w2 at scales 0.25, 1 and 4 (or --scales): seconds against bytes

Uses the release build (or KEEPD_BIN). Data goes to --work (default bench/.work); nothing but the standard library is needed.
Prints Markdown.
"""
import argparse
import hashlib
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import time

sys.dont_write_bytecode = True
import workloads as W  # noqa: E402
from keepd_tool import BIN, CONFIG  # noqa: E402


class Keepd:
    """A daemon of its own directory."""

    def __init__(self, directory, kind, path):
        shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory)
        self.dir = directory
        with open(directory + "/keepd.toml", "w") as f:
            f.write(CONFIG.format(tmp=directory, repo=directory + "/repo", kind=kind, path=path))
        subprocess.run([BIN + "/keepd", "key", "generate", directory + "/key"], check=True, stdout=subprocess.DEVNULL)
        self.start()

    def start(self):
        """Starts it; returns the seconds until it said READY."""
        name = self.dir + "/notify"
        if os.path.exists(name):
            os.unlink(name)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(name)
            notify.settimeout(60)
            with open(self.dir + "/log", "ab") as log:
                t = time.perf_counter()
                self.process = subprocess.Popen([BIN + "/keepd", "--config", self.dir + "/keepd.toml"], stdin=subprocess.DEVNULL, stdout=log,
                                                stderr=log, env=dict(os.environ, NOTIFY_SOCKET=name))
                while b"READY=1" not in notify.recv(4096):
                    pass
                return time.perf_counter() - t

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def ctl(self, *args, **kwargs):
        return subprocess.run([BIN + "/keepctl", "--socket", self.dir + "/socket", "--no-progress", *args], check=True, capture_output=True, text=True,
                              **kwargs).stdout

    def timed(self, *args):
        t = time.perf_counter()
        self.ctl(*args)
        return time.perf_counter() - t

    def repository(self):
        return sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(self.dir + "/repo") for f in files)


# ---------------------------------------------------------------- the writer of a live database

def write_without_pause(path, synchronous, stop, pipe):
    db = sqlite3.connect(path, isolation_level=None, timeout=30)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = " + synchronous)
    db.execute("CREATE TABLE IF NOT EXISTS live(id INTEGER PRIMARY KEY, at REAL, text TEXT)")
    seen = []
    while not stop.is_set():
        t = time.perf_counter()
        db.execute("INSERT INTO live(at, text) VALUES (?, ?)", (t, "x" * 100))
        seen.append((t, time.perf_counter() - t))
    pipe.send(seen)
    pipe.close()


def count(stop):
    n = 0
    while not stop.is_set():
        n += 1


def writer(work):
    source = database(work, 1.0)
    path = work + "/live/app.db"
    print("\n**A writer without pause on the live database of w1**\n")
    print("| synchronous | | transactions a second | p50 ms | p99 ms | p99.9 ms | longest ms | at s |\n|---|---|---|---|---|---|---|---|")
    for synchronous in ("FULL", "NORMAL"):
        shutil.rmtree(work + "/live", ignore_errors=True)
        os.makedirs(work + "/live")
        shutil.copy(source, path)
        keepd = Keepd(work + "/behaviour", "sqlite", path)
        stop, (mine, theirs) = multiprocessing.Event(), multiprocessing.Pipe(False)
        process = multiprocessing.Process(target=write_without_pause, args=(path, synchronous, stop, theirs))
        try:
            subprocess.run(["sync"])
            process.start()
            time.sleep(6)
            begin = time.perf_counter()
            keepd.ctl("-q", "backup", "bench")
            end = time.perf_counter()
            time.sleep(3)
            held = time.perf_counter()
            reader = sqlite3.connect(path, isolation_level=None)
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM sqlite_schema").fetchall()
            time.sleep(end - begin)
            reader.execute("ROLLBACK")
            reader.close()
            time.sleep(3)
            busy = time.perf_counter()
            counting = multiprocessing.Event()
            others = [multiprocessing.Process(target=count, args=(counting,)) for _ in range(4)]
            for other in others:
                other.start()
            time.sleep(end - begin)
            counting.set()
            for other in others:
                other.join()
            stop.set()
            seen = mine.recv()
            process.join()
        finally:
            keepd.stop()
        spans = (("alone", (begin - 5, begin)), ("during a capture of %.1f s" % (end - begin), (begin, end)),
                 ("without keepd: a reader's transaction as long, and a second more", (held, held + end - begin + 1)),
                 ("without keepd: beside four processes that count", (busy, busy + end - begin)))
        for name, span in spans:
            v = sorted(d * 1e3 for t, d in seen if span[0] <= t < span[1])
            longest = max((x for x in seen if span[0] <= x[0] < span[1]), key=lambda x: x[1])[0] - span[0]
            at = lambda q: v[min(len(v) - 1, int(len(v) * q))]
            print("| %s | %s | %.0f | %.3f | %.3f | %.3f | %.1f | %.2f |"
                  % (synchronous, name, len(v) / (span[1] - span[0]), at(.5), at(.99), at(.999), v[-1], longest))
    shutil.rmtree(work + "/live")


# ---------------------------------------------------------------- many increments

def database(work, scale):
    """The database of w1 at a scale, made once."""
    root = work + "/data/w1" if scale == 1.0 else "%s/data/w1-%g" % (work, scale)
    if not os.path.exists(root + "/spec.json"):
        W.gen("w1", root, scale)
    W.revert(root)
    return root + "/src/app.db"


def take_back(path, rows):
    """Deletes the rows that the mutation inserted."""
    db = sqlite3.connect(path, isolation_level=None)
    for table, last in rows.items():
        db.execute("DELETE FROM %s WHERE id > ?" % table, (last,))
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def increments(work):
    increments_of(work, grows=True)
    increments_of(work, grows=False)


def increments_of(work, grows, rounds=100, scale=.1):
    path = database(work, scale)
    root = os.path.dirname(os.path.dirname(path))
    keepd = Keepd(work + "/behaviour", "sqlite", path)
    pages, first, times, page_bytes = set(), None, [], 0

    def look():
        nonlocal page_bytes
        with open(path, "rb") as f:
            while True:
                page = f.read(4096)
                if not page:
                    return
                h = hashlib.blake2b(page, digest_size=16).digest()
                if h not in pages:
                    pages.add(h)
                    page_bytes += len(page)

    def restore(name):
        v = []
        for _ in range(3):
            shutil.rmtree(work + "/behaviour/out", ignore_errors=True)
            v.append(keepd.timed("-q", "restore", name, "--to", work + "/behaviour/out"))
        with open(path, "rb") as a, open(work + "/behaviour/out/data/app.db", "rb") as b:
            same = hashlib.file_digest(a, "sha256").digest() == hashlib.file_digest(b, "sha256").digest() if name == "latest" else None
        return statistics.median(v), same

    try:
        db = sqlite3.connect(path)
        rows = {table: db.execute("SELECT max(id) FROM " + table).fetchone()[0] for table in W.W1_ROWS}
        db.close()
        keepd.ctl("-q", "backup", "bench")
        look()
        whole, whole_pages = keepd.repository(), page_bytes
        first = keepd.ctl("list").split("\n")[1].split()[0]
        first_s, _ = restore("latest")
        first_size = os.path.getsize(path)
        for n in range(1, rounds + 1):
            W.mutate(root, n)
            if not grows:
                take_back(path, rows)
            times.append(keepd.timed("-q", "backup", "bench"))
            look()
        last_s, same = restore("latest")
        again_s, _ = restore(first)
        per_byte = (last_s / os.path.getsize(path)) / (first_s / first_size)
        expected = whole * page_bytes / whole_pages
        kind = "" if grows else ", what was inserted deleted again in each"
        print("\n**%d increments of w1 at scale %g%s** (%.0f MB, %.0f MB at the end)\n" % (rounds, scale, kind, first_size / 1e6, os.path.getsize(path) / 1e6))
        print("| | |\n|---|---|")
        print("| restore of the first backup, before and after the increments, s | %.2f, %.2f |" % (first_s, again_s))
        print("| restore of the last one, s (equal to the database: %s) | %.2f |" % (same, last_s))
        print("| last / first, and for each byte | %.2f, %.2f |" % (last_s / first_s, per_byte))
        print("| an increment's run: first, median, longest, s | %.2f, %.2f, %.2f |" % (times[0], statistics.median(times), max(times)))
        print("| distinct pages of all states, MB | %.0f |" % (page_bytes / 1e6))
        print("| repository, MB | %.0f |" % (keepd.repository() / 1e6))
        print("| repository / distinct pages compressed as the first backup's were | %.2f |" % (keepd.repository() / expected))
        print("| repository / distinct pages as they are | %.2f |" % (keepd.repository() / page_bytes))
    finally:
        keepd.stop()
        W.revert(root)


# ---------------------------------------------------------------- many backups, idle

def wakeups(pid):
    """Voluntary switches by thread: threads of the last run that end meanwhile must not count."""
    seen = {}
    for task in os.listdir("/proc/%d/task" % pid):
        with open("/proc/%d/task/%s/status" % (pid, task)) as f:
            seen[task] = sum(int(x.split()[1]) for x in f if x.startswith("voluntary_ctxt"))
    return seen


def resident(pid):
    with open("/proc/%d/status" % pid) as f:
        return next(int(x.split()[1]) * 1024 for x in f if x.startswith("VmRSS:"))


def history(work):
    tree = work + "/behaviour-tree"
    shutil.rmtree(tree, ignore_errors=True)
    for d in range(20):
        os.makedirs("%s/%02d" % (tree, d))
        for f in range(50):
            with open("%s/%02d/%02d" % (tree, d, f), "w") as out:
                out.write("%d %d\n" % (d, f) * 100)
    keepd = Keepd(work + "/behaviour", "files", tree)
    try:
        print("\n**An unchanged run against the number of older backups** (1,000 files)\n\n| older backups | s, median of 9 |\n|---|---|")
        done = 0
        for older in (1, 100, 1000):
            while done < older:
                with open(tree + "/00/00", "w") as out:
                    out.write("changed %d\n" % done)
                keepd.ctl("-q", "backup", "bench")
                done += 1
            v = [keepd.timed("-q", "backup", "bench") for _ in range(9)]
            done += 9
            print("| %d | %.3f |" % (older, statistics.median(v)))
        keepd.stop()
        starts = []
        for _ in range(5):
            starts.append(keepd.start())
            if len(starts) < 5:
                keepd.stop()
        status = [keepd.timed("status") for _ in range(9)]
        time.sleep(15)
        before, t = wakeups(keepd.process.pid), time.time()
        time.sleep(60)
        woken = sum(n - before.get(task, 0) for task, n in wakeups(keepd.process.pid).items()) / (time.time() - t)
        print("\n**With %d backups known**\n\n| | |\n|---|---|" % done)
        print("| start to READY, ms (median of 5) | %.0f |" % (statistics.median(starts) * 1e3))
        print("| `keepctl status`, ms (median of 9) | %.0f |" % (statistics.median(status) * 1e3))
        print("| resident memory of the idle daemon, MiB | %.1f |" % (resident(keepd.process.pid) / (1 << 20)))
        print("| wakeups a second of the idle daemon | %.2f |" % woken)
    finally:
        keepd.stop()
        shutil.rmtree(tree)


# ---------------------------------------------------------------- cost against size

def scale(work, scales):
    print("\n**Cost against size** (median of 3)\n\n| | scale | MB | first s | restore s | first, s for each GB | restore, s for each GB |\n|---|---|---|---|---|---|---|")
    for wl in ("w1", "w2"):
        for factor in scales:
            root = "%s/data/%s" % (work, wl) if factor == 1.0 else "%s/data/%s-%g" % (work, wl, factor)
            if not os.path.exists(root + "/spec.json"):
                W.gen(wl, root, factor)
            W.revert(root)
            src = root + "/src"
            size = W.stats(root)["bytes"] if wl == "w2" else os.path.getsize(src + "/app.db")
            first, back = [], []
            for n in range(3):
                subprocess.run("find '%s' -type f -print0 | xargs -0 cat > /dev/null; sync" % src, shell=True)
                keepd = Keepd(work + "/behaviour", *(("sqlite", src + "/app.db") if wl == "w1" else ("files", src)))
                try:
                    first.append(keepd.timed("-q", "backup", "bench"))
                    back.append(keepd.timed("-q", "restore", "latest", "--to", "%s/behaviour/out" % work))
                finally:
                    keepd.stop()
            a, b = statistics.median(first), statistics.median(back)
            print("| %s | %g | %.0f | %.2f | %.2f | %.2f | %.2f |" % (wl, factor, size / 1e6, a, b, a / size * 1e9, b / size * 1e9), flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--work", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), ".work"))
    ap.add_argument("--only", default="writer,increments,history,scale")
    ap.add_argument("--scales", default="0.25,1,4")
    a = ap.parse_args()
    work = os.path.abspath(a.work)
    os.makedirs(work + "/data", exist_ok=True)
    for name in a.only.split(","):
        if name == "scale":
            scale(work, [float(x) for x in a.scales.split(",")])
        else:
            {"writer": writer, "increments": increments, "history": history}[name](work)
        sys.stdout.flush()
    shutil.rmtree(work + "/behaviour", ignore_errors=True)


if __name__ == "__main__":
    main()
