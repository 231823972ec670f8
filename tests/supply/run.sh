#!/bin/sh
# What keepd is built from and how: the lockfile, licences, sources and versions of what it depends on, advisories where their data can be had, `unsafe`, overflow checks.
# docs/supply.md says what each of these is for.
set -u
cd "$(dirname "$0")/../.."
export LC_ALL=C.UTF-8
cache=${KEEPD_TEST_CACHE:-/var/tmp/keepd-test}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

check() { # check WHAT COMMAND…
    what=$1; shift
    if "$@" >"$work/out" 2>&1; then echo "ok    $what"; else echo "FAIL  $what"; sed 's/^/      /' "$work/out" | tail -60; failures=$((failures + 1)); fi
}
loudly() {
    echo "********************************************************************************"
    echo "NOT LOOKED AT: $*"
    echo "********************************************************************************"
}

# ---- the lockfile ----------------------------------------------------------------------------------------------------------
# Also where the tree is somebody else's than who tests it; sources that were unpacked have no repository.
if [ -e .git ] && command -v git >/dev/null; then
    check "Cargo.lock is in the repository" git -c safe.directory="$PWD" ls-files --error-unmatch Cargo.lock fuzz/Cargo.lock
else
    check "Cargo.lock is there" test -s Cargo.lock
fi
check "Cargo.lock fits every Cargo.toml" cargo metadata --locked --format-version 1
check "and that of the fuzzers theirs" cargo metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml
# By checksum, from the one registry: neither git nor a path outside.
from_registry() {
    packages=$(grep -c '^name = ' Cargo.lock); sums=$(grep -c '^checksum = ' Cargo.lock); own=$(cargo metadata --locked --no-deps --format-version 1 | python3 -c 'import json, sys; print(len(json.load(sys.stdin)["packages"]))')
    echo "$packages packages, $own of them ours, $sums with a checksum"
    [ "$packages" = $((own + sums)) ]
}
check "every dependency has a checksum: $(from_registry)" from_registry

# ---- licences, sources, versions, advisories ---------------------------------------------------------------------------------
# One version, so that what is found depends on what is looked at alone: another one may want a newer compiler, or read deny.toml otherwise.
deny_version=0.20.2
is_right() { [ -x "$1" ] && [ "$("$1" --version 2>/dev/null)" = "cargo-deny $deny_version" ]; }
deny=$(command -v cargo-deny || true)
if ! is_right "$deny"; then
    deny=$cache/deny/bin/cargo-deny
    mkdir -p "$cache"
    # Two test runs must not build it at the same time. Below the cache, for /tmp may be small, or in memory.
    exec 9>"$cache/deny.lock"; flock 9
    if ! is_right "$deny"; then
        echo "      cargo-deny $deny_version is not here: building it into $cache/deny, once"
        cargo install --quiet --locked --debug --force --version "=$deny_version" --root "$cache/deny" --target-dir "$cache/deny/target" cargo-deny >"$cache/deny.log" 2>&1 || true
        rm -rf "$cache/deny/target"
    fi
    exec 9>&-
fi
if is_right "$deny"; then
    check "cargo deny: licences, sources, versions" "$deny" --locked --all-features check --deny warnings licenses bans sources
    check "cargo deny: where what the fuzzers add comes from" "$deny" --locked --config "$PWD/deny.toml" --manifest-path fuzz/Cargo.toml check --deny warnings sources
    for manifest in Cargo.toml fuzz/Cargo.toml; do
        if "$deny" --locked --config "$PWD/deny.toml" --manifest-path $manifest --all-features check advisories >"$work/out" 2>&1; then
            echo "ok    cargo deny: no advisory ($manifest)"
        elif grep -q 'failed to fetch advisory database\|failed to load advisory database' "$work/out"; then
            loudly "advisories. Their database cannot be had here: $(grep -m1 'unable to access\|ERROR' "$work/out" | cut -c1-200)"
            break
        else
            check "cargo deny: no advisory ($manifest)" sh -c 'cat "$1"; false' - "$work/out"
        fi
    done
    if command -v cargo-audit >/dev/null; then
        if cargo audit --quiet >"$work/audit" 2>&1; then echo "ok    cargo audit"
        elif grep -q "couldn't fetch advisory database" "$work/audit"; then loudly "cargo audit: the same database"
        else check "cargo audit" sh -c 'cat "$1"; false' - "$work/audit"; fi
    fi
else
    loudly "licences, sources, versions, advisories. cargo-deny cannot be had: $(tail -1 "$cache/deny.log")"
    [ -z "${KEEPD_REQUIRE_SUPPLY:-}" ] || failures=$((failures + 1))
fi

python3 tests/supply/yanked.py Cargo.lock fuzz/Cargo.lock >"$work/yanked" 2>&1
case $? in
    0) echo "ok    $(cat "$work/yanked")" ;;
    3) loudly "withdrawn versions: $(cat "$work/yanked")" ;;
    *) check "no version was withdrawn" sh -c 'cat "$1"; false' - "$work/yanked" ;;
esac

# ---- our own code ------------------------------------------------------------------------------------------------------------
if python3 tests/supply/own_code.py; then :; else failures=$((failures + 1)); fi

# A program with the release profile of Cargo.toml, as it stands there, adds one to the largest number.
overflows() { # overflows PROFILE EXIT_CODE
    mkdir -p "$work/sum/src"
    { printf '[package]\nname = "sum"\nedition = "2024"\n\n[workspace]\n\n'; printf '%s\n' "$1"; } >"$work/sum/Cargo.toml"
    echo 'fn main() { println!("{}", std::hint::black_box(u32::MAX) + std::hint::black_box(1)); }' >"$work/sum/src/main.rs"
    cargo run --quiet --release --offline --manifest-path "$work/sum/Cargo.toml" --target-dir "$work/sum/target" >"$work/sum/out" 2>&1
    code=$?
    cat "$work/sum/out"
    [ $code = "$2" ]
}
profile=$(awk '/^\[/ { inside = /^\[profile\.release/ } inside' Cargo.toml)
check "a number too large ends what it is reckoned for in a release, too" overflows "$profile" 101
check "which is the profile's doing" overflows "" 0

[ $failures = 0 ] || { echo "$failures checks of the supply failed"; exit 1; }
