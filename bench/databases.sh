#!/bin/sh
# A PostgreSQL database of 1 GiB (the dump), first and after 1 % of its rows changed: keepd beside the same dump through zstd alone, restic and borg.
#
# usage: databases.sh [ROUNDS] [SCALE]      (3 rounds and scale 1 where nothing is said; about 20 minutes)
# Prints one table: seconds, CPU seconds of all processes, peak memory of the tool (without the server), bytes stored. Everything lies in
# bench/.work/databases and goes away with it; the server is one of its own, on a free port, and ends by its process id.
set -eu
cd "$(dirname "$0")/.."
sh tests/install-tools.sh test
sh bench/install-peers.sh
cargo build --release --workspace --bins
exec python3 bench/databases.py "${1:-3}" "${2:-1}"
