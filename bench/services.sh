#!/bin/sh
# A database's first backup and its restore, to a directory and to an S3 server on the loopback interface, in turn: `bench/services.sh DATABASE [ROUNDS]`.
# The server is rclone of .venv; S3_SERVER='s3s-fs --host 127.0.0.1 --port 9201 --access-key AKID --secret-key SECRETKEY' (the directory is
# added) takes another one on that port. Then how evenly a bandwidth is kept, by the counters every half second.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
db=$(realpath "${1:?usage: bench/services.sh DATABASE [ROUNDS]}") rounds=${2:-3}
bin=$here/../target/release
server=${S3_SERVER:-$here/../.venv/bin/rclone serve s3 --addr 127.0.0.1:9201 --auth-key AKID,SECRETKEY}
mkdir -p "$here/.work"
dir=$(mktemp -d "$here/.work/services.XXXXXX")
daemon= served=
stop() { for pid in $daemon $served; do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null; done; daemon= served=; return 0; }
trap 'stop; rm -rf "$dir"' EXIT
start() { # start DESTINATION SOURCE [LINE]
    stop
    rm -rf "$dir"/*; mkdir -p "$dir/s3/bucket"; printf SECRETKEY >"$dir/secret"; "$bin/keepd" key generate "$dir/key" >/dev/null
    $server "$dir/s3" >"$dir/server.log" 2>&1 & served=$!
    cat >"$dir/keepd.toml" <<T
[daemon]
state_dir = "$dir/state"
socket = "$dir/socket"
[encryption.main]
key_file = "key"
[destination.fs]
service = "fs"
root = "$dir/repository"
encryption = "main"
[destination.s3]
service = "s3"
bucket = "bucket"
endpoint = "http://127.0.0.1:9201"
region = "us-east-1"
access_key_id = "AKID"
secret_access_key = { file = "secret" }
encryption = "main"
[job.bench]
destinations = ["$1"]
[[job.bench.source]]
$2
T
    [ -z "${3:-}" ] || sed -i "s|^encryption = \"main\"|&\n$3|" "$dir/keepd.toml"
    "$bin/keepd" --config "$dir/keepd.toml" 2>"$dir/log" & daemon=$!
    sleep 2
}
ctl() { "$bin/keepctl" --socket "$dir/socket" --no-progress -q "$@"; }
seconds() { begin=$(date +%s.%N); "$@"; end=$(date +%s.%N); echo "$end $begin" | awk '{ printf "%.2f", $1 - $2 }'; }
cpu() { awk '{ printf "%.1f", ($14 + $15) / 100 }' "/proc/$1/stat"; }
echo "| | backup, s | restore, s | keepd's CPU time after the backup, s | the server's | keepd's highest memory, MiB |"; echo "|---|---|---|---|---|---|"
for _ in $(seq "$rounds"); do
    for where in fs s3; do
        start $where "sqlite = \"$db\""
        first=$(seconds ctl backup bench); mine=$(cpu $daemon) theirs=$(cpu $served)
        again=$(seconds ctl restore latest --to "$dir/out")
        echo "| $where | $first | $again | $mine | $theirs | $(awk '/VmHWM/ { printf "%.0f", $2 / 1024 }' "/proc/$daemon/status") |"
    done
done
for where in fs s3; do
    mkdir -p "$here/.work/noise"; head -c 40000000 /dev/urandom >"$here/.work/noise/file"
    start $where "files = \"$here/.work/noise\"" 'bandwidth = "5MiB/s"'
    ctl backup bench & backup=$!
    sleep 1
    python3 - "$bin/keepctl" "$dir/socket" $where $backup <<'P'
import json, os, subprocess, sys, time
ctl, socket, where, pid = sys.argv[1:]
sent = lambda: next(d for d in json.loads(subprocess.check_output([ctl, "--socket", socket, "destination", "list", "--json"])) if d["name"] == where)["traffic"]["sent"]
rates, last, since = [], sent(), time.time()
while os.path.exists(f"/proc/{pid}/status") and " Z " not in open(f"/proc/{pid}/stat").read() and len(rates) < 12:
    time.sleep(0.5)
    now, t = sent(), time.time()
    rates.append((now - last) / (t - since) / 2**20)
    last, since = now, t
print(f"bandwidth = 5 MiB/s to {where}, each half second: {min(rates):.2f} to {max(rates):.2f}")
P
    wait $backup
done
rm -rf "$here/.work/noise"
