#!/bin/sh
# libFuzzer on each target of fuzz/src for FUZZ_SECONDS (60), one after the other; FUZZ_TARGETS names some of them. What breaks something stays in fuzz/artifacts; with FUZZ_KEEP=1
# what reaches something new stays in fuzz/corpus. Ends with a table, and an exit status other than 0 where anything broke.
#
# Takes the stable toolchain (the sanitizers' flags want RUSTC_BOOTSTRAP) and a C++ compiler; cargo-fuzz is installed into FUZZ_TOOLS (fuzz/.tools) where it is missing. The build goes
# to CARGO_TARGET_DIR (fuzz/target).
set -eu
cd "$(dirname "$0")/.."
seconds=${FUZZ_SECONDS:-60}
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
$fuzz fuzz build --release --target-dir "$into" keepd
echo "built in $(($(date +%s) - began)) s"
program=
for program in "$into"/*/release/keepd; do [ -x "$program" ] && break; done
[ -x "$program" ] || { echo "there is no program in $into" >&2; exit 1; }
targets=${FUZZ_TARGETS:-$(sed -n 's/^    ("\([a-z_]*\)", .*/\1/p' fuzz/src/lib.rs)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
mkdir -p fuzz/artifacts
printf '%-18s %12s %8s %8s %8s %8s %s\n' target executions exec/s cov ft MiB broke >"$work/table"
broken=0
for target in $targets; do
    mkdir -p "fuzz/corpus/$target" "fuzz/regressions/$target" "$work/$target"
    status=0
    # 1 GiB at once is what a length that somebody changed would take.
    KEEPD_FUZZ_TARGET=$target $program "$work/$target" "fuzz/corpus/$target" "fuzz/regressions/$target" -max_total_time="$seconds" -max_len=16384 -rss_limit_mb=3072 \
        -malloc_limit_mb=1024 -timeout=30 -print_final_stats=1 -verbosity=1 -artifact_prefix="fuzz/artifacts/$target-" >"$work/$target.log" 2>&1 || status=$?
    stat() { sed -n "s/^stat::$1: *//p" "$work/$target.log" | tail -n 1; }
    last() { grep -o " $1: [0-9]*" "$work/$target.log" | tail -n 1 | tr -dc 0-9; }
    broke=no
    if [ $status != 0 ]; then broke=YES; broken=1; tail -n 40 "$work/$target.log" >&2; fi
    printf '%-18s %12s %8s %8s %8s %8s %s\n' "$target" "$(stat number_of_executed_units)" "$(stat average_exec_per_sec)" "$(last cov)" "$(last ft)" "$(stat peak_rss_mb)" $broke >>"$work/table"
    # What reaches something new, and no more of it than that.
    mkdir "$work/$target.small"
    KEEPD_FUZZ_TARGET=$target $program -merge=1 -max_len=16384 "$work/$target.small" "fuzz/corpus/$target" "$work/$target" >"$work/$target.merge" 2>&1 || true
    [ -z "${FUZZ_KEEP:-}" ] || for input in "$work/$target.small"/*; do
        [ ! -e "$input" ] || [ "$(wc -c <"$input")" -gt 4096 ] || cp "$input" "fuzz/corpus/$target/"
    done
    tail -n 1 "$work/table"
done
echo; cat "$work/table"
exit $broken
