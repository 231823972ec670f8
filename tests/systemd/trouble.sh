#!/bin/bash
# Runs inside a container as root: the service in trouble. Secrets as credentials, files of anybody's, what is frozen, stopped, killed and replaced in the middle of its work,
# another version, rights and directories that are gone. Exit code 0 when every check held.
set -u
config=/etc/keepd/keepd.toml
. /keepd-test/checks.sh
systemd-sysusers 2>/dev/null
systemd-tmpfiles --create 2>/dev/null
echo 'u shop - - /srv' | systemd-sysusers - 2>/dev/null
umask 022
dropin() { mkdir -p "/etc/systemd/system/keepd.service.d"; cat >"/etc/systemd/system/keepd.service.d/$1.conf"; systemctl daemon-reload; }
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)'"$1"')'; }
newest_run() { keepctl --json run list -n 1 --job "$1" | field "[0]['$2']"; }
newest_backup() { keepctl --json list --job "$1" | field "[0]['id']"; }
quiet() { keepctl -q --no-progress "$@"; }
# Everything about a tree but its inodes and times of change; contents by their sums.
listing() { (cd "$1" && find . -printf '%P|%y|%m|%U:%G|%s|%T@|%l\n' | sort && find . -type f -print0 | sort -z | xargs -0 sha256sum); }
same() { diff <(listing "$1") <(listing "$2"); }
again() { systemctl reset-failed keepd 2>/dev/null; systemctl "$@"; }
in_force() { keepctl reload >/dev/null; }

# ---- secrets as credentials of the service ---------------------------------------------------------------------------------
install -d -m 0700 /root/secret /var/backups/spoken
keepd key generate /root/secret/main >/dev/null
echo 'correct horse battery staple' >/root/secret/word
cat >/usr/local/bin/plugin <<'SH'
#!/bin/sh
# A plugin that only says whether it was told the right token.
read -r hello
case $hello in *'"token":"let me in"'*) word=right ;; *) word=wrong ;; esac
printf '{"error":"denied","message":"the token is %s"}\n' $word
SH
chmod 755 /usr/local/bin/plugin
dropin credentials <<'UNIT'
[Service]
LoadCredential=main:/root/secret/main
LoadCredential=word:/root/secret/word
SetCredential=token:let me in
UNIT
cat >$config <<'TOML'
[encryption.main]
credential = "main"

[encryption.spoken]
passphrase = { credential = "word" }

[destination.local]
service = "fs"
root = "/var/backups/keepd"
encryption = "main"
prune_grace = "0s"

[destination.plugged]
service = "exec"
command = ["/usr/local/bin/plugin"]
options = { token = { credential = "token" } }
encryption = "main"

[destination.spoken]
service = "fs"
root = "/var/backups/spoken"
encryption = "spoken"

[job.own]
destinations = ["local", "spoken"]

[[job.own.source]]
files = "/srv/own"
TOML
mkdir /srv/own
check "it starts with its secrets as credentials" systemctl start keepd.socket keepd.service
check "a backup to destinations whose keys and tokens are credentials" quiet backup own
check "a plugin is given its own" bash -c 'keepctl destination test plugged 2>&1 | grep "the token is right"'
check "systemctl reload, which checks with the same credentials" systemctl reload keepd
check "they are nowhere else: neither on a command line nor in the environment" bash -c '! tr "\0" "\n" </proc/$(systemctl show -P MainPID keepd)/environ | grep -i "let me in\|correct horse" && ! grep -a "let me in\|correct horse" /proc/$(systemctl show -P MainPID keepd)/cmdline'
echo 'of another length, and wrong' >/root/secret/word
check "with another passphrase it starts" systemctl restart keepd
check "and says what does not open, and backs up where it does" bash -c 'keepctl --no-progress backup own >/tmp/wrong.out 2>&1; [ $? = 3 ] && grep spoken /tmp/wrong.out || { cat /tmp/wrong.out; false; }'
echo 'correct horse battery staple' >/root/secret/word
rm /root/secret/main
check "without the file of a credential systemd does not start it" bash -c '! systemctl restart keepd'
check "and says that it is for the credentials" until_true 20 bash -c 'journalctl -b -q -u keepd --no-pager | grep -qi "set up credentials"'
keepd key generate /root/secret/other >/dev/null
rm -r /etc/systemd/system/keepd.service.d; systemctl daemon-reload; systemctl reset-failed keepd 2>/dev/null
systemctl stop keepd.socket keepd.service
rm -rf /var/backups/spoken /var/backups/keepd/* /var/lib/keepd

# ---- files of anybody's, out and in again, with owners and modes -------------------------------------------------------------
keepd key generate /etc/keepd/keys/main.key >/dev/null
configure() { # configure [DESTINATION SETTING…]
    cat >$config <<TOML
[encryption.main]
key_file = "/etc/keepd/keys/main.key"

[destination.local]
service = "fs"
root = "/var/backups/keepd"
encryption = "main"
prune_grace = "0s"
$*

[job.own]
destinations = ["local"]

[[job.own.source]]
name = "own"
files = "/srv/own"

[job.live]
destinations = ["local"]
services = ["live.service"]
hooks = { before_restore = { shell = "test ! -e /srv/slow-before || sleep 5" }, after_restore = { shell = "test ! -e /srv/slow-after || sleep 5" } }

[[job.live.source]]
name = "live"
files = "/srv/live"

[job.large]
destinations = ["local"]

[[job.large.source]]
name = "large"
files = "/srv/large"
TOML
}
configure
cd /srv/own
echo secret >root-only; chmod 600 root-only
echo nobody >nothing; chmod 000 nothing
echo stranger >stranger; chown 12345:54321 stranger; chmod 640 stranger
install -d -o shop -g shop -m 0700 closed; install -d -o shop -g 54321 -m 2770 shared
echo deep >closed/deep; chown shop:shop closed/deep; chmod 400 closed/deep
echo "line" >$'closed/two\nlines and \\ and ü'; chown 12345 closed/two*
ln stranger hard; ln -s /nowhere dangling; ln -s closed/deep inward
head -c 300000 /dev/urandom >shared/data; chown shop:54321 shared/data; chmod 660 shared/data
touch -d '1999-12-31T23:59:59.123456789' nothing
truncate -s 5M sparse
cd /
check "it starts" systemctl restart keepd
check "a backup of files of root's, of a user's, of nobody's" quiet backup own
check "it is whole, not partly" test "$(newest_run own state)" = good
rm -rf /root/back; check "it comes back elsewhere" quiet restore latest --job own --to /root/back
check "with contents, owners, modes, times, links" same /srv/own /root/back/own
cp -a /srv/own /root/was
sed 's|/var/lib/shop|/srv|' /usr/local/share/doc/keepd/keepd-in-place.conf | dropin in-place
check "a drop-in is in force after a restart" systemctl restart keepd
spoil() { (cd /srv/own && rm -rf closed/deep hard inward && chmod 777 root-only && chown shop nothing && echo other >stranger && rm shared/data && echo new >shared/new && chown 0:0 shared && mkdir new && echo new >new/new && ln -sfn / dangling); }
spoil
check "a restore in place, also into a directory with a set-group-ID bit" quiet restore latest --job own --in-place --yes
check "brings all of it back, owners, modes, times and links too" same /root/was /srv/own
# The unit forbids to set such a bit: that is found out before anything is touched.
spoil; chmod 00700 /srv/own/shared
rm -rf /root/spoilt; cp -a /srv/own /root/spoilt
check "where such a bit has to be set it is refused, and says what it needs" bash -c '! keepctl -q --no-progress restore latest --job own --in-place --yes 2>/tmp/bits && grep -q "/srv/own/shared.*RestrictSUIDSGID=no" /tmp/bits || { cat /tmp/bits; false; }'
check "nothing was touched" same /root/spoilt /srv/own
echo 'RestrictSUIDSGID=no' >>/etc/systemd/system/keepd.service.d/in-place.conf; systemctl daemon-reload; systemctl restart keepd
check "with that it is done" quiet restore latest --job own --in-place --yes
check "the bit, too" same /root/was /srv/own
# And one that would have to be set to take it back.
chmod 2777 /srv/own/closed; echo more >/srv/own/closed/more
sed -i '/RestrictSUIDSGID/d' /etc/systemd/system/keepd.service.d/in-place.conf; systemctl daemon-reload; systemctl restart keepd
check "where it would have to be set to go back it is refused, too" bash -c '! keepctl -q --no-progress restore latest --job own --in-place --yes 2>/tmp/bits && grep -q "/srv/own/closed.*RestrictSUIDSGID=no" /tmp/bits || { cat /tmp/bits; false; }'
chmod 00700 /srv/own/closed
check "without it it is done" quiet restore latest --job own --in-place --yes
check "and as it was" same /root/was /srv/own
check "hard links are one file" test "$(stat -c %i /srv/own/stranger)" = "$(stat -c %i /srv/own/hard)"
check "nothing is left beside it" bash -c '! find /srv -name ".keepd*" | grep .'

# ---- in the middle of a backup: frozen, killed, stopped, replaced --------------------------------------------------------------
mkdir /srv/large; for n in $(seq 12); do head -c 1000000 /dev/urandom >/srv/large/$n; done
configure 'bandwidth = "1MiB/s"'
check "a slow destination" in_force
in_the_middle() { # in_the_middle JOB: a backup of it runs, and stores
    keepctl -q backup "$1" --detach >/dev/null 2>&1
    until_true 20 bash -c '[ "$(keepctl --json run list -n 1 --job '"$1"' | python3 -c "import json, sys; r = json.load(sys.stdin)[0]; print(r[\"state\"], r[\"progress\"][\"bytes\"] > 0)")" = "running True" ]'
}
restarted() { [ "$(property MainPID)" != "$pid" ] && [ "$(property ActiveState)" = active ]; }
said_interrupted() { keepctl run show "$run" | grep -i 'interrupted\|cut off\|stopp\|ended before\|cancelled' && [ "$(keepctl --json run list --job large -n 50 | python3 -c "import json, sys; print([r['state'] for r in json.load(sys.stdin) if r['id'] == '$run'][0])")" != running ]; }
good_again() { # the next backup is good, and everything is whole
    configure; in_force
    quiet backup large && quiet check local --read-data || return 1
    head -c 1000000 /dev/urandom >/srv/large/$((RANDOM % 12 + 1)); for n in 1 2 3; do head -c 1500000 /dev/urandom >/srv/large/new$n; done
    configure 'bandwidth = "1MiB/s"'; in_force
}
dropin watchdog <<'UNIT'
[Service]
WatchdogSec=3s
UNIT
again restart keepd
pid=$(property MainPID)
check "a backup runs" in_the_middle large
run=$(newest_run large id)
kill -STOP "$pid"
check "frozen in the middle, the watchdog has it restarted" until_true 60 restarted
check "systemd says it was the watchdog" bash -c 'journalctl -b -q -u keepd --no-pager | grep -qi "watchdog timeout"'
check "the run is told as interrupted" said_interrupted
check "and the next one is good" good_again
rm /etc/systemd/system/keepd.service.d/watchdog.conf; systemctl daemon-reload
pid=$(property MainPID)
check "a backup runs" in_the_middle large
run=$(newest_run large id)
check "systemctl kill -s KILL" systemctl kill -s KILL keepd
check "it is restarted" until_true 60 restarted
check "the run is told as interrupted" said_interrupted
check "and the next one is good" good_again
systemctl reset-failed keepd
for call in "stop" "try-restart" "restart"; do
    systemctl reset-failed keepd # its restarts by hand count, too: five in ten minutes
    pid=$(property MainPID)
    check "a backup runs" in_the_middle large
    run=$(newest_run large id)
    began=$SECONDS
    check "systemctl $call in the middle" systemctl $call keepd.service
    check "it ended in time ($((SECONDS - began)) s)" test $((SECONDS - began)) -lt 88
    [ "$call" != stop ] || check "and well" is Result success
    check "it is up again, for a client is enough" keepctl status
    check "another process" is_not MainPID "$pid"
    check "the run is told as interrupted" said_interrupted
    check "and the next one is good" good_again
done
check "systemctl try-restart does not start what is stopped" bash -c 'systemctl stop keepd.socket keepd.service && systemctl try-restart keepd.service && ! systemctl is-active keepd.service'
again start keepd.socket keepd.service

# ---- in the middle of a prune ----------------------------------------------------------------------------------------------------
# Packs that are mostly dead: rewriting the rest of them takes its time at this pace.
configure; in_force
quiet backup large
for n in $(seq 9); do head -c 1000000 /dev/urandom >/srv/large/$n; done
quiet backup large
for id in $(keepctl --json list --job large | python3 -c 'import json, sys; print(*[b["id"] for b in json.load(sys.stdin)[1:]])'); do quiet delete "$id" --yes; done
configure 'bandwidth = "1MiB/s"'; in_force
keepctl -q prune local >/tmp/prune.out 2>&1 & prune=$!
check "a prune runs" until_true 20 bash -c 'keepctl --json run list -n 1 | python3 -c "import json, sys; r = json.load(sys.stdin)[0]; sys.exit((r[\"kind\"], r[\"state\"]) != (\"prune\", \"running\"))"'
check "stop in the middle of it" systemctl stop keepd.service
check "it ended well" is Result success
wait $prune; said=$?
became=$(keepctl --json run list -n 50 | python3 -c 'import json, sys; print([r["state"] for r in json.load(sys.stdin) if r["kind"] == "prune"][0])')
check "keepctl said $said, and it is told as $became" bash -c "[ $became = good ] && [ $said = 0 ] || { [ $said != 0 ] && [[ $became =~ ^(cancelled|failed)$ ]]; }"
check "the next one ends it" bash -c 'keepctl -q --no-progress prune local'
check "and everything is whole" quiet check local --read-data
configure; in_force

# ---- in the middle of a restore in place -------------------------------------------------------------------------------------------
cat >/etc/systemd/system/live.service <<'UNIT'
[Service]
User=shop
ExecStart=/bin/sleep infinity
UNIT
systemctl daemon-reload; systemctl start live
install -d -o shop -g shop /srv/live
fill() { for n in $(seq 30); do echo "$1 $n" >/srv/live/$n; done; chown shop:shop /srv/live/*; }
fill first
check "a backup" quiet backup live
saved=$(newest_backup live)
for moment in before after; do
    systemctl reset-failed keepd
    fill second
    touch /srv/slow-$moment
    keepctl -q --no-progress restore "$saved" --in-place --yes >/tmp/in-place.out 2>&1 & restore=$!
    check "a restore in place has come to its hook ($moment)" until_true 60 pgrep -fx 'sleep 5'
    began=$SECONDS
    check "stop in the middle of it" systemctl stop keepd.service
    check "it ended in time ($((SECONDS - began)) s), and well" is Result success
    wait $restore; said=$?
    rm -f /srv/slow-*
    check "it starts again" keepctl status
    check "all is finished or undone" until_true 30 bash -c '[ -z "$(ls -A /var/lib/keepd/in-place 2>/dev/null)" ] && systemctl -q is-active live'
    state=$(cut -d' ' -f1 /srv/live/* | sort -u)
    check "keepctl said $said, and all is $state" bash -c "[ \"$state\" = first ] || [ \"$state\" = second ]"
    check "what was told is what is" bash -c "[ $said = 0 ] && [ \"$state\" = first ] || { [ $said != 0 ] && [ \"$state\" = second ]; }"
    check "nothing lies about" bash -c '! find /srv -name ".keepd*" | grep .'
    check "the next backup is good" quiet backup live
done

# ---- clients wait while it restarts ------------------------------------------------------------------------------------------------
( while [ ! -e /tmp/enough ]; do keepctl --json status >/dev/null 2>>/tmp/clients.err && echo good >>/tmp/clients || echo bad >>/tmp/clients; done ) & clients=$!
for _ in 1 2 3; do again restart keepd; done
touch /tmp/enough; wait $clients
check "of $(grep -c . /tmp/clients) clients during three restarts each one waited, none failed" bash -c '! grep -q bad /tmp/clients || { sort /tmp/clients.err | uniq -c; false; }'
systemctl reset-failed keepd

systemctl reset-failed keepd

# ---- another version, over a running daemon ------------------------------------------------------------------------------------------
# The same sources under another number: what an upgrade exchanges.
version=$(keepd --version | sed 's/.* //; s/ .*//')
older=$(echo "$version" | tr '0-9' '9')
for program in keepd keepctl; do
    LC_ALL=C sed "s/${version//./\\.}/$older/g" /usr/local/bin/$program >/root/$program.older; cp /usr/local/bin/$program /root/$program.newer
done
put() { for program in keepd keepctl; do install -m 0755 /root/$program.$1 /usr/local/bin/$program; done; } # as `make install` does
runs() { keepctl --json run list -n 500 | field '.__len__()'; }
backups() { keepctl --json list | python3 -c 'import json, sys; print(sorted(b["id"] for b in json.load(sys.stdin)))'; }
check "the older one is put in over the running daemon" put older
check "it calls itself $older" bash -c "keepd --version | grep -q '$older'"
check "the older keepctl speaks with the newer daemon" keepctl status
again restart keepd
check "the older daemon runs" bash -c "chmod 755 /root/keepd.older && tr -d '\0' </proc/\$(systemctl show -P MainPID keepd)/exe | cmp - <(tr -d '\0' </root/keepd.older)"
check "and backs up" quiet backup own
before=$(backups)
configure 'bandwidth = "1MiB/s"'; in_force
for n in 1 2 3 4 5 6; do head -c 1500000 /dev/urandom >/srv/large/upgraded$n; done
check "a backup runs" in_the_middle large
run=$(newest_run large id)
check "the newer one is put in meanwhile" put newer
check "the running daemon goes on: its backup still runs" test "$(newest_run large state)" = running
check "the newer keepctl speaks with the older daemon" keepctl run show "$run"
check "systemctl restart, the backup in the middle" again restart keepd
check "the newer daemon runs" cmp /proc/"$(property MainPID)"/exe /root/keepd.newer
check "the run is told as interrupted" said_interrupted
check "every backup of before is there" test "$(backups)" = "$before"
check "what the older one made comes back" bash -c 'rm -rf /root/back; keepctl -q --no-progress restore latest --job own --to /root/back'
check "byte for byte" same /srv/own /root/back/own
check "the next backup is good" good_again
check "the audit log is one chain across versions" keepctl audit verify
configure; in_force
# Back to the older one, which is as good as long as nothing on the disk is newer than it knows.
check "back to the older one, over the running daemon" put older
check "it starts" again restart keepd
check "and backs up" quiet backup own
put newer; again restart keepd
before=$(backups)

# ---- state and repositories of a version that is not known ------------------------------------------------------------------------
systemctl stop keepd.socket keepd.service
sqlite3 /var/lib/keepd/ledger.sqlite 'pragma wal_checkpoint(truncate); pragma user_version = 99' >/dev/null
sum=$(sha256sum </var/lib/keepd/ledger.sqlite)
check "a ledger of a newer keepd: it does not start" bash -c '! systemctl start keepd.service'
check "and says why and what to do" log_has "version 99"
systemctl stop keepd.service # it would be tried a few times more
check "the ledger is as it was" test "$(sha256sum </var/lib/keepd/ledger.sqlite)" = "$sum"
sqlite3 /var/lib/keepd/ledger.sqlite 'pragma user_version = 1'
systemctl reset-failed keepd
check "with the newer keepd back it goes on" again start keepd.socket keepd.service
check "with all it knew" test "$(backups)" = "$before"
cp -p /var/backups/keepd/keepd.json /root/keepd.json
sed -i 's/"format": *1/"format": 99/' /var/backups/keepd/keepd.json
again restart keepd
listed=$(find /var/backups/keepd -type f | sort | sha256sum)
check "a repository of a newer keepd is refused, and says so" bash -c '! keepctl -q --no-progress backup own 2>/tmp/newer && grep -qi "99\|newer" /tmp/newer || { cat /tmp/newer; false; }'
check "nothing was written there" test "$(find /var/backups/keepd -type f | sort | sha256sum)" = "$listed"
cp -p /root/keepd.json /var/backups/keepd/keepd.json
again restart keepd
check "with the newer keepd back it goes on" quiet backup own

# ---- what is gone --------------------------------------------------------------------------------------------------------------------
before=$(backups)
systemctl stop keepd.socket keepd.service
rm -rf /var/lib/keepd
check "without its state directory it starts" again start keepd.socket keepd.service
check "which is there again, root's alone" test "$(stat -c '%a %U' /var/lib/keepd)" = "700 root"
has_all() { [ "$(backups)" = "$before" ]; }
check "it finds every backup" until_true 60 has_all
check "and backs up" quiet backup own
dropin narrow <<'UNIT'
[Service]
ReadOnlyPaths=/var/backups
UNIT
again restart keepd
check "a destination that it may not write to fails the backup, and says so" bash -c '! keepctl -q --no-progress backup own 2>/tmp/narrow && grep -q "Read-only file system" /tmp/narrow || { cat /tmp/narrow; false; }'
check "what is there can still be restored" bash -c 'rm -rf /root/back; keepctl -q --no-progress restore latest --job own --to /root/back'
rm /etc/systemd/system/keepd.service.d/narrow.conf; systemctl daemon-reload; again restart keepd
check "with its rights back it backs up" quiet backup own
systemctl stop keepd.socket keepd.service
systemctl mask -q --runtime keepd.service
check "masked, a client is told soon that nobody is there" bash -c 'timeout 30 keepctl status; [ $? = 4 ]'
systemctl unmask -q --runtime keepd.service; systemctl reset-failed keepd.socket keepd.service 2>/dev/null
check "unmasked, it starts" again start keepd.socket keepd.service
check "everything is whole" quiet check local --read-data
check "the audit log is whole, or begins anew where the state was lost" bash -c 'keepctl audit verify --offline'
check "nothing is left of anything" bash -c '! find /srv /etc/keepd /var/lib/keepd/work /var/lib/keepd/in-place -name ".keepd*" 2>/dev/null | grep . && [ -z "$(ls -A /var/lib/keepd/work 2>/dev/null)" ]'
held "the service in trouble"
