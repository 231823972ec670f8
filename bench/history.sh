#!/bin/sh
# restic's and rustic's side of bench/large.sh: `bench/history.sh [BACKUPS [CHUNKS]]`, 500 and 200,000 by default (each backup takes them half a second,
# most of it for the key). A repository of rustic with as many snapshots, each with its share of new files of a hundred bytes; then list, a simulated
# retention, check, a lost index, and the oldest hundredth removed and pruned, by rustic and by restic (the repository is the same for both).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
backups=${1:-500} chunks=${2:-200000}
mkdir -p "$here/.work"
dir=$(mktemp -d "$here/.work/history.XXXXXX")
trap 'rm -rf "$dir"' EXIT
export RUSTIC_REPOSITORY="$dir/repository" RUSTIC_PASSWORD=x RUSTIC_NO_PROGRESS=true RUSTIC_LOG_LEVEL=error RUSTIC_CACHE_DIR="$dir/cache-rustic"
export RESTIC_REPOSITORY="$dir/repository" RESTIC_PASSWORD=x RESTIC_CACHE_DIR="$dir/cache-restic"
rustic=$here/.peers/bin/rustic restic=$here/.peers/bin/restic
each=$((chunks / backups))
$rustic init >/dev/null
python3 - "$dir/data" "$backups" "$each" "$rustic" <<'P'
import os, subprocess, sys
data, backups, each, rustic = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
for n in range(backups):
    # The last one's files and new ones, as keepd's history has them.
    os.makedirs(f"{data}/{n}")
    for i in range(each):
        with open(f"{data}/{n}/{i}", "wb") as file:
            file.write(os.urandom(100))
    if n > 1:
        subprocess.run(["rm", "-r", f"{data}/{n - 2}"], check=True)
    subprocess.run([rustic, "backup", data], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
P
step() { # step NAME COMMAND…
    name=$1; shift
    /usr/bin/time -f "| $name | %e | %M |" -o "$dir/time" "$@" >"$dir/out" 2>&1 || { cat "$dir/out"; exit 1; }
    awk -F'|' '{ printf "|%s|%s| %.0f |\n", $2, $3, $4 / 1024 }' "$dir/time"
}
echo "| $backups backups, $chunks files | s | memory, MiB |"; echo "|---|---|---|"
cp -r "$dir/repository" "$dir/first"
keep=$((backups - backups / 100))
for tool in rustic restic; do
    rm -rf "$dir/repository" "$dir/cache-$tool"; cp -r "$dir/first" "$dir/repository"
    bin=$here/.peers/bin/$tool
    step "$tool: list" "$bin" snapshots
    step "$tool: list again, cached" "$bin" snapshots
    step "$tool: retention, simulated" "$bin" forget --dry-run --keep-daily 30 --keep-monthly 12
    step "$tool: check of the structure" "$bin" check
    rm -r "$dir/repository/index"; mkdir "$dir/repository/index"
    step "$tool: a lost index" "$bin" repair index
    step "$tool: the oldest hundredth forgotten" "$bin" forget --keep-last "$keep"
    if [ $tool = rustic ]; then step "$tool: prune" "$bin" prune --keep-delete 0s --instant-delete; else step "$tool: prune" "$bin" prune; fi
done
