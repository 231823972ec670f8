#!/bin/sh
# libFuzzer on each target of fuzz/src for FUZZ_SECONDS (60), one after the other; FUZZ_TARGETS names some of them. What breaks something stays in fuzz/artifacts; with FUZZ_KEEP=1
# what reaches code that the corpus does not reach stays in fuzz/corpus (and takes python3). Ends with a table, and an exit status other than 0 where anything broke.
#
# Takes the stable toolchain (the sanitizers' flags want RUSTC_BOOTSTRAP) and a C++ compiler; cargo-fuzz is installed into FUZZ_TOOLS (fuzz/.tools) where it is missing. The build goes
# to CARGO_TARGET_DIR (fuzz/target).
set -eu
cd "$(dirname "$0")/.."
seconds=${FUZZ_SECONDS:-60}
# A corpus is replayed by every 'make test': so many inputs more for a target, none of them longer.
most=40 longest=4096
export RUSTC_BOOTSTRAP=1 ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:${ASAN_OPTIONS:-}"

if command -v cargo-fuzz >/dev/null 2>&1; then fuzz=cargo-fuzz; else
    tools=${FUZZ_TOOLS:-fuzz/.tools}
    fuzz=$tools/bin/cargo-fuzz
    [ -x "$fuzz" ] || CARGO_TARGET_DIR=$tools/target cargo install cargo-fuzz --version 0.13.2 --locked --quiet --root "$tools"
fi
into=${CARGO_TARGET_DIR:-fuzz/target}
# cargo-fuzz hands no --locked on.
cargo metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml >/dev/null
began=$(date +%s)
# One unit for a crate, as it builds otherwise, leaves all but one processor idle for the crates that take longest.
"$fuzz" fuzz build --release --codegen-units 16 --target-dir "$into" keepd
echo "built in $(($(date +%s) - began)) s"
program=
for program in "$into"/*/release/keepd; do [ -x "$program" ] && break; done
[ -x "$program" ] || { echo "there is no program in $into" >&2; exit 1; }
targets=${FUZZ_TARGETS:-$(sed -n 's/^    ("\([a-z_]*\)", .*/\1/p' fuzz/src/lib.rs)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
mkdir -p fuzz/artifacts
row() { printf '%-18s %12s %8s %10s %8s %8s %6s %5s %s\n' "$@"; }
row target executions exec/s 'cov before' cov ft MiB kept broke >"$work/table"
broken=0
for target in $targets; do
    corpus=fuzz/corpus/$target regressions=fuzz/regressions/$target found=$work/$target
    mkdir -p "$corpus" "$regressions" "$found"
    status=0
    # 1 GiB at once is what a length that somebody changed would take.
    KEEPD_FUZZ_TARGET=$target "$program" "$found" "$corpus" "$regressions" -max_total_time="$seconds" -max_len=16384 -rss_limit_mb=3072 \
        -malloc_limit_mb=1024 -timeout=30 -print_final_stats=1 -verbosity=1 -artifact_prefix="fuzz/artifacts/$target-" >"$found.log" 2>&1 || status=$?
    stat() { sed -n "s/^stat::$1: *//p" "$found.log" | tail -n 1; }
    first() { sed -n "s/^#[0-9]*[[:space:]]*INITED.* $1: \([0-9]*\).*/\1/p" "$found.log"; }
    last() { sed -n "s/^#[0-9]*[[:space:]].* $1: \([0-9]*\).*/\1/p" "$found.log" | tail -n 1; }
    broke=no
    if [ $status != 0 ]; then broke=YES; broken=1; tail -n 40 "$found.log" >&2; fi
    kept=0
    if [ -n "${FUZZ_KEEP:-}" ]; then
        # What reaches an edge that the corpus does not reach; how often it was reached does not count.
        mkdir "$found.merged"
        KEEPD_FUZZ_TARGET=$target "$program" -merge=1 -set_cover_merge=1 -use_counters=0 -max_len=16384 -merge_control_file="$found.control" "$found.merged" "$corpus" "$found" \
            >"$found.merge" 2>&1 || tail -n 40 "$found.merge" >&2
        kept=$(python3 fuzz/keep.py "$found.control" "$corpus" $most $longest) || { broken=1 kept=0; }
    fi
    rmdir "$regressions" 2>/dev/null || true
    set -- "$(stat number_of_executed_units)" "$(stat average_exec_per_sec)" "$(first cov)" "$(last cov)" "$(last ft)" "$(stat peak_rss_mb)"
    row "$target" "${1:--}" "${2:--}" "${3:--}" "${4:--}" "${5:--}" "${6:--}" $kept $broke >>"$work/table"
    tail -n 1 "$work/table"
done
echo; cat "$work/table"
exit $broken
