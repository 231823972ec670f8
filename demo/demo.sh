#!/bin/sh
# Shows keepd at work: a live database and a directory are backed up, lost, and brought back.
#
# usage: demo.sh BINARIES_DIR        (make demo calls it)
# Works as the invoking user in a directory of its own below ${TMPDIR:-/tmp}, needs no root, and leaves nothing running and
# nothing behind; KEEP=1 keeps the directory. Exit code 0 only when everything came back as it was.
set -eu
bin=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
keepd=$bin/keepd keepctl=$bin/keepctl
for program in "$keepd" "$keepctl"; do
    [ -x "$program" ] || { echo "demo: $program is missing: run 'make build' first" >&2; exit 1; }
done
# A service's environment is none of the demo's.
unset NOTIFY_SOCKET JOURNAL_STREAM WATCHDOG_USEC WATCHDOG_PID LISTEN_FDS LISTEN_PID KEEPD_SOCKET 2>/dev/null || true

dir=$(mktemp -d "${TMPDIR:-/tmp}/keepd-demo.XXXXXX")
app=$dir/app daemon= writer=

if [ -t 1 ]; then bold=$(printf '\033[1m') plain=$(printf '\033[0m'); else bold= plain=; fi
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
show() { printf '$ keepctl %s\n' "$*"; ctl "$@"; }
ctl() { "$keepctl" --socket "$dir/keepd.sock" "$@"; }
fail() { echo "demo: FAILED: $*" >&2; exit 1; }
# Rows, and whether they are a moment of the writer's history: it inserts 1, 2, 3, …, each in a transaction of its own.
rows() { python3 "$here/rows.py" "$@"; }
sums() { (cd "$1" && find . -type f -exec sha256sum {} + | LC_ALL=C sort); }
# A child that ended but was not waited for still answers kill -0.
alive() { case $(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) in '' | Z*) return 1 ;; esac; }
stop() { # stop PID: ask, wait a while, insist
    kill "$1" 2>/dev/null || return 0
    tries=0
    while alive "$1" && [ $tries -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
    ! alive "$1" || kill -9 "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}
clean_up() {
    code=$?
    trap '' INT TERM HUP
    [ -z "$writer" ] || stop "$writer"
    [ -z "$daemon" ] || stop "$daemon"
    if [ $code -ne 0 ] && [ -s "$dir/keepd.log" ]; then
        echo "demo: the last lines of keepd's log:" >&2
        tail -n 20 "$dir/keepd.log" >&2
    fi
    if [ -n "${KEEP:-}" ]; then echo "Kept: $dir"; else rm -rf "$dir"; fi
    exit $code
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

say "An application: a SQLite database that is being written to, and a directory of uploads"
mkdir -p "$app/uploads/2026"
python3 "$here/writer.py" "$app/shop.db" &
writer=$!
for n in 1 2 3 4 5 6 7 8 9 10 11 12; do head -c $((n * 40000)) /dev/urandom >"$app/uploads/2026/photo-$n.jpg"; done
printf 'Terms and conditions\n' >"$app/uploads/terms.txt"
ln -s terms.txt "$app/uploads/current-terms"
tries=0
until [ "$(rows "$app/shop.db" 2>/dev/null || echo 0)" -ge 2000 ]; do
    alive "$writer" || fail "the writer ended"
    tries=$((tries + 1)); [ $tries -lt 300 ] || fail "the writer writes nothing"
    sleep 0.1
done
echo "$(rows "$app/shop.db") rows so far, about 200 more each second; $(find "$app/uploads" -type f | wc -l) files"

say "A configuration with a key, a place for the backups, and a job"
"$keepd" key generate "$dir/main.key" >/dev/null
cat >"$dir/keepd.toml" <<TOML
[daemon]
state_dir = "$dir/state"
socket = "$dir/keepd.sock"

[encryption.main]
key_file = "$dir/main.key"

[destination.local]
service = "fs"
root = "$dir/backups"
encryption = "main"

[job.shop]
schedule = "30 2 * * *"
destinations = ["local"]
retention = { keep_last = 3, keep_daily = 7, keep_weekly = 4 }

[[job.shop.source]]
name = "db"
sqlite = "$app/shop.db"

[[job.shop.source]]
name = "uploads"
files = "$app/uploads"
TOML
cat "$dir/keepd.toml"
"$keepd" --config "$dir/keepd.toml" --check

say "keepd starts"
"$keepd" --config "$dir/keepd.toml" 2>"$dir/keepd.log" &
daemon=$!
tries=0
until ctl status >/dev/null 2>&1; do
    alive "$daemon" || fail "keepd ended"
    tries=$((tries + 1)); [ $tries -lt 100 ] || fail "keepd does not answer"
    sleep 0.1
done
show status

say "The first backup, while the application goes on writing"
before=$(rows "$app/shop.db")
show backup shop
after=$(rows "$app/shop.db")
[ "$after" -gt "$before" ] || fail "the writer was held up by the backup"
echo "Rows before: $before, after: $after: the writer was never stopped."

say "A little later, a second one: only what changed is stored"
sleep 2
# Not before the backup has something that only it can give back.
at_least=$(rows "$app/shop.db")
printf 'Terms and conditions, second edition\n' >"$app/uploads/terms.txt"
sums "$app/uploads" >"$dir/uploads.sha256"
show backup shop
at_most=$(rows "$app/shop.db")
show list
ctl list --json >"$dir/list.json"
python3 "$here/added.py" "$dir/list.json"

say "Disaster: the database is overwritten, the uploads are deleted"
stop "$writer"; writer=
printf 'This was a database once.\n' >"$app/shop.db"
rm -rf "$app/shop.db-wal" "$app/shop.db-shm" "$app/uploads"
ls -l "$app"

say "Restore"
show restore latest --job shop --to "$dir/restored"
database=$dir/restored/db
[ -f "$database" ] || database=$(find "$dir/restored/db" -type f | head -n 1)
[ -n "$database" ] && [ -f "$database" ] || fail "no database in $dir/restored"

say "The proof"
found=$(rows --check "$database") || fail "the restored database is damaged: $found"
[ "$found" -ge "$at_least" ] && [ "$found" -le "$at_most" ] || fail "the restored database has $found rows, not $at_least to $at_most"
echo "PRAGMA integrity_check: ok"
echo "Rows: $found, without a gap (there were $at_least before the backup began and $at_most after it)"
sums "$dir/restored/uploads" >"$dir/restored.sha256"
cmp -s "$dir/uploads.sha256" "$dir/restored.sha256" || fail "the restored uploads differ from the lost ones"
[ "$(readlink "$dir/restored/uploads/current-terms")" = terms.txt ] || fail "the symlink did not come back"
echo "SHA-256 of all $(wc -l <"$dir/uploads.sha256") uploads: the same"

say "And it goes on: the application has its data back"
cp "$database" "$app/shop.db"
cp -R "$dir/restored/uploads" "$app/uploads"
python3 "$here/writer.py" "$app/shop.db" &
writer=$!
tries=0
until [ "$(rows "$app/shop.db" 2>/dev/null || echo 0)" -gt "$found" ]; do
    tries=$((tries + 1)); [ $tries -lt 100 ] || fail "the restored database cannot be written to"
    sleep 0.1
done
stop "$writer"; writer=
show status

stop "$daemon"; daemon=
say "Everything came back. Nothing is left running."
cat <<'NEXT'
To have this every night, as a service:
  sudo make install                                        binaries, units, completions
  sudo keepd key generate /etc/keepd/keys/main.key         and keep a copy of it elsewhere
  sudoedit /etc/keepd/keepd.toml                           what to back up, where to, when
  sudo keepd --check
  sudo systemctl enable --now keepd.socket keepd.service
  sudo keepctl status
More: README.md, docs/operations.md, keepctl --help
NEXT
