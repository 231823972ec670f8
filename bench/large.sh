#!/bin/sh
# A long history: `bench/large.sh [BACKUPS [CHUNKS]]`, 5,000 and 2,000,000 by default. Makes such a repository (minutes), then has a daemon
# that knows nothing of it learn it, list, decide about retention, remove the oldest hundredth of the backups and prune what that leaves dead.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
backups=${1:-5000} chunks=${2:-2000000}
mkdir -p "$here/.work"
dir=$(mktemp -d "$here/.work/large.XXXXXX")
bin=$here/../target/release
daemon=
trap '[ -z "$daemon" ] || { kill $daemon; wait $daemon; } 2>/dev/null; rm -rf "$dir"' EXIT
(cd "$here/.." && cargo build --release --workspace --bins --quiet && cargo bench --quiet --bench large --no-run)
step() { # step NAME COMMAND…
    name=$1; shift
    begin=$(date +%s.%N)
    "$@" >"$dir/out" 2>&1 || { cat "$dir/out"; exit 1; }
    end=$(date +%s.%N)
    peak=-
    [ -z "$daemon" ] || peak=$(awk '/VmHWM/ { printf "%.0f", $2 / 1024 }' "/proc/$daemon/status")
    echo "| $name | $(echo "$end $begin" | awk '{ printf "%.2f", $1 - $2 }') | $peak |"
}
echo "| $backups backups, $chunks chunks | s | daemon's highest resident memory so far, MiB |"; echo "|---|---|---|"
step "making it (not through the daemon)" sh -c "cd '$here/..' && cargo bench --quiet --bench large -- '$dir' $backups $chunks"
rm -rf "$dir/cache"
cat >"$dir/keepd.toml" <<T
[daemon]
state_dir = "$dir/state"
socket = "$dir/socket"
[destination.local]
service = "fs"
root = "$dir/repository"
encryption = "none"
prune_grace = "0s"
[job.bench]
every = "1h"
enabled = false
destinations = ["local"]
[[job.bench.source]]
files = "$dir/nothing"
T
"$bin/keepd" --config "$dir/keepd.toml" 2>"$dir/log" &
daemon=$!
ctl() { "$bin/keepctl" --socket "$dir/socket" --no-progress "$@"; }
known() { until [ "$(ctl list --json 2>/dev/null | grep -c '"job"')" = "$backups" ]; do sleep 0.1; done; }
step "catalogue of a lost state" known
step "list" ctl list
step "index rebuilt, one backup listed" ctl ls latest --job bench
step "the same again" ctl ls latest --job bench
step "retention, simulated with dates" ctl retention bench --keep-daily 30 --keep-monthly 12
step "check of the structure" ctl check local
sed -i "s/^every = .*/&\nretention = { keep_last = $((backups - backups / 100)) }/" "$dir/keepd.toml"
step "reload with a policy that removes a hundredth" ctl reload
step "prune with nothing dead, the first" ctl prune local
step "prune with nothing dead" ctl prune local
step "remove a hundredth and prune" ctl retention bench --apply --yes
step "prune with nothing dead" ctl prune local
step "check, every byte" ctl check local --read-data
