#!/bin/bash
# Boots a real systemd (Debian 13, systemd 257) in a container and runs one script in it as a unit.
#
# usage: nspawn.sh OVERLAY_DIR SCRIPT [SECONDS]
#   OVERLAY_DIR  is copied over the root first
#   SCRIPT       runs inside as root once the system is up; its output is printed, its exit code returned
# Exit code 125: this machine cannot (not root, no packages, no namespaces); the reason is printed.
# The root is made once under ${KEEPD_TEST_CACHE:-/var/tmp/keepd-test}; each call boots a copy and removes it.
set -eu
over=$1 script=$2 limit=${3:-180}
cache=${KEEPD_TEST_CACHE:-/var/tmp/keepd-test}
root=$cache/trixie
cannot() { echo "$*"; exit 125; }

[ "$(id -u)" = 0 ] || cannot "it needs root"
mkdir -p "$cache"
# Two test runs must not make the root at the same time.
exec 8>"$cache/lock"; flock 8
if ! command -v systemd-nspawn >/dev/null || ! command -v debootstrap >/dev/null; then
    command -v apt-get >/dev/null || cannot "systemd-nspawn and debootstrap are missing"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends systemd-container debootstrap; } >"$cache/apt.log" 2>&1 ||
        cannot "systemd-container and debootstrap cannot be installed: $(tail -1 "$cache/apt.log")"
fi
if [ ! -e "$root/.whole" ]; then
    rm -rf "$root"
    # The mirror this machine itself uses.
    mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources 2>/dev/null | head -1 | cut -d' ' -f1)
    [ -n "$mirror" ] || mirror=$(awk '/^deb /{ for (i = 2; i <= NF; i++) if ($i ~ /:\/\//) { print $i; exit } }' /etc/apt/sources.list 2>/dev/null)
    [ -n "$mirror" ] || cannot "no package mirror is configured here"
    debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,sqlite3,python3-minimal,procps trixie "$root" "$mirror" >"$cache/debootstrap.log" 2>&1 ||
        cannot "debootstrap failed: $(tail -1 "$cache/debootstrap.log")"
    touch "$root/.whole"
fi
flock -u 8

box=$(mktemp -d "$cache/box.XXXXXX")
trap 'rm -rf "$box"' EXIT
chmod 755 "$box"
cp -a --reflink=auto "$root/." "$box/"
# Owners of the overlay are root's, as a package's would be.
cp -dR --preserve=mode,timestamps "$over/." "$box/"
mkdir -p "$box/keepd-test"
install -m 755 "$script" "$box/keepd-test/run"
cat >"$box/etc/systemd/system/keepd-test.service" <<UNIT
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c '/keepd-test/run >/keepd-test/out 2>&1; echo \$? >/keepd-test/code'
ExecStopPost=/bin/systemctl --no-block poweroff
TimeoutStartSec=$limit
[Install]
WantedBy=default.target
UNIT
mkdir -p "$box/etc/systemd/system/default.target.wants"
ln -sf ../keepd-test.service "$box/etc/systemd/system/default.target.wants/keepd-test.service"
touch "$box/keepd-test/out"
timeout $((limit + 60)) systemd-nspawn -q -D "$box" --machine="keepd-test-$$" --boot --private-network --register=no --keep-unit \
    >"$cache/console.log" 2>&1 </dev/null || true
cat "$box/keepd-test/out"
if [ ! -s "$box/keepd-test/code" ]; then
    [ -s "$box/keepd-test/out" ] && { echo "(it did not end within $limit s)"; exit 1; }
    cannot "the container did not boot: $(tail -1 "$cache/console.log" | tr -d '\r')"
fi
exit "$(cat "$box/keepd-test/code")"
