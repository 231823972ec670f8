"""Cuts the power of a machine on which keepd backs up, restores in place, deletes, prunes and edits jobs, at moments drawn by chance, and looks what is there afterwards.

usage: power.py WORK_DIR KERNEL        WORK_DIR holds disk.img, with keepd installed and power/agent.sh started at boot
KEEPD_TEST_SEED (1 by default, drawn and printed with KEEPD_TEST_LONG=1), KEEPD_TEST_CUTS (5, or 2 where it has to do without KVM; 50 with KEEPD_TEST_LONG=1),
KEEPD_TEST_TRACE (each command with how long it took). Exit code 125: no machine can be run here.

All that keepctl told stands in this process, outside of the machine. After each cut the machine is started and nothing is done by hand; `Shop.settled` is what must hold.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from machine import Failed, Machine, PowerCut, accelerators

KEEP_LAST = 6
# What the tree of a job's files comes down to.
TREE = "find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1"

CONFIGURATION = f"""
[encryption.main]
key_file = "/etc/keepd/keys/main.key"

[destination.local]
service = "fs"
root = "/var/backups/keepd"
encryption = "main"
prune_grace = "0s"

[destination.mirror]
service = "fs"
root = "/var/backups/mirror"
encryption = "main"
prune_grace = "0s"

[job.shop]
destinations = ["local", "mirror"]
retention = {{ keep_last = {KEEP_LAST} }}

[[job.shop.source]]
name = "files"
files = "/srv/shop/files"

[[job.shop.source]]
name = "db"
sqlite = "/srv/shop/shop.db"

[job.place]
destinations = ["local"]
services = ["place.service"]

[[job.place.source]]
name = "files"
files = "/srv/place/files"

[[job.place.source]]
name = "db"
sqlite = "/srv/place/place.db"
"""

PREPARE = r"""
set -eu
echo 'u shop - - /srv' | systemd-sysusers -
install -d -o shop -g shop -m 0700 /srv/shop /srv/shop/files /srv/place /srv/place/files
for job in shop place; do
    setpriv --reuid shop --regid shop --clear-groups sqlite3 /srv/$job/$job.db 'pragma journal_mode = wal; create table pairs (n integer, half text, filler blob); create index by_n on pairs (n);
        create table generation (n integer); insert into generation values (0)' >/dev/null
    cat >/etc/systemd/system/$job.service <<UNIT
[Service]
User=shop
ExecStart=/bin/bash /keepd-test/application.sh /srv/$job/$job.db
[Install]
WantedBy=multi-user.target
UNIT
done
mkdir -p /etc/systemd/system/keepd.service.d
sed 's|/var/lib/shop|/srv/place|' /usr/local/share/doc/keepd/keepd-in-place.conf >/etc/systemd/system/keepd.service.d/in-place.conf
keepd key generate /etc/keepd/keys/main.key
keepd --check
systemctl daemon-reload
systemctl enable -q --now shop place keepd.socket keepd.service
keepctl status
sync
"""


# Nothing is done by hand: what is not settled after a minute never will be.
COME_BACK = r"""
wrong() { echo "$*"; systemctl status keepd --no-pager; ls -RA /var/lib/keepd/in-place /var/lib/keepd/quiesced; journalctl -b -u keepd --no-pager -o short-monotonic | tail -60; exit 1; }
for n in $(seq 600); do systemctl -q is-active keepd.service && break; sleep 0.1; done
systemctl -q is-active keepd.service || wrong "keepd does not run"
[ "$(systemctl show -P NRestarts keepd)" = 0 ] || wrong "keepd was started more than once"
begun() { ls -A /var/lib/keepd/in-place /var/lib/keepd/quiesced /var/lib/keepd/drills 2>/dev/null | grep -v '^/\|^$'; }
for n in $(seq 600); do begun >/dev/null || break; sleep 0.1; done
begun && wrong "what was begun is not settled"
find /srv /etc/keepd -name '.keepd*' | grep . && wrong "things lie about"
for n in $(seq 100); do systemctl -q is-active shop place && break; sleep 0.1; done
systemctl is-active shop place || wrong "an application does not run"
systemctl --failed --plain --no-legend | grep . && wrong "a unit failed"
exit 0
"""


class Shop:
    """What the outside knows of the machine: what keepctl said, and what was asked of it when the power went."""

    def __init__(self, machine: Machine, rng: random.Random) -> None:
        self.machine, self.rng = machine, rng
        self.backups: dict[str, dict] = {}  # told good: job, what its files come down to, generation; in the order they were made
        self.going: set[str] = set()  # deletions that were asked for
        self.jobs: dict[str, bool] = {}  # told: is there, or was removed
        self.edited: str | None = None
        self.generation = 0
        self.keys = 0
        self.place: set[int] | None = None  # generations of which /srv/place may be; None: it was being changed by the application
        self.proven: set[str] = set()
        # The first of these comes first after each cut, however few there are.
        self.first = [lambda: self.in_place(change=False), self.rotate, self.back_up]
        self.counts = {"backups told good": 0, "restored byte for byte": 0, "restores in place": 0, "cut in one": 0}

    # ---- what is done until the power goes --------------------------------------------------------------------------------

    def work(self) -> None:
        """One thing after the other."""
        if self.first:
            self.first.pop(0)()
        while True:
            deed = self.rng.choices([self.back_up, self.back_up_place, self.in_place, self.delete, self.prune, self.edit, self.rotate], [5, 2, 4, 2, 2, 2, 2])[0]
            deed()

    def back_up(self) -> None:
        names = [self.rng.randrange(30) for _ in range(5)]
        self.machine.must(f"cd /srv/shop/files && for n in {' '.join(map(str, names))}; do head -c $((n * 1000 + 500)) /dev/urandom >$n; done; rm -f $((RANDOM % 30)); chown shop:shop *")
        self._backup("shop")

    def back_up_place(self) -> None:
        self.change_place()
        self._backup("place")

    def change_place(self) -> None:
        """/srv/place becomes another generation, database and files, and is on the disk."""
        self.place = None
        self.generation += 1
        g = self.generation
        self.machine.must(
            f"cd /srv/place/files && sqlite3 -cmd '.timeout 20000' ../place.db 'update generation set n = {g}' && for n in $(seq 12); do (echo {g}; head -c $((n * 2000)) /dev/urandom) >$n.new; mv $n.new $n; done && "
            f"rm -f g*.txt && echo {g} >g{g}.txt && chown -R shop:shop . && sync"
        )
        self.place = {g}

    def _backup(self, job: str) -> None:
        tree, _, told = self.machine.must(f"cd /srv/{job}/files && {TREE} && exec keepctl --json backup {job}").partition("\n")
        run = json.loads(told)
        if run["state"] != "good":
            raise Failed(f"a backup is {run['state']}: {run}")
        self.backups[run["backup"]] = {"job": job, "files": tree, "generation": self.generation if job == "place" else None}
        self.counts["backups told good"] += 1

    def in_place(self, change: bool = True) -> None:
        there = [(id, b) for id, b in self.backups.items() if b["job"] == "place" and id not in self.going]
        if not there:
            return self.back_up_place()
        if change and (self.place is None or len(self.place) > 1 or self.rng.random() < 0.3):
            self.change_place()
        id, backup = self.rng.choice(there)
        self.place = {*(self.place or ()), backup["generation"]}
        self.machine.must(f"keepctl --no-progress restore {id} --in-place --yes {'--no-safety-backup' if self.rng.random() < 0.5 else ''}")
        self.place = {backup["generation"]}
        self.counts["restores in place"] += 1

    def delete(self) -> None:
        there = [id for id, b in self.backups.items() if id not in self.going]
        if len(there) > 4:
            id = self.rng.choice(there[:-3])
            self.going.add(id)
            self.machine.must(f"keepctl --no-progress delete {id} --yes")

    def prune(self) -> None:
        self.machine.must(f"keepctl --no-progress prune {self.rng.choice(['local', 'mirror'])}")

    def edit(self) -> None:
        name = f"job{self.rng.randrange(4)}"
        self.edited = name
        if self.jobs.get(name):
            self.machine.must(f"keepctl job remove {name} --keep-backups --yes")
            self.jobs[name] = False
        else:
            self.machine.must(f"keepctl job add {name} --files /srv/shop/files --destination local --yes")
            self.jobs[name] = True
        self.edited = None

    def rotate(self) -> None:
        """Another key: cut in the middle both have to open what they should."""
        self.keys += 1
        key = f"/etc/keepd/keys/main{self.keys}.key"
        self.machine.must(f"keepd key generate {key} && keepctl key rotate main --to {key}")

    # ---- what must hold after it has come back --------------------------------------------------------------------------------

    def settled(self) -> None:
        m = self.machine
        m.must(COME_BACK)
        if self.place is not None:
            self._place_is_whole()
        there = {b["id"]: b for b in json.loads(m.must("keepctl --json list"))}
        self._nothing_lost(there)
        self._jobs_as_told({job["name"] for job in json.loads(m.must("keepctl --json job list"))})
        for destination in ("local", "mirror"):
            m.must(f"keepctl --no-progress check {destination} --read-data")
        m.must("keepctl audit verify")
        running = [r["id"] for r in json.loads(m.must("keepctl --json run list -n 12")) if r["state"] in ("running", "queued") and r["kind"] == "backup"]
        if running:
            raise Failed(f"runs of before are still shown as running: {running}")
        for id in [id for id in self.backups if id in there and id not in self.proven]:
            self._same_bytes(id)
        self.back_up()
        if errors := m.must("dmesg | grep -E 'EXT4-fs (error|warning)|I/O error' || true"):
            raise Failed(f"the file system is damaged, which is not keepd's doing: {errors}")

    def _jobs_as_told(self, there: set[str]) -> None:
        for name, told in self.jobs.items():
            if name != self.edited and told != (name in there):
                raise Failed(f"the job {name} was told to be {'there' if told else 'removed'}, and is not")
        if self.edited:
            self.jobs[self.edited] = self.edited in there
            self.edited = None

    def _nothing_lost(self, there: dict) -> None:
        newest = [id for id, b in self.backups.items() if b["job"] == "shop"][-(KEEP_LAST - 2) :]
        for id, backup in list(self.backups.items()):
            if id in there:
                continue
            # Retention counts backups that were committed but not told, too.
            if id in self.going or (backup["job"] == "shop" and id not in newest):
                del self.backups[id]
            else:
                raise Failed(f"the backup {id} of {backup['job']} was told good and is not there")
        self.going &= there.keys()

    def _place_is_whole(self) -> None:
        assert self.place is not None
        said = self.machine.must(
            "cd /srv/place/files && for n in $(seq 12); do head -1 $n; done | sort -u; ls g*.txt; sqlite3 -cmd '.timeout 20000' ../place.db 'select n from generation; pragma integrity_check; "
            "select case when count(*) % 2 = 0 then 0 else -1 end from pairs'; find /srv/place ! -user shop"
        ).split()
        g = said[0]
        if said != [g, f"g{g}.txt", g, "ok", "0"] or int(g) not in self.place:
            raise Failed(f"/srv/place is neither what it was nor what was to be restored, of {sorted(self.place)}: {said}")
        if len(self.place) > 1:
            self.counts["cut in one"] += 1
        self.place = {int(g)}

    def _same_bytes(self, id: str) -> None:
        backup = self.backups[id]
        said = self.machine.must(
            f"rm -rf /root/back && keepctl -q --no-progress restore {id} --to /root/back && cd /root/back/files && {TREE} && cd ../db && sqlite3 $(find . -type f) "
            '"pragma integrity_check; select n from generation; '
            'select count(*) % 2 = 0 and count(*) = 2 * (coalesce(max(n), 0) - coalesce(min(n), 0) + (count(*) > 0)) from pairs"'
        ).split()
        if said != [backup["files"], "ok", str(backup["generation"] or 0), "1"]:
            raise Failed(f"the backup {id} came back as {said}, not as {backup}")
        self.proven.add(id)
        self.counts["restored byte for byte"] += 1


def first_start(work: Path, kernel: str) -> tuple[Machine, str]:
    """A machine that has started, in the fastest way that works here."""
    machine = None
    for name, arguments in accelerators():
        if machine is None:
            machine = Machine(work, arguments, kernel)
        machine.accelerator = arguments
        machine.cut_at = None
        try:
            machine.start(patience=20 if name == "KVM" else 240)
            return machine, name
        except Failed as why:
            print(f"      not with {name}: {str(why).strip().splitlines()[0][:200]}", flush=True)
            machine.cut_power("kept", random.Random(0))
    sys.exit(125)


def main() -> None:
    work, kernel = Path(sys.argv[1]), sys.argv[2]
    is_long = os.environ.get("KEEPD_TEST_LONG") == "1"
    seed = int(os.environ.get("KEEPD_TEST_SEED") or (random.SystemRandom().randrange(1 << 32) if is_long else 1))
    rng = random.Random(seed)
    began = time.monotonic()
    # Whoever is ended ends the machine, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    machine, way = first_start(work, kernel)
    boot = time.monotonic() - began
    short = 5 if way == "KVM" else 2
    cuts = int(os.environ.get("KEEPD_TEST_CUTS") or (50 if is_long else short))
    print(f"ok    a machine in {way}, up in {boot:.0f} s; KEEPD_TEST_SEED={seed}", flush=True)
    shop = Shop(machine, rng)
    done, losses, tally = 0, 0, Counter()
    try:
        machine.must(f"cat >/etc/keepd/keepd.toml <<'TOML'\n{CONFIGURATION}\nTOML\n")
        machine.must(PREPARE, 240)
        took = time.monotonic()
        shop.back_up()
        shop.back_up_place()
        # As long as these took: a machine without KVM is slow.
        reach = time.monotonic() - took
        # So that a restore in place has something to change, whatever backup it takes.
        shop.change_place()
        while done < cuts:
            began_at = time.monotonic()
            # The deeds that are to be met in any case are shorter than two backups.
            machine.cut_at = began_at + rng.uniform(0, reach * 0.3 if shop.first else reach)
            told = lose_power(machine, shop.work, rng, tally)
            done += 1
            # One in four comes a second time, while the machine is still coming back.
            if done < cuts and rng.random() < 0.25:
                machine.cut_at = time.monotonic() + rng.uniform(0.6 * boot, 1.2 * boot + 2)
                told += "; again while coming back: " + lose_power(machine, lambda: (machine.start(), machine.run("sleep 600", 700)), rng, tally)
                done += 1
            machine.start()
            shop.settled()
            print(f"ok    cut {done}: {told}: all there, {time.monotonic() - began_at:.0f} s", flush=True)
    except Failed as why:
        losses += 1
        print(f"FAIL  after {done} cuts (KEEPD_TEST_SEED={seed}): {why}", flush=True)
    finally:
        machine.cut_at = None
        if machine.qemu and machine.qemu.poll() is None:
            machine.cut_power("kept", rng)
    print("      " + ", ".join(f"{what}: {n}" for what, n in shop.counts.items()))
    print(
        f"      disk: {machine.disk.flushes} flushes; cuts that lost no write: {tally['kept']}, all that were not flushed: {tally['dropped']}, any of them: {tally['torn']}; "
        f"{tally['lost']} writes of {tally['in the cache']}; {time.monotonic() - began:.0f} s"
    )
    if not tally["lost"]:
        print("      NOTE: no cut met a write that was not flushed: only what the machine had in memory was lost. KEEPD_TEST_LONG=1 has more of them")
    print(f"power cuts: {done}, losses: {losses}")
    sys.exit(1 if losses else 0)


def lose_power(machine: Machine, work: Callable[[], object], rng: random.Random, tally: Counter) -> str:
    """Has it work until its moment comes. Gives a line for whoever reads."""
    began = time.monotonic()
    try:
        work()
        raise Failed("the work ended before the power did")
    except PowerCut:
        pass
    # A cut that keeps everything proves the least: not before one has lost something.
    after, how = time.monotonic() - began, rng.choice(["kept", "dropped", "torn"] if tally["lost"] else ["dropped", "torn"])
    writes, kept = machine.cut_power(how, rng)
    tally.update({how: 1, "in the cache": writes, "lost": writes - kept})
    return f"after {after:.1f} s at '{machine.doing}', {how}, {writes - kept} of {writes} unflushed writes lost"


if __name__ == "__main__":
    main()
