#!/bin/sh
# restic's and rustic's side of bench/large.sh: `bench/history.sh [BACKUPS [CHUNKS]]`, 5,000 and 2,000,000 by default. A repository of rustic with as many
# snapshots, an hour apart, each with its share of new files of a hundred bytes and those of the one before; then list, a simulated retention, check, a lost index, a prune with
# nothing dead, and the oldest hundredth removed and pruned, by rustic and by restic (the repository is the same for both).
# It is made with the master key, so that no backup derives one from a password, and with the index and snapshots of a hundred backups at a time, so that none loads all of them.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
backups=${1:-5000} chunks=${2:-2000000}
mkdir -p "$here/.work"
dir=$(mktemp -d "$here/.work/history.XXXXXX")
# ext4 goes by the inodes of recently deleted files, ever more slowly.
data=$(mktemp -d /dev/shm/history.XXXXXX)
trap 'rm -rf "$dir" "$data"' EXIT
export RUSTIC_REPOSITORY="$dir/repository" RUSTIC_PASSWORD=x RUSTIC_NO_PROGRESS=true RUSTIC_LOG_LEVEL=error RUSTIC_CACHE_DIR="$dir/cache-rustic"
export RESTIC_REPOSITORY="$dir/repository" RESTIC_PASSWORD=x RESTIC_CACHE_DIR="$dir/cache-restic"
rustic=$here/.peers/bin/rustic restic=$here/.peers/bin/restic
each=$((chunks / backups))
$rustic init >/dev/null
key=$($rustic key export)
env -u RUSTIC_PASSWORD RUSTIC_KEY="$key" python3 - "$dir" "$data" "$backups" "$each" "$rustic" <<'P'
import os, shutil, subprocess, sys, time
dir, data, backups, each, rustic = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
start = int(time.time()) - backups * 3600
parts = [(f"{dir}/repository/{name}", f"{dir}/{name}") for name in ("index", "snapshots")]
for _, aside in parts:
    os.mkdir(aside)
def move(place, aside):
    for below, _, names in os.walk(place):
        for name in names:
            os.rename(os.path.join(below, name), os.path.join(aside, name))
for n in range(backups):
    # The last one's files and new ones, as keepd's history has them.
    os.makedirs(f"{data}/{n}")
    for i in range(each):
        with open(f"{data}/{n}/{i}", "wb") as file:
            file.write(os.urandom(100))
    if n > 1:
        shutil.rmtree(f"{data}/{n - 2}")
    when = time.strftime("%Y-%m-%d %H:%M:%S+0000", time.gmtime(start + n * 3600))
    subprocess.run([rustic, "backup", "--no-scan", "--time", when, data], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if n % 100 == 99:
        for place, aside in parts:
            move(place, aside)
for place, aside in parts:
    move(aside, place)
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
    step "$tool: prune with nothing dead" "$bin" prune
    step "$tool: the oldest hundredth forgotten" "$bin" forget --keep-last "$keep"
    if [ $tool = rustic ]; then step "$tool: prune" "$bin" prune --keep-delete 0s --instant-delete; else step "$tool: prune" "$bin" prune; fi
done
