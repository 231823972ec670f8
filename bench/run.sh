#!/bin/sh
# Measures keepd beside the other programs of the field, on the same data, in one go, and prints one table for each workload.
#
# usage: bench/run.sh [WORKLOADS]        w1,w2,w3,w4 by default; a comma between them
#   BENCH_WORK   where data, repositories and results go (default bench/.work; 25 GB for all workloads, on one file system)
#   BENCH_RUNS   runs, medians are shown (default 3; order forward and backward in turn)
#   BENCH_SCALE  size of w1, w2 and w4 (default 1: 1.06 GiB, 100,000 and 1,000,000 files); w3 has half of it (2 GiB)
#   BENCH_TOOLS  names of bench/tools.toml and keepd, a comma between them
# Installs what it needs (bench/install-peers.sh: root, apt-get, cargo, pip) and builds keepd. Three hours for everything; leave
# the machine alone meanwhile. Results: results.json and report.md in BENCH_WORK; runs are added to what is there already.
set -eu
cd "$(dirname "$0")"
workloads=${1:-w1,w2,w3,w4}
work=${BENCH_WORK:-$PWD/.work}
scale=${BENCH_SCALE:-1}
tools=${BENCH_TOOLS:-keepd,restic,rustic,borg14,borg2,bupstash,conserve,tar-zstd-age}
mkdir -p "$work/data"
work=$(cd "$work" && pwd)
export PATH="$PWD/.peers/bin:$PATH" BENCH_DIRS="$work"

cargo build --release --locked --workspace --bins --quiet
sh install-peers.sh
for workload in $(echo "$workloads" | tr , ' '); do
    [ -e "$work/data/$workload/spec.json" ] && continue
    of=$scale
    [ "$workload" != w3 ] || of=$(python3 -c "print($scale / 2)")
    echo "making $workload at scale $of"
    rm -rf "$work/data/$workload"
    python3 workloads.py gen "$workload" --root "$work/data/$workload" --scale "$of" >/dev/null
done
python3 sidebyside.py run --data "$work/data" --work "$work/run" --plugin keepd_tool.py --tools "$tools" --workloads "$workloads" \
    --runs "${BENCH_RUNS:-3}" --out "$work/results.json" --append
python3 sidebyside.py report "$work/results.json" >"$work/report.md"
python3 against.py "$work/results.json" | tee -a "$work/report.md"
echo "everything: $work/report.md"
