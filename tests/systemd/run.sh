#!/bin/bash
# keepd as a service under a real systemd: installed by `make install`, started, reloaded, watched, stopped.
#
# usage: run.sh BINARIES_DIR
# Skipped, loudly, where no container can be booted; KEEPD_REQUIRE_SYSTEMD=1 makes that a failure.
set -eu
binaries=$1
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
what="the tests of the service under systemd"
. "$here/skipped.sh"
[ "$(id -u)" = 0 ] || skipped "they need root"

over=$(mktemp -d)
chmod 755 "$over" # it becomes the root directory
trap 'rm -rf "$over"' EXIT
if ! make --no-print-directory install DESTDIR="$over" BINARIES="$binaries" >"$over/install.log" 2>&1; then cat "$over/install.log"; exit 1; fi
rm "$over/install.log"
# The sample is for people; the tests bring their own.
rm -f "$over/etc/keepd/keepd.toml"
mkdir -p "$over/keepd-test"
cp "$here/writer.py" "$over/keepd-test/"
code=0
bash "$here/nspawn.sh" "$over" "$here/inside.sh" 420 >"$over/out" 2>&1 || code=$?
[ "$code" != 125 ] || skipped "$(cat "$over/out")"
cat "$over/out"
exit "$code"
