#!/bin/bash
# Inside the second container: an empty machine with keepd installed, the old one's disk and the kit. The document's commands, and what must hold then.
set -u
cd /keepd-test
failures=0
check() { # check WHAT COMMAND…
    local what=$1; shift
    if "$@" >/tmp/check.out 2>&1; then echo "ok    $what"; else echo "FAIL  $what"; failures=$((failures + 1)); sed 's/^/      /' /tmp/check.out | tail -30; fi
}
systemd-sysusers 2>/dev/null
systemd-tmpfiles --create 2>/dev/null
chown -R root:root /var/backups/keepd; chmod 700 /var/backups/keepd
# The application, without its data.
echo 'u shop - - /var/lib/shop' | systemd-sysusers - 2>/dev/null
install -d -o shop -g shop -m 0700 /var/lib/shop
check "nothing of keepd's is there but what was installed" bash -c '[ -z "$(ls /etc/keepd/keys /etc/keepd/conf.d | grep -v :)" ] && [ ! -e /var/lib/keepd/ledger.sqlite ]'

# Each line is a command, and none may fail.
while read -r line; do
    [ -n "$line" ] || continue
    check "\$ $line" bash -eu -c "$line"
    cat /tmp/check.out >>/tmp/steps.out
done <commands

truth() ( cd /var/lib/shop && { sqlite3 -readonly shop.db 'select * from orders order by n' | sha256sum; sha256sum uploads/*; } | diff /keepd-test/truth - )
check "bootstrap named what to take over" grep -q "keepctl destination take-over disk" /tmp/steps.out
check "the database and the files are what they were" truth
check "they belong to the application" test -z "$(find /var/lib/shop ! -user shop)"
check "the key is the old machine's" sha256sum -c --quiet key
check "it is root's alone" test "$(stat -c %a:%U /etc/keepd/keys/main.key)" = 600:root
check "the job is there with its schedule and the backups of before" bash -c 'keepctl --json list | python3 -c "import json, sys; assert len(json.load(sys.stdin)) >= 3"; keepctl --json status | python3 -c "import json, sys; j = json.load(sys.stdin)[\"jobs\"][0]; assert j[\"schedule\"] == \"30 2 1 1 *\" and j[\"runs_good\"] >= 3, j"'
check "a second bootstrap is refused" bash -c '! keepd rescue bootstrap --destination fs:/var/backups/keepd --kit /root/kit.py 2>/tmp/second && grep -q "exists" /tmp/second'
check "the service runs" systemctl is-active keepd.service
if [ $failures -gt 0 ]; then
    echo "--- the service's journal"; journalctl -q -u keepd.service --no-pager -o cat -n 60
    echo "$failures checks of the recovery failed"
    exit 1
fi
echo "every step of docs/disaster-recovery.md held"
