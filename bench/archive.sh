#!/bin/sh
# Export and import of portable archives, beside `tar | gzip` and `tar | zstd -3 -T2` of the same bytes: a database (w1) and many files (w2).
#
# usage: archive.sh [ROUNDS] [SCALE]      (3 rounds and scale 1, which is 1 GiB each, where nothing is said)
# Prints seconds, the ratio to tar through the same compression, the daemon's peak memory and the archive's size. Everything lies in bench/.work.
set -eu
cd "$(dirname "$0")/.."
sh tests/install-tools.sh test
cargo build --release --workspace --bins
exec python3 bench/archive.py "${1:-3}" "${2:-1}"
