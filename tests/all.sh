#!/bin/sh
# Every check and test: format, lint, the service under a real systemd, and last what cargo runs, with its own summary.
# A failure does not keep the rest from running; the exit code tells of any. Each step says how long it took, and is ended when it takes longer than it may.
set -u
cd "$(dirname "$0")/.."
failed=
running=
trap 'kill "$running" 2>/dev/null; wait; exit 1' INT TERM

step() { # step NAME MINUTES COMMAND…: limits are those of a slow and busy machine
    name=$1 minutes=$2; shift 2
    echo "== $name"
    began=$(date +%s) code=0
    # `timeout` has a process group of its own, which ^C does not reach: this shell waits, and passes it on. What it starts in the background ignores ^C, unless told otherwise.
    timeout -k 60 "${minutes}m" env --default-signal=INT,QUIT "$@" </dev/null & running=$!
    wait "$running" || code=$?
    running=
    took="$(($(date +%s) - began)) s"
    case $code in
        0) echo "== $name: $took" ;;
        124 | 137) failed="$failed, $name"; echo "== $name: FAILED: ended after $minutes minutes" ;;
        *) failed="$failed, $name"; echo "== $name: FAILED ($took)" ;;
    esac
}

step "format" 5 cargo fmt --all --check
step "lint" 60 cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
step "supply" 40 sh tests/supply/run.sh
# With the tests, so that what they need of other crates does not have everything built twice.
step "build" 60 cargo build --workspace --bins --tests --locked --quiet
if [ -x target/debug/keepd ] && [ -x target/debug/keepctl ]; then
    step "service under systemd" 30 bash tests/systemd/run.sh target/debug
    step "disaster recovery, as documented" 15 bash tests/systemd/recovery.sh target/debug
    step "power cuts" 20 bash tests/systemd/power.sh target/debug
fi
step "tests" 120 cargo test --workspace --locked --no-fail-fast

[ -z "$failed" ] || { echo "FAILED: ${failed#, }"; exit 1; }
