#!/usr/bin/env python3
"""PostgreSQL through keepd and through its peers, in one run. See databases.sh."""
import json
import os
import pathlib
import pwd
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = HERE / ".work" / "databases"
PEERS = HERE / ".peers" / "bin"
ROUNDS, SCALE = int(sys.argv[1]), float(sys.argv[2])
PASSWORD = "benchmark"


def tools_of_postgres():
    found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    return found[-1].parent


BIN = tools_of_postgres()


def run(command, **kwargs):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    if done.returncode:
        sys.exit(f"{command}: {done.stdout.decode(errors='replace')[-2000:]}")
    return done.stdout.decode(errors="replace")


class Server:
    def __init__(self):
        self.dir = WORK / "server"
        self.data = self.dir / "data"
        user = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
        self.as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        if not self.data.exists():
            self.dir.mkdir(parents=True)
            (self.dir / "password").write_text(PASSWORD + "\n")
            for path in [self.dir, self.dir / "password"]:
                if user:
                    os.chown(path, user.pw_uid, user.pw_gid)
            for parent in [self.dir, *self.dir.parents]:
                if not parent.stat().st_mode & 0o001:
                    sys.exit(f"{parent} cannot be entered by the server's user")
            run([BIN / "initdb", "-U", "postgres", "-A", "scram-sha-256", "--no-sync", "--pwfile", self.dir / "password", "-D", self.data], **self.as_user)
            os.chmod(self.dir / "password", 0o600)
            if user:
                os.chown(self.dir / "password", 0, 0)
        self.log = open(self.dir.parent / "server.log", "ab")
        # Memory as on a small machine; no autovacuum, so that all rounds find the same pages.
        options = ["-p", str(self.port), "-k", str(self.data), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "shared_buffers=256MB"]
        options += ["-c", "autovacuum=off", "-c", "max_wal_size=8GB"]
        self.process = subprocess.Popen([BIN / "postgres", "-D", self.data, *options], stdout=self.log, stderr=self.log, **self.as_user)
        self.env = dict(os.environ, PGPASSWORD=PASSWORD, PGHOST="127.0.0.1", PGPORT=str(self.port), PGUSER="postgres")
        for _ in range(600):
            if subprocess.run([BIN / "psql", "-c", "select 1", "postgres"], env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
                return
            time.sleep(0.1)
        sys.exit("the server does not answer")

    def sql(self, sql, database="postgres"):
        return run([BIN / "psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql], env=self.env)

    def stop(self):
        self.process.send_signal(2)
        self.process.wait()


WORDS = "red green blue small large old new cheap dear round flat soft hard warm cold quick slow bright dark plain".split()


def generate(server):
    """Customers, orders, events, documents: about 1 GiB of dump at scale 1, compressible about three times."""
    words = ", ".join(f"'{w}{s}'" for w in WORDS for s in ["", "er", "ish", "ness", "ly", "est"])
    text = lambda n: " || ' ' || ".join(f"w.a[1 + (hashint8extended(n, {i + 7}) & 127) % 120]" for i in range(n))
    n = lambda count: int(count * SCALE)
    sqls = [
        "select setseed(0.5)",
        f"create table customer as select n as id, 'customer ' || n as name, 'c' || n || '@example.org' as mail, date '2020-01-01' + (n % 1500)::int as since from generate_series(1, {n(300000)}) n",
        f"create table orders as select n as id, 1 + (hashint8extended(n, 1) & 2147483647) % {n(300000)} as customer, ((hashint8extended(n, 2) & 2147483647) % 100000) / 100.0 as amount, timestamp '2024-01-01' + n * interval '17 s' as placed, (array['open','paid','sent','done'])[1 + (hashint8extended(n, 3) & 3)] as state, {text(6)} as remark from generate_series(1::bigint, {n(2500000)}) n, (select array[{words}] as a) w",
        f"create table event as select n as id, (hashint8extended(n, 4) & 2147483647) % {n(2500000)} as orders, timestamp '2024-01-01' + n * interval '5 s' as at, {text(8)} as what, md5(n::text) as token from generate_series(1::bigint, {n(4000000)}) n, (select array[{words}] as a) w",
        f"create table document as select n as id, {text(90)} as body from generate_series(1::bigint, {n(280000)}) n, (select array[{words}] as a) w",
    ]
    server.sql("drop database if exists base")
    server.sql("create database base")
    for sql in sqls:
        server.sql(sql, "base")
    for table in ["customer", "orders", "event", "document"]:
        server.sql(f"alter table {table} add primary key (id)", "base")
    server.sql("vacuum analyze", "base")


def change(server, round_number):
    """One row of a hundred, by chance: most are updated, some deleted, some new."""
    for table, column, value in [
        ("orders", "state", "'changed'"),
        ("event", "what", "'changed ' || what"),
        ("document", "body", "'changed ' || body"),
        ("customer", "mail", "'new-' || mail"),
    ]:
        pick = f"(hashint8extended(id::bigint, {100 + round_number}) & 2147483647) % 1000"
        server.sql(f"update {table} set {column} = {value} where {pick} < 8; delete from {table} where {pick} = 8", "shop")
    server.sql("insert into event select id + 100000000, orders, at, what || ' again', token from event where (hashint8extended(id, 77) & 2147483647) % 1000 = 1", "shop")


class Watch:
    """Peak memory of processes with these names and CPU of all children."""

    def __init__(self, pids=()):
        self.peak, self.stop_now, self.pids = 0, False, list(pids)
        self.thread = threading.Thread(target=self.work)

    def work(self):
        while not self.stop_now:
            total = 0
            for pid in tree(os.getpid()) | set().union(*[tree(p) for p in self.pids], set()):
                try:
                    name = pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
                    if name in ("postgres", "python3", "psql"):
                        continue
                    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                        if line.startswith("Pss:"):
                            total += int(line.split()[1])
                except OSError:
                    pass
            self.peak = max(self.peak, total)
            time.sleep(0.05)

    def __enter__(self):
        self.since = time.monotonic()
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.seconds = time.monotonic() - self.since
        self.stop_now = True
        self.thread.join()


def tree(pid):
    found = {pid}
    children = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
            except OSError:
                pass
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found.add(child)
            todo.append(child)
    return found


def size(path):
    return sum(f.lstat().st_size for f in pathlib.Path(path).rglob("*") if f.is_file())


DUMP = [str(BIN / "pg_dump"), "-Fc", "-Z0", "-w", "shop"]


def shell(line, env):
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{line}: {done.stdout.decode(errors='replace')[-2000:]}")
    return done.stdout.decode(errors="replace")


class Alone:
    """The dump compressed with zstd -3 into a file: what `pg_dump -Fc -Z zstd` does from PostgreSQL 16 on, which is taken where it is there."""

    name = "pg_dump, zstd"

    def __init__(self, server, home):
        self.server, self.home, self.count = server, home, 0
        home.mkdir(parents=True)
        version = int(run([BIN / "pg_dump", "--version"]).split()[2].split(".")[0])
        self.own = version >= 16

    def backup(self):
        self.count += 1
        out = self.home / f"{self.count}.dump"
        if self.own:
            shell(f"{BIN}/pg_dump -Fc -Z zstd -w shop >{out}", self.server.env)
        else:
            shell(f"{' '.join(DUMP)} | zstd -q -3 -o {out}", self.server.env)

    def restore(self):
        source = f"cat {self.home}/{self.count}.dump" if self.own else f"zstd -q -dc {self.home}/{self.count}.dump"
        shell(f"{source} | {BIN}/pg_restore --exit-on-error -w -d back", self.server.env)

    def pids(self):
        return []

    def close(self):
        pass


class Restic(Alone):
    name = "restic"

    def __init__(self, server, home):
        super().__init__(server, home)
        self.env = dict(server.env, RESTIC_PASSWORD="x", RESTIC_REPOSITORY=str(home / "repo"), RESTIC_CACHE_DIR=str(home / "cache"))
        self.program = PEERS / "restic"
        run([self.program, "init"], env=self.env)

    def backup(self):
        shell(f"{' '.join(DUMP)} | {self.program} backup -q --stdin --stdin-filename shop.dump", self.env)

    def restore(self):
        shell(f"{self.program} dump -q latest shop.dump | {BIN}/pg_restore --exit-on-error -w -d back", self.env)


class Borg(Alone):
    name = "borg"

    def __init__(self, server, home):
        super().__init__(server, home)
        self.env = dict(server.env, BORG_PASSPHRASE="x", BORG_REPO=str(home / "repo"), BORG_BASE_DIR=str(home))
        self.program = PEERS / "borg"
        run([self.program, "init", "-e", "repokey"], env=self.env)

    def backup(self):
        self.count += 1
        shell(f"{' '.join(DUMP)} | {self.program} create -C lz4 ::{self.count} -", self.env)

    def restore(self):
        shell(f"{self.program} extract --stdout ::{self.count} | {BIN}/pg_restore --exit-on-error -w -d back", self.env)


class Keepd(Alone):
    name = "keepd"

    def __init__(self, server, home):
        super().__init__(server, home)
        self.ctl = ROOT / "target/release/keepctl"
        daemon = ROOT / "target/release/keepd"
        run([daemon, "key", "generate", home / "main.key"])
        (home / "password").write_text(PASSWORD + "\n")
        (home / "keepd.toml").write_text(
            f'''[daemon]
state_dir = "{home}/state"
socket = "{home}/sock"
[encryption.main]
key_file = "main.key"
[destination.local]
service = "fs"
root = "{home}/repo"
encryption = "main"
[job.shop]
destinations = ["local"]
[[job.shop.source]]
name = "db"
postgres = {{ dbname = "shop", host = "127.0.0.1", port = {server.port}, user = "postgres", password = {{ file = "{home}/password" }}, bin_dir = "{BIN}", globals = false }}
'''
        )
        self.log = open(home / "log", "ab")
        self.process = subprocess.Popen([daemon, "--config", home / "keepd.toml"], stdout=self.log, stderr=self.log)
        for _ in range(200):
            if subprocess.run([self.ctl, "--socket", home / "sock", "status"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
                return
            time.sleep(0.05)
        sys.exit("keepd does not answer")

    def call(self, *words):
        return run([self.ctl, "--socket", self.home / "sock", "--no-progress", *words])

    def backup(self):
        self.call("backup", "shop")

    def restore(self):
        self.call("restore", "latest", "--job", "shop", "--to-database", "back", "--replace", "--yes")

    def close(self):
        self.process.terminate()
        self.process.wait()


def cpu():
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime


def measured(tool, step, work, table):
    os.sync()
    before = size(tool.home)
    with Watch() as watch:
        work()
    row = {"seconds": watch.seconds, "MiB": watch.peak / 1024, "added": size(tool.home) - before}
    table.setdefault(tool.name, {}).setdefault(step, []).append(row)
    print(f"{tool.name:14} {step:9} {row['seconds']:6.2f} s {row['MiB']:6.0f} MiB {row['added'] / 1e6:8.1f} MB", flush=True)


def main():
    WORK.mkdir(parents=True, exist_ok=True)
    server = Server()
    table = {}
    try:
        have = server.sql("select 1 from pg_database where datname = 'base'").strip() and (WORK / "scale").exists() and (WORK / "scale").read_text() == str(SCALE)
        if not have:
            generate(server)
            (WORK / "scale").write_text(str(SCALE))
        for n in range(ROUNDS):
            kinds = [Keepd, Alone, Restic, Borg]
            random.Random(n).shuffle(kinds)
            server.sql("drop database if exists shop")
            server.sql("create database shop template base")
            tools = []
            for kind in kinds:
                home = WORK / f"tool-{kind.name.split(',')[0]}"
                shutil.rmtree(home, ignore_errors=True)
                tools.append(kind(server, home))
            shell(f"{' '.join(DUMP)} | wc -c", server.env)  # warm
            for step in ["first", "unchanged", "changed"]:
                if step == "changed":
                    change(server, n)
                for tool in tools:
                    measured(tool, step, tool.backup, table)
            for tool in tools:
                for name in server.sql("select datname from pg_database where datname like 'back%'").split():
                    server.sql(f'drop database "{name}"')
                if tool.name != "keepd":
                    server.sql("create database back template template0")
                measured(tool, "restore", tool.restore, table)
                counts = [server.sql("select count(*) from event", d).strip() for d in ["shop", "back"]]
                assert counts[0] == counts[1], counts
            for tool in tools:
                tool.close()
    finally:
        server.stop()
    median = lambda rows, key: statistics.median(r[key] for r in rows)
    print("\n| | first s | unchanged s | changed s | restore s | peak MiB | first MB | unchanged MB | changed MB |\n|---|---|---|---|---|---|---|---|---|")
    for name, steps in table.items():
        times = [f"{median(steps[s], 'seconds'):.2f}" for s in ["first", "unchanged", "changed", "restore"]]
        peak = max(median(steps[s], "MiB") for s in steps)
        bytes_ = [f"{median(steps[s], 'added') / 1e6:.1f}" for s in ["first", "unchanged", "changed"]]
        print(f"| {name} | {' | '.join(times)} | {peak:.0f} | {' | '.join(bytes_)} |")
    (WORK / "results.json").write_text(json.dumps(table, indent=1))


main()
