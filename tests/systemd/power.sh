#!/bin/bash
# The power of a machine is cut, again and again, while keepd works on it: qemu is killed, and its disk loses what was not flushed. power/power.py says what must hold then.
#
# usage: power.sh BINARIES_DIR        KEEPD_TEST_LONG=1: 50 cuts, drawn by chance; KEEPD_TEST_CUTS, KEEPD_TEST_SEED
#        KEEPD_TEST_BREAK=sync: keepd's syncs do nothing, so that whoever doubts the test sees it fail
# Skipped, loudly, where no machine can be had; KEEPD_REQUIRE_SYSTEMD=1 makes that a failure. Without a usable /dev/kvm it is slower, and the same.
set -eu
binaries=$1
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
what="the power cuts"
. "$here/skipped.sh"
cannot() { skipped "$*"; }
[ -x "$binaries/keepd" ] || { echo "$binaries/keepd is missing: cargo build --workspace --bins"; exit 1; }
[ "$(id -u)" = 0 ] || skipped "they need root"
. "$here/root.sh"
flock 8
if ! command -v qemu-system-x86_64 >/dev/null; then
    install_from_debian qemu-system-x86 || skipped "qemu-system-x86 cannot be installed: $(tail -1 "$cache/apt.log")"
fi
if ! command -v mke2fs >/dev/null; then install_from_debian e2fsprogs || skipped "e2fsprogs cannot be installed: $(tail -1 "$cache/apt.log")"; fi
kernel=$cache/vmlinuz
work=$(mktemp -d "$cache/power.XXXXXX")
trap 'rm -rf "$work"' EXIT
cp -a --reflink=auto "$root" "$work/root"
if [ ! -e "$kernel" ]; then
    # Debian's kernel for clouds has the disk's driver built in: neither modules nor an initrd are needed.
    if ! chroot "$work/root" sh -eu -c 'cd /tmp; apt-get update -q; package=$(apt-cache depends linux-image-cloud-amd64 | sed -n "s/^ *Depends: *\(linux-image-[0-9].*\)/\1/p" | head -1)
        apt-get download -q "$package"; dpkg -x linux-image-*.deb kernel' >"$work/kernel.log" 2>&1; then skipped "no kernel can be had: $(tail -1 "$work/kernel.log")"; fi
    cp "$work"/root/tmp/kernel/boot/vmlinuz-* "$kernel.new" && mv "$kernel.new" "$kernel"
    rm -rf "$work/root"; cp -a --reflink=auto "$root" "$work/root"
fi
flock -u 8

if ! make --no-print-directory install DESTDIR="$work/root" BINARIES="$binaries" >"$work/install.log" 2>&1; then cat "$work/install.log"; exit 1; fi
chown -R root:root "$work/root/usr/local" "$work/root/etc/keepd"
install -Dm755 -t "$work/root/keepd-test" "$here"/power/agent.sh "$here"/power/application.sh
rm -rf "$work"/root/usr/share/{doc,locale,man} "$work"/root/var/{cache,lib}/apt/*
# Nothing that only makes the start longer, or wants modules.
for unit in systemd-udevd{.service,-kernel.socket,-control.socket} systemd-udev-trigger.service systemd-logind.service getty@.service serial-getty@.service \
    {apt-daily,apt-daily-upgrade,e2scrub_all,fstrim,dpkg-db-backup}.timer e2scrub_reap.service systemd-pstore.service modprobe@.service kmod-static-nodes.service \
    systemd-modules-load.service proc-sys-fs-binfmt_misc.automount {dev-hugepages,dev-mqueue,sys-kernel-debug,sys-kernel-tracing,sys-fs-fuse-connections}.mount \
    systemd-sysctl.service systemd-random-seed.service systemd-journal-catalog-update.service systemd-update-utmp.service systemd-hwdb-update.service; do
    ln -sf /dev/null "$work/root/etc/systemd/system/$unit"
done
cat >"$work/root/etc/systemd/system/keepd-test.service" <<'UNIT'
[Unit]
After=local-fs.target
[Service]
ExecStart=/keepd-test/agent.sh
[Install]
WantedBy=multi-user.target
UNIT
if [ "${KEEPD_TEST_BREAK:-}" = sync ]; then
    mkdir -p "$work/root/etc/systemd/system/keepd.service.d"
    printf '[Service]\nEnvironment=LD_PRELOAD=/keepd-test/nosync.so\n' >"$work/root/etc/systemd/system/keepd.service.d/nosync.conf"
    for call in 'fsync(int f)' 'fdatasync(int f)' 'syncfs(int f)'; do echo "int $call { (void)f; return 0; }"; done | cc -shared -fPIC -x c -o "$work/root/keepd-test/nosync.so" -
fi
mkdir -p "$work/root/etc/systemd/system/multi-user.target.wants"
ln -s ../keepd-test.service "$work/root/etc/systemd/system/multi-user.target.wants/"
head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$work/root/etc/machine-id"
mke2fs -q -t ext4 -d "$work/root" "$work/disk.img" 1500M
rm -rf "$work/root"

PYTHONDONTWRITEBYTECODE=1 python3 "$here/power/power.py" "$work" "$kernel" & cuts=$!
# Whoever is ended ends the machine, too; power.py does that when it is asked to end.
trap 'kill "$cuts" 2>/dev/null; wait "$cuts"; exit 1' INT TERM
code=0
wait "$cuts" || code=$?
[ "$code" != 125 ] || skipped "no machine can be run here"
exit "$code"
