#!/bin/bash
# Inside the first container: the shop's machine as docs/disaster-recovery.md wants it prepared. What survives the fire goes out as text.
set -eu
cd /keepd-test
systemd-sysusers 2>/dev/null
systemd-tmpfiles --create 2>/dev/null
echo 'u shop - - /var/lib/shop' | systemd-sysusers - 2>/dev/null
install -d -o shop -g shop -m 0700 /var/lib/shop /var/lib/shop/uploads
as_shop() { setpriv --reuid shop --regid shop --clear-groups -- "$@"; }
as_shop sqlite3 /var/lib/shop/shop.db "pragma journal_mode = wal; create table orders (n integer, what text); with recursive c (n) as (select 1 union all select n + 1 from c where n < 5000) insert into orders select n, hex(randomblob(20)) from c;" >/dev/null
for n in $(seq 20); do head -c 30000 /dev/urandom >/var/lib/shop/uploads/$n.jpg; done
chown -R shop:shop /var/lib/shop; chmod 600 /var/lib/shop/uploads/*

rm -f /etc/keepd/keepd.toml
keepd key generate /etc/keepd/keys/main.key >/dev/null
cat - config.toml >/etc/keepd/keepd.toml <<'TOML'
[encryption.main]
key_file = "/etc/keepd/keys/main.key"

[job.shop]
schedule = "30 2 1 1 *"
destinations = ["disk"]
hooks = { before = ["/bin/true"] }

[[job.shop.source]]
name = "db"
sqlite = "/var/lib/shop/shop.db"

[[job.shop.source]]
files = "/var/lib/shop/uploads"

TOML
keepd --check
systemctl enable -q --now keepd.socket keepd.service
keepctl --no-progress backup shop >/dev/null
keepctl --no-progress backup shop >/dev/null
bash -eu commands
# The change that has the configuration stored with what the schedule knows by now.
before=$(ls /var/backups/keepd/config | wc -l)
echo "# The shop's machine." >>/etc/keepd/keepd.toml
keepctl reload >/dev/null
for _ in $(seq 100); do [ "$(ls /var/backups/keepd/config | wc -l)" -le "$before" ] || break; sleep 0.1; done
[ "$(ls /var/backups/keepd/config | wc -l)" -gt "$before" ] || { echo "no configuration was stored"; journalctl -u keepd --no-pager -o cat | tail; exit 1; }
systemctl stop keepd.socket keepd.service
echo "ok    the old machine is backed up, its kit is made: $(ls /var/backups/keepd/config | tail -1)"

mkdir -p rest/media/stick rest/var/backups rest/keepd-test
cp /root/kit.py rest/media/stick/
cp -a /var/backups/keepd rest/var/backups/
(cd /var/lib/shop && sqlite3 shop.db 'select * from orders order by n' | sha256sum; sha256sum uploads/*) >rest/keepd-test/truth
sha256sum /etc/keepd/keys/main.key >rest/keepd-test/key
echo "-----BEGIN"
tar -cz -C rest . | base64
echo "-----END"
