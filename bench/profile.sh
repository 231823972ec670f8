#!/bin/sh
# Where the CPU time of each step goes: `bench/profile.sh w1|w2|w3 [DATA]` with perf, for the whole machine (leave it alone).
# DATA holds w1/ w2/ … as bench/run.sh made them (default bench/.work/data). Shares are of the time that was not idle.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
workload=$1
data=${2:-$here/.work/data}
dir=$(mktemp -d "$here/.work/profile.XXXXXX")
bin=$here/../target/release
kind=files path=$data/$workload/src
[ "$workload" != w1 ] || { kind=sqlite; path=$path/app.db; }
"$bin/keepd" key generate "$dir/key" >/dev/null
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$here python3 -c '
import sys, keepd_tool
tmp, kind, path = sys.argv[1:]
print(keepd_tool.CONFIG.format(tmp=tmp, repo=tmp + "/repo", kind=kind, path=path))' "$dir" "$kind" "$path" >"$dir/keepd.toml"
"$bin/keepd" --config "$dir/keepd.toml" 2>"$dir/log" &
daemon=$!
trap 'kill $daemon 2>/dev/null; wait $daemon 2>/dev/null; python3 "$here/workloads.py" revert --root "$data/$workload" >/dev/null; rm -rf "$dir"' EXIT
ctl() { "$bin/keepctl" --socket "$dir/socket" --no-progress -q "$@" >/dev/null; }
for _ in $(seq 100); do ctl status 2>/dev/null && break; sleep 0.1; done

step() { # step NAME COMMAND…
    name=$1; shift
    find "$data/$workload/src" -type f -print0 | xargs -0 cat >/dev/null
    sync
    perf record -a -F 499 -o "$dir/perf" -- "$@" >/dev/null 2>&1
    perf report -i "$dir/perf" --no-children --sort sym 2>/dev/null | python3 -c '
import re, sys
groups = [("idle", r"halt|idle|mwait"), ("zstd compress", r"ZSTD_(compress|encode|seqTo|build|record|split|opt|ldm|count|update)|HUF_(compress|build|sort|CStream|estimate)|FSE_(compress|build|norm)|HIST|ZSTD_.*(Block|Fast)"),
          ("zstd decompress", r"ZSTD_decompress|ZSTD_decode|HUF_(de|read)|FSE_(de|read)"), ("BLAKE3", "blake3"), ("SHA-256", "sha2|sha256"),
          ("AES-GCM", "aes|polyval|ghash|ctr::|universal_hash|StreamCipher"), ("FastCDC", "cut_gear"), ("SQLite", r"sqlite|btree|checkTree|vdbe|pager|walF"),
          ("kernel: copying", r"\[k\] .*(copy_|_copy|memcpy|memmove)"), ("kernel: clearing and mapping pages", r"\[k\] .*(clear_page|fault|folio|alloc_pages|get_page|__pi_memset|free_unref|zap_|lru_|mmap|rmqueue)"),
          ("memory copies and compares", r"memmove|memcpy|memset|memcmp"), ("kernel: file system, everything else", r"\[k\]"), ("keepd itself", ".")]
sums = {}
for line in sys.stdin:
    m = re.match(r"\s*([0-9.]+)%\s+(.*)", line)
    if m:
        for name, pattern in groups:
            if re.search(pattern, m.group(2)):
                sums[name] = sums.get(name, 0) + float(m.group(1))
                break
busy = sum(v for k, v in sums.items() if k != "idle") or 1
parts = sorted(((v / busy * 100, k) for k, v in sums.items() if k != "idle"), reverse=True)
print("| %s | %s | %.0f %% |" % (sys.argv[1], ", ".join("%s %.0f %%" % (k, v) for v, k in parts if v >= 1.5), sums.get("idle", 0)))' "$name"
}
echo "| $workload | of the CPU time | idle |"; echo "|---|---|---|"
keepctl="$bin/keepctl --socket $dir/socket --no-progress -q"
step first $keepctl backup bench
step unchanged $keepctl backup bench
python3 "$here/workloads.py" mutate --root "$data/$workload" >/dev/null
step mutated $keepctl backup bench
step check $keepctl check local --read-data
step restore $keepctl restore latest --to "$dir/out"
