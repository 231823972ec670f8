#!/bin/bash
# Runs inside the container as root: the service's life, step by step. Exit code 0 when every check held.
set -u
config=/etc/keepd/keepd.toml
. /keepd-test/checks.sh
audited_command() { # refused, and written down with what was called
    chmod 0666 /run/keepd/keepd.sock; as_shop keepctl backup shop --description "by the shop" 2>/dev/null; chmod 0660 /run/keepd/keepd.sock
    keepctl audit list --refused --jsonl | grep -F '"user":"shop"' | grep -qF 'by the shop'
}

configure() { # configure JOB
    cat >$config <<TOML
[encryption.main]
key_file = "/etc/keepd/keys/main.key"

[destination.local]
service = "fs"
root = "/var/backups/keepd"
encryption = "main"

[job.$1]
schedule = "30 2 * * *"
destinations = ["local"]

[[job.$1.source]]
name = "db"
sqlite = "/var/lib/shop/shop.db"

[[job.$1.source]]
name = "closed"
sqlite = "/var/lib/shop/closed.db"

[[job.$1.source]]
files = "/home/shop/uploads"
TOML
}

# ---- what is backed up: a user's own, closed to others -----------------------------------------------------------------
systemd-sysusers 2>/dev/null
systemd-tmpfiles --create 2>/dev/null
echo 'u shop - - /var/lib/shop' | systemd-sysusers - 2>/dev/null
as_shop() { setpriv --reuid shop --regid shop --clear-groups -- "$@"; }
install -d -o shop -g shop -m 0700 /var/lib/shop /home/shop /home/shop/uploads
as_shop python3 /keepd-test/writer.py /var/lib/shop/shop.db &
writer=$!
as_shop sqlite3 /var/lib/shop/closed.db "pragma journal_mode = wal; create table t (n); insert into t values (1), (2), (3);" >/dev/null
for n in $(seq 50); do head -c 5000 /dev/urandom >/home/shop/uploads/$n.jpg; done
chown -R shop:shop /home/shop/uploads; chmod 600 /home/shop/uploads/*
umask 077
check "a key is generated" keepd key generate /etc/keepd/keys/main.key
configure shop
check "the configuration is valid" keepd --check

# ---- units -------------------------------------------------------------------------------------------------------------
check "systemd-analyze verify" systemd-analyze verify /usr/local/lib/systemd/system/keepd.service /usr/local/lib/systemd/system/keepd.socket
score=$(systemd-analyze security --offline=true --threshold=30 /usr/local/lib/systemd/system/keepd.service 2>&1 | tail -1)
check "systemd-analyze security is at most 3.0: $score" systemd-analyze security --offline=true --threshold=30 /usr/local/lib/systemd/system/keepd.service

# ---- start by socket activation ------------------------------------------------------------------------------------------
systemctl daemon-reload
systemctl enable -q keepd.service
check "enable covers the socket" systemctl is-enabled keepd.socket
check "the socket starts" systemctl start keepd.socket
check "the socket is the group's" test "$(stat -c '%a %U %G' /run/keepd/keepd.sock)" = "660 root keepd"
check "the service is not started by its socket alone" is ActiveState inactive
check "a client starts the service" keepctl status
check "READY was reached" until_true 10 is ActiveState active
check "it says so in the log" log_has "is ready: 1 job"
check "the status says what is next" until_true 10 status_has "next: shop at"
started=$(( $(property ActiveEnterTimestampMonotonic) - $(property ExecMainStartTimestampMonotonic) ))
check "READY came soon ($((started / 1000)) ms)" test $started -gt 0 -a $started -lt 2000000
check "the watchdog is armed" is WatchdogUSec 2min
check "the audit log has the command line of another user" audited_command
check "the state directory is root's alone" test "$(stat -c %a /var/lib/keepd)" = 700
pid=$(property MainPID)
check "one capability" grep -qx "CapEff:.0000000000000004" /proc/$pid/status

# ---- backup and restore under the hardened unit --------------------------------------------------------------------------
sleep 1
check "a backup of a live database, a closed one and a closed-off directory" keepctl --no-progress backup shop
check "a second one" keepctl --no-progress backup shop
check "it left nothing beside the databases" test "$(find /var/lib/shop -newer $config -user root | wc -l)" = 0
rm -rf /root/back
check "a restore" keepctl --no-progress restore latest --job shop --to /root/back
check "the live database is whole" test "$(sqlite3 /root/back/db 'pragma integrity_check' 2>/dev/null || sqlite3 /root/back/db/shop.db 'pragma integrity_check')" = ok
live=/root/back/db; [ -f $live ] || live=$(find /root/back/db -type f | head -1)
check "it is a moment of its history" test "$(sqlite3 "$live" "select count(*) > 100 and count(*) % 2 = 0 and count(*) = 2 * max(n) from pairs")" = 1
closed=/root/back/closed; [ -f $closed ] || closed=$(find /root/back/closed -type f | head -1)
check "the closed database is there" test "$(sqlite3 "$closed" 'select count(*) from t')" = 3
check "the files are the same" diff -r /home/shop/uploads /root/back/uploads

# ---- an application held still, hooks, from within the hardened unit --------------------------------------------------------
cat >/etc/systemd/system/shop-worker.service <<UNIT
[Service]
ExecStart=/bin/sleep infinity
UNIT
systemctl daemon-reload
systemctl start shop-worker
mkdir -p /etc/keepd/conf.d
cat >/etc/keepd/conf.d/quiet.toml <<'TOML'
[job.quiet]
destinations = ["local"]
services = ["shop-worker.service"]
quiesce = true
hooks = { before = { shell = "id -u; grep CapEff /proc/self/status" }, after = { shell = "systemctl show -P ActiveState shop-worker" } }

[[job.quiet.source]]
name = "state"
command = ["/usr/bin/systemctl", "show", "-P", "ActiveState", "shop-worker.service"]
TOML
check "a job with services is taken" keepctl reload
check "its backup" keepctl --no-progress backup quiet
check "the service stood still while it was captured" test "$(keepctl cat latest --job quiet state/output)" = inactive
check "and goes on" systemctl is-active shop-worker
quiet=$(keepctl --json run list --job quiet | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["id"])')
check "what a hook says is in the run" bash -c "keepctl run show $quiet | grep -q 'CapEff: *0000000000000004'"
rm -r /etc/keepd/conf.d
check "the job is gone again" keepctl reload

# ---- a restore in place of a running service ---------------------------------------------------------------------------------
install -d -o shop -g shop -m 0700 /var/lib/live /var/lib/live/uploads
cat >/etc/systemd/system/live.service <<UNIT
[Service]
User=shop
ExecStart=/usr/bin/python3 /keepd-test/writer.py /var/lib/live/live.db
UNIT
systemctl daemon-reload
systemctl start live
echo first >/var/lib/live/uploads/a; chown shop:shop /var/lib/live/uploads/a
mkdir -p /etc/keepd/conf.d
cat >/etc/keepd/conf.d/live.toml <<'TOML'
[job.live]
destinations = ["local"]
services = ["live.service"]
health = { command = ["/usr/bin/systemctl", "is-active", "live.service"], patience = "10s" }

[[job.live.source]]
name = "db"
sqlite = "/var/lib/live/live.db"

[[job.live.source]]
name = "uploads"
files = "/var/lib/live/uploads"
TOML
check "a job of a running service" keepctl reload
until_true 10 test -s /var/lib/live/live.db-wal
check "its backup" keepctl --no-progress backup live
saved=$(keepctl --json list --job live | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["id"])')
rows() { sqlite3 -cmd '.timeout 10000' -readonly /var/lib/live/live.db 'select max(n) from pairs'; }
mark() { echo "$1" >/var/lib/live/uploads/a; chown shop:shop /var/lib/live/uploads/a; }
mark second
before=$(rows)
check "without the right to write it is refused before anything is touched" bash -c 'keepctl --no-progress restore '"$saved"' --in-place --yes 2>&1 | tee /tmp/refused | grep -q "ReadWritePaths=/var/lib/live"; systemctl is-active live && ! keepctl restore '"$saved"' --in-place --dry-run'
sed 's|/var/lib/shop|/var/lib/live|; $a EnvironmentFile=-/run/dies-at' /usr/local/share/doc/keepd/keepd-in-place.conf >/root/in-place.conf
install -Dm644 /root/in-place.conf /etc/systemd/system/keepd.service.d/in-place.conf
systemctl daemon-reload; systemctl restart keepd
main=$(systemctl show -P MainPID live)
check "with the drop-in it is done" keepctl --no-progress restore "$saved" --in-place --yes
check "the service was restarted for it" test "$(systemctl show -P MainPID live)" != "$main"
check "and runs" systemctl is-active live
check "the files are those of the backup" grep -qx first /var/lib/live/uploads/a
check "the database is that of the backup, and goes on from there" test "$(rows)" -lt "$before"
check "all of it belongs to the service's user" test "$(find /var/lib/live ! -user shop | wc -l)" = 0
check "it is whole" test "$(sqlite3 -cmd '.timeout 10000' -readonly /var/lib/live/live.db 'pragma integrity_check')" = ok
# Killed on its way: wholly old or wholly new, and the service is up.
for point in 3 12 22 32 42 52; do
    mark second
    pid=$(property MainPID)
    echo "KEEPD_TEST_DIES_AT=$point" >/run/dies-at
    systemctl reset-failed keepd; systemctl restart keepd
    pid=$(property MainPID)
    keepctl --no-progress restore "$saved" --in-place --yes --no-safety-backup >/tmp/killed 2>&1; said=$?
    rm /run/dies-at
    again() { [ "$(property MainPID)" != "$pid" ] && [ "$(property ActiveState)" = active ]; }
    [ $said = 0 ] || until_true 30 again
    done_with() { [ -z "$(ls /var/lib/keepd/in-place 2>/dev/null)" ] && systemctl -q is-active live; }
    check "killed at point $point (exit $said) it is finished or undone, and the service is up" until_true 30 done_with
    state=$(cat /var/lib/live/uploads/a)
    check "all is $state" bash -c "! ls -d /var/lib/live/.keepd-restore-* /var/lib/live/uploads/.keepd-restore-* 2>/dev/null && [ \"\$(sqlite3 -cmd '.timeout 10000' -readonly /var/lib/live/live.db 'pragma integrity_check; select count(*) % 2 from pairs')\" = 'ok
0' ]"
    [ $said = 0 ] && break
done
check "the last one was not killed" test "$said" = 0
systemctl stop live
rm -r /etc/keepd/conf.d /etc/systemd/system/keepd.service.d/in-place.conf
systemctl daemon-reload; systemctl reset-failed keepd; systemctl restart keepd
pid=$(property MainPID)

# ---- reload ----------------------------------------------------------------------------------------------------------------
configure second
check "systemctl reload with a good configuration" systemctl reload keepd
check "it is in force" until_true 10 status_has "next: second at"
check "the same process goes on" is MainPID "$pid"
echo '[job.broken' >$config
check "systemctl reload fails with a wrong configuration" bash -c '! systemctl reload keepd'
check "a wrong one is refused in the status" until_true 10 status_has "the configuration on disk is wrong"
check "and in the log, with file and line" log_has "keepd.toml"
check "the old one stays in force" until_true 10 status_has "next: second at"
check "the service is still active" is ActiveState active
check "keepctl reload says so too" bash -c '! keepctl reload'
configure shop
check "keepctl reload" keepctl reload
check "no restart happened" is MainPID "$pid"

# ---- the configuration, out and in ------------------------------------------------------------------------------------------
check "the configuration goes out with its key, sealed" keepctl config export --include-secrets -o /root/all.json.gz.enc
configure third
keepctl reload >/dev/null
check "it comes in again, written by the hardened unit" keepctl config import /root/all.json.gz.enc --mode full --on-conflict overwrite --yes
check "it is in force" bash -c 'keepctl job list | grep -q shop && ! keepctl job list | grep -q third'
check "and is undone" bash -c 'keepctl config undo --yes && keepctl job list | grep -q third'
check "nothing is left beside it" bash -c '! ls -A /etc/keepd | grep -q "^\.keepd"'
configure shop
rm -rf /etc/keepd/conf.d
check "back to the shop" keepctl reload
check "still the same process" is MainPID "$pid"

# ---- a second daemon -------------------------------------------------------------------------------------------------------
sed -e 's|^\[encryption|[daemon]\nsocket = "/run/keepd/second.sock"\n\n&|' $config >/root/second.toml
check "a second daemon is refused" bash -c 'timeout 20 keepd --config /root/second.toml 2>/tmp/second; [ $? = 1 ] && grep -qi "another keepd" /tmp/second || { cat /tmp/second; false; }'
check "the first one goes on" is MainPID "$pid"

# ---- SIGTERM in the middle of a run ------------------------------------------------------------------------------------------
for n in $(seq 40); do head -c 8000000 /dev/urandom >/home/shop/uploads/big$n; done; chown shop:shop /home/shop/uploads/*
keepctl --no-progress backup shop --detach >/dev/null 2>&1
check "stop while a run works" bash -c 'time systemctl stop keepd.service keepd.socket'
check "it waited for the run" log_has "waiting for 1 run"
check "it ended by itself and well" is Result success
check "exit code 0" is ExecMainStatus 0
check "the socket is gone with its unit" test ! -e /run/keepd/keepd.sock
check "it starts again" systemctl start keepd.service
check "and with its socket" systemctl is-active keepd.socket
check "the cut-off run is no obstacle" keepctl --no-progress backup shop

# ---- kill -9, and the watchdog -------------------------------------------------------------------------------------------------
pid=$(property MainPID); kill -9 "$pid"
restarted() { [ "$(property MainPID)" != "$pid" ] && [ "$(property ActiveState)" = active ]; }
check "killed, it is restarted" until_true 30 restarted
mkdir -p /run/systemd/system/keepd.service.d
printf '[Service]\nWatchdogSec=3s\n' >/run/systemd/system/keepd.service.d/watchdog.conf
systemctl daemon-reload; systemctl restart keepd
pid=$(property MainPID); sleep 7
check "fed, the watchdog leaves it alone" is MainPID "$pid"
kill -STOP "$pid"
check "stopped dead, the watchdog has it restarted" until_true 40 restarted
rm /run/systemd/system/keepd.service.d/watchdog.conf; systemctl daemon-reload

# ---- a wrong configuration at start ------------------------------------------------------------------------------------------
systemctl stop keepd.service keepd.socket; systemctl reset-failed keepd.service 2>/dev/null
echo '[job.broken' >$config
check "it does not start with a wrong configuration" bash -c '! systemctl start keepd.service'
check "it exits with 78" is ExecMainStatus 78
sleep 7
check "and is not restarted" is NRestarts 0

# ---- as below systemd 253 ------------------------------------------------------------------------------------------------------
configure shop
systemctl stop keepd.socket 2>/dev/null; systemctl reset-failed keepd.service 2>/dev/null
install -Dm644 /usr/local/share/doc/keepd/keepd-before-253.conf /etc/systemd/system/keepd.service.d/before-253.conf
systemctl daemon-reload
check "the drop-in for older systemd starts" systemctl start keepd.service
check "Type=notify" is Type notify
configure third
check "reload by kill -HUP" systemctl reload keepd
check "takes effect" until_true 10 status_has "next: third at"
echo '[job.broken' >$config
check "a wrong configuration fails the reload" bash -c '! systemctl reload keepd'
check "stop" systemctl stop keepd.service keepd.socket

kill "$writer" 2>/dev/null
held "the service"
