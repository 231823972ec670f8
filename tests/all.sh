#!/bin/sh
# Every check and test: format, lint, the service under a real systemd, and last what cargo runs, with its own summary.
# A failure does not keep the rest from running; the exit code tells of any.
set -u
cd "$(dirname "$0")/.."
failed=

step() { # step NAME COMMAND…
    name=$1; shift
    echo "== $name"
    "$@" || { failed="$failed, $name"; echo "== $name: FAILED"; }
}

step "format" cargo fmt --all --check
step "lint" cargo clippy --workspace --all-targets --quiet -- -D warnings
step "build" cargo build --workspace --bins --quiet
if [ -x target/debug/keepd ] && [ -x target/debug/keepctl ]; then
    step "service under systemd" sh tests/systemd/run.sh target/debug
    step "disaster recovery, as documented" bash tests/systemd/recovery.sh target/debug
fi
step "tests" cargo test --workspace --no-fail-fast

[ -z "$failed" ] || { echo "FAILED: ${failed#, }"; exit 1; }
