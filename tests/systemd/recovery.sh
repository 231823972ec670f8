#!/bin/bash
# The commands of docs/disaster-recovery.md, from a machine with an application to an empty one with the same application: two containers with a real
# systemd, of which the second one has nothing but what `make install` puts there, the destination and the recovery kit.
#
# usage: recovery.sh BINARIES_DIR
# Skipped, loudly, where no container can be booted; KEEPD_REQUIRE_SYSTEMD=1 makes that a failure.
set -eu
binaries=$1
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
what="the test of docs/disaster-recovery.md"
. "$here/skipped.sh"
[ -x "$binaries/keepd" ] || { echo "$binaries/keepd is missing: cargo build --workspace --bins"; exit 1; }
[ "$(id -u)" = 0 ] || skipped "it needs root"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The fenced blocks of the document with this word behind their language.
blocks() { awk -v word="$1" '/^```/ { inside = !inside && $2 == word; next } inside' docs/disaster-recovery.md; }

machine() { # machine NAME SCRIPT: boots one of its own; what it says is in $work/NAME.out
    local over=$work/$1 code=0
    mkdir -p "$over/keepd-test" "$over/etc"
    chmod 755 "$over"
    if ! make --no-print-directory install DESTDIR="$over" BINARIES="$binaries" >"$work/install.log" 2>&1; then cat "$work/install.log"; exit 1; fi
    # Each is a machine of its own.
    head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$over/etc/machine-id"; echo >>"$over/etc/machine-id"
    bash "$here/nspawn.sh" "$over" "$here/$2" 180 >"$work/$1.out" 2>&1 || code=$?
    [ "$code" != 125 ] || skipped "$(cat "$work/$1.out")"
    return $code
}

for word in run before; do
    [ "$(blocks $word | wc -l)" -ge 3 ] || { echo "docs/disaster-recovery.md has no blocks marked '$word'"; exit 1; }
done

mkdir -p "$work/old/keepd-test"
blocks before >"$work/blocks"
# Of TOML what comes before the first command.
sed '/^keepctl/,$d' "$work/blocks" >"$work/old/keepd-test/config.toml"
sed -n '/^keepctl/,$p' "$work/blocks" >"$work/old/keepd-test/commands"
if ! machine old recovery-old.sh; then cat "$work/old.out"; echo "FAIL  the old machine"; exit 1; fi
sed '/^-----BEGIN/,$d' "$work/old.out"

# The fire: the disk and the stick are all there is.
mkdir -p "$work/new/keepd-test"
sed -n '/^-----BEGIN/,/^-----END/{/^-----/!p}' "$work/old.out" | base64 -d | tar -xz -C "$work/new"
blocks run >"$work/new/keepd-test/commands"
code=0
machine new recovery-new.sh || code=$?
cat "$work/new.out"
exit "$code"
