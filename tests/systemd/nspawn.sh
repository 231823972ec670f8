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
cannot() { echo "$*"; exit 125; }

[ "$(id -u)" = 0 ] || cannot "it needs root"
. "$(dirname "$0")/root.sh"

box=$(mktemp -d "$cache/box.XXXXXX")
trap 'rm -rf "$box" "$box.console"' EXIT
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
# systemd-nspawn answers SIGTERM by waiting for the machine to go down, which one that hangs never does.
timeout -k 30 $((limit + 60)) systemd-nspawn -q -D "$box" --machine="keepd-test-$$" --boot --private-network --register=no --keep-unit \
    >"$box.console" 2>&1 </dev/null &
machine=$!
# Whoever is ended ends the machine, too.
trap 'kill "$machine" 2>/dev/null; wait "$machine" || true; exit 1' INT TERM
wait "$machine" || true
cat "$box/keepd-test/out"
if [ ! -s "$box/keepd-test/code" ]; then
    [ -s "$box/keepd-test/out" ] && { echo "(it did not end within $limit s)"; exit 1; }
    cannot "the container did not boot: $(tail -1 "$box.console" | tr -d '\r')"
fi
exit "$(cat "$box/keepd-test/code")"
