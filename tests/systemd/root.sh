# To be sourced: makes the root of Debian 13 that is booted, once, under ${KEEPD_TEST_CACHE:-/var/tmp/keepd-test}; $root is where it is, nobody changes it.
# Wants cannot() of the caller, which says why there is none and ends.
cache=${KEEPD_TEST_CACHE:-/var/tmp/keepd-test}
root=$cache/trixie

# install_from_debian PACKAGE…: for what boots it. Fails with its last words in $cache/apt.log.
install_from_debian() {
    command -v apt-get >/dev/null || { echo "no apt-get here" >"$cache/apt.log"; return 1; }
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"; } >"$cache/apt.log" 2>&1
}

mkdir -p "$cache"
# Two test runs must not make the root at the same time.
exec 8>"$cache/lock"; flock 8
if ! command -v systemd-nspawn >/dev/null || ! command -v debootstrap >/dev/null; then
    install_from_debian systemd-container debootstrap || cannot "systemd-container and debootstrap cannot be installed: $(tail -1 "$cache/apt.log")"
fi
if [ ! -e "$root/.whole" ]; then
    rm -rf "$root"
    # The mirror this machine itself uses.
    mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources 2>/dev/null | head -1 | cut -d' ' -f1)
    [ -n "$mirror" ] || mirror=$(awk '/^deb /{ for (i = 2; i <= NF; i++) if ($i ~ /:\/\//) { print $i; exit } }' /etc/apt/sources.list 2>/dev/null)
    [ -n "$mirror" ] || cannot "no package mirror is configured here"
    debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,sqlite3,python3-minimal,procps trixie "$root" "$mirror" >"$cache/debootstrap.log" 2>&1 ||
        cannot "debootstrap failed: $(tail -1 "$cache/debootstrap.log")"
    touch "$root/.whole"
fi
flock -u 8
