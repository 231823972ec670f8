#!/bin/sh
# Installs the programs keepd is measured against into bench/.peers, and nothing into the system but Debian packages they are
# built with. What cannot be had here is told and left out of the table; does nothing for what is already there.
#
# usage: install-peers.sh
# Assumes Debian or a child of it (apt-get as root), cargo, a C compiler, python3 with venv.
set -eu
cd "$(dirname "$0")"
peers=$PWD/.peers
mkdir -p "$peers/bin" "$peers/log"
export PATH="$peers/bin:$PATH"

have() { command -v "$1" >/dev/null 2>&1; }
note() { echo "install-peers: $*" >&2; }
apt() { DEBIAN_FRONTEND=noninteractive apt-get "$@"; }
attempt() { # attempt NAME COMMAND… : runs it, its output in a log; a failure is told and not fatal
    name=$1; shift
    note "installing $name"
    # Not "… || note": that would have the shell go on after a failure within.
    set +e
    (set -e; "$@") >"$peers/log/$name" 2>&1
    code=$?
    set -e
    [ "$code" = 0 ] || note "$name could not be installed; see bench/.peers/log/$name"
}

packages=
for pair in zstd:zstd age:age sqlite3:sqlite3 pkg-config:pkg-config b3sum:b3sum; do have "${pair%%:*}" || packages="$packages ${pair##*:}"; done
for library in libsodium libacl libssl liblz4 libzstd libxxhash; do
    pkg-config --exists "$library" 2>/dev/null || case $library in
        libacl) packages="$packages libacl1-dev" ;;
        libssl) packages="$packages libssl-dev" ;;
        *) packages="$packages $library-dev" ;;
    esac
done
if [ -n "$packages" ]; then
    apt update -q >"$peers/log/apt" 2>&1 || true
    # shellcheck disable=SC2086
    attempt apt-packages apt install -y -q --no-install-recommends $packages
fi

# restic: this release of Debian holds it years back. The newest one is a static program, so the package of unstable is
# unpacked beside us, from the mirror that apt uses already; its list goes into a directory of ours.
newest_restic() {
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' 'Origin: Debian' | head -1)
    [ -n "$mirror" ] || return 1
    state=$(mktemp -d)
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$state/parts"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [signed-by=$keyring] $mirror sid main" >"$state/sources"
    set -- -o Dir::Etc::sourcelist="$state/sources" -o Dir::Etc::sourceparts="$state/parts" -o Dir::State::lists="$state/lists" \
        -o Dir::Cache="$state/cache" -o APT::Sandbox::User=root
    # Unstable may be signed with a key this release does not know yet: the download is then refused, and so are we.
    apt-get "$@" update
    (cd "$state" && apt-get "$@" download restic && dpkg-deb -x restic_*.deb unpacked)
    cp "$state/unpacked/usr/bin/restic" "$peers/bin/restic"
    rm -rf "$state"
    "$peers/bin/restic" version
}
[ -x "$peers/bin/restic" ] || attempt restic newest_restic
[ -x "$peers/bin/restic" ] || have restic || attempt restic-of-this-release apt install -y -q --no-install-recommends restic

# borg, each in an environment of its own.
borg() { # borg DIRECTORY COMMAND REQUIREMENT
    python3 -m venv "$peers/$1"
    "$peers/$1/bin/pip" install --quiet --disable-pip-version-check "$3"
    ln -sf "$peers/$1/bin/$2" "$peers/bin/$2"
    "$peers/bin/$2" --version
}
[ -x "$peers/bin/borg" ] || attempt borg14 borg borg14 borg 'borgbackup<2'

# borg 2 wants an OpenSSL newer than Debian 12 has: where it cannot be built here, it is built in a newer Debian beside us and
# run there by chroot, with BENCH_DIRS (the directories of data and work, set by run.sh) bound to the same paths.
borg2_in_newer_debian() {
    have debootstrap || apt install -y -q --no-install-recommends debootstrap
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' 'Origin: Debian' | head -1)
    root=$peers/trixie
    if [ ! -e "$root/.whole" ]; then
        rm -rf "$root"
        debootstrap --variant=minbase \
            --include=python3,python3-venv,python3-dev,gcc,libc6-dev,pkg-config,libssl-dev,libacl1-dev,liblz4-dev,libxxhash-dev,libzstd-dev,ca-certificates \
            trixie "$root" "$mirror"
        touch "$root/.whole"
    fi
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    # Where this machine trusts authorities of its own, so must pip in there.
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
    for file in /etc/pip.conf "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do [ ! -e "$file" ] || cp "$file" "$root/etc/pip.conf"; done
    chroot "$root" sh -ec "python3 -m venv /opt/borg2 && /opt/borg2/bin/pip install --quiet --disable-pip-version-check 'borgbackup>=2.0.0b14'"
    cat >"$peers/bin/borg2" <<'WRAPPER'
#!/bin/sh
exec unshare --mount sh -c '
    root=$1; shift
    for directory in $BENCH_DIRS; do mkdir -p "$root$directory"; mount --bind "$directory" "$root$directory"; done
    mount --bind /proc "$root/proc"; mount --bind /dev "$root/dev"
    here=$PWD; [ -d "$root$here" ] || here=/
    exec chroot "$root" /bin/sh -c "cd \"\$0\" && exec /opt/borg2/bin/borg \"\$@\"" "$here" "$@"
' sh "$(dirname "$(readlink -f "$0")")/../trixie" "$@"
WRAPPER
    chmod 755 "$peers/bin/borg2"
    "$peers/bin/borg2" --version
}
[ -x "$peers/bin/borg2" ] || attempt borg2 borg borg2 borg2 'borgbackup>=2.0.0b14'
[ -x "$peers/bin/borg2" ] || { rm -f "$peers/bin/borg2"; attempt borg2-in-newer-debian borg2_in_newer_debian; }

crate() { cargo install --quiet --locked --root "$peers" "$@"; }
[ -x "$peers/bin/bupstash" ] || attempt bupstash crate bupstash
[ -x "$peers/bin/conserve" ] || attempt conserve crate conserve
[ -x "$peers/bin/rustic" ] || attempt rustic crate rustic-rs
for peer in restic borg borg2 bupstash conserve rustic age; do have "$peer" || note "$peer is missing: its rows stay empty"; done
