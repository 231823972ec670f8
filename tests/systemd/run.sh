#!/bin/bash
# keepd as a service under a real systemd: installed by `make install`, started, reloaded, watched, stopped (inside.sh); frozen, killed, replaced (trouble.sh).
#
# usage: run.sh BINARIES_DIR [SCRIPT…]        the scripts are inside.sh and trouble.sh by default; each has a machine of its own, side by side
# Skipped, loudly, where no container can be booted; KEEPD_REQUIRE_SYSTEMD=1 makes that a failure.
set -eu
binaries=$1; shift
[ $# -gt 0 ] || set -- inside.sh trouble.sh
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
what="the tests of the service under systemd"
. "$here/skipped.sh"
[ -x "$binaries/keepd" ] || { echo "$binaries/keepd is missing: cargo build --workspace --bins"; exit 1; }
[ "$(id -u)" = 0 ] || skipped "they need root"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
over=$work/over
mkdir -m 755 "$over" # it becomes the root directory
if ! make --no-print-directory install DESTDIR="$over" BINARIES="$binaries" >"$work/install.log" 2>&1; then cat "$work/install.log"; exit 1; fi
# The sample is for people; the tests bring their own.
rm -f "$over/etc/keepd/keepd.toml"
mkdir -p "$over/keepd-test"
cp "$here/writer.py" "$here/checks.sh" "$over/keepd-test/"
trap 'kill $(cat "$work"/*.pid) 2>/dev/null; wait || true; exit 1' INT TERM
for script; do bash "$here/nspawn.sh" "$over" "$here/$script" 420 >"$work/$script.out" 2>&1 & echo $! >"$work/$script.pid"; done
# All of them have ended before any is judged: what one needs is removed below.
worst=0 cannot=
for script; do
    code=0
    wait "$(cat "$work/$script.pid")" || code=$?
    if [ "$code" = 125 ]; then cannot=$script; continue; fi
    echo "-- $script"; cat "$work/$script.out"
    [ "$code" = 0 ] || worst=$code
done
[ "$worst" = 0 ] || exit "$worst"
[ -z "$cannot" ] || skipped "$cannot: $(cat "$work/$cannot.out")"
