"""A virtual machine that can lose its power at a chosen moment, and the line on which it is told what to do."""

import atexit
import base64
import os
import random
import select
import socket
import subprocess
import time
from pathlib import Path

from disk import Disk


class PowerCut(Exception):
    """The machine was killed while something was waited for."""


class Failed(Exception):
    """What must hold does not."""


class Machine:
    def __init__(self, work: Path, accelerator: list[str], kernel: str) -> None:
        self.work, self.accelerator, self.kernel = work, accelerator, kernel
        self.disk = Disk(str(work / "disk.img"), str(work / "disk.sock"))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(work / "agent.sock"))
        self.listener.listen(1)
        self.qemu: subprocess.Popen | None = None
        self.line: socket.socket | None = None
        self.cut_at: float | None = None
        self.heard = b""
        self.doing = ""
        # However this process ends, but for SIGKILL, the machine ends with it.
        atexit.register(self._off)

    def start(self, patience: float = 240) -> None:
        """Switches it on and waits until it takes commands, at most `patience` seconds."""
        self.disk.plug_in()
        self.heard, self.doing = b"", "starting"
        console = self.work / "console.log"
        with open(self.work / "qemu.log", "ab") as log:
            self.qemu = subprocess.Popen(
                ["qemu-system-x86_64", *self.accelerator, "-m", "640", "-smp", "1", "-display", "none", "-monitor", "none", "-no-reboot", "-nic", "none"]
                + ["-serial", f"file:{console}", "-chardev", f"socket,id=agent,path={self.work}/agent.sock", "-serial", "chardev:agent"]
                + ["-drive", f"file=nbd+unix:///?socket={self.work}/disk.sock,format=raw,if=none,id=disk,cache=writeback", "-device", "nvme,drive=disk,serial=keepd"]
                + ["-kernel", self.kernel, "-append"]
                + ["root=/dev/nvme0n1 rw console=ttyS0 panic=-1 quiet loglevel=4 mitigations=off nokaslr audit=0 no_timer_check tsc=reliable random.trust_cpu=on systemd.show_status=0"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.line = self._connected()
        while self._line(patience) != b"up":
            pass

    def _connected(self) -> socket.socket:
        """qemu opens the line before anything else, so this takes a moment, or it does not run at all."""
        self.listener.settimeout(1)
        for _ in range(60):
            try:
                return self.listener.accept()[0]
            except TimeoutError:
                if self.qemu and self.qemu.poll() is not None:
                    break
        raise Failed(f"qemu does not run: {(self.work / 'qemu.log').read_text(errors='replace')[-2000:]}")

    def _off(self) -> None:
        if self.qemu and self.qemu.poll() is None:
            self.qemu.kill()
            self.qemu.wait()

    def run(self, command: str, patience: float = 120) -> tuple[int, str]:
        """Its exit code and what it said. Raises PowerCut when the moment comes while it waits."""
        assert self.line
        self.doing = command if len(command) < 60 else command[:60] + "…"
        self.line.sendall(base64.b64encode(command.encode()) + b"\n")
        began = time.monotonic()
        code, _, said = self._line(patience).partition(b" ")
        if os.environ.get("KEEPD_TEST_TRACE"):
            print(f"      {time.monotonic() - began:6.1f} s, {code.decode()}: {self.doing}", flush=True)
        return int(code), base64.b64decode(said).decode(errors="replace")

    def must(self, command: str, patience: float = 120) -> str:
        code, said = self.run(command, patience)
        if code != 0:
            raise Failed(f"'{command}' ended with {code}: {said.strip()[-3000:]}")
        return said

    def cut_power(self, how: str, rng: random.Random) -> tuple[int, int]:
        """Kills it and has the disk lose what it may."""
        self._off()
        # It may have ended before it had a line.
        if self.line:
            self.line.close()
            self.line = None
        self.cut_at = None
        return self.disk.power_lost(how, rng)

    def console(self) -> str:
        return (self.work / "console.log").read_text(errors="replace")

    def _line(self, patience: float) -> bytes:
        assert self.line
        end = time.monotonic() + patience
        while b"\n" not in self.heard:
            until = end if self.cut_at is None else min(end, self.cut_at)
            left = until - time.monotonic()
            if left <= 0:
                if self.cut_at is not None and self.cut_at <= end:
                    raise PowerCut
                raise Failed(f"the machine did not answer within {patience:.0f} s: {self.console()[-2000:]}")
            if b"KVM internal error" in (self.work / "qemu.log").read_bytes():
                raise Failed("this /dev/kvm cannot run a whole machine")
            if select.select([self.line], [], [], min(left, 1))[0]:
                more = self.line.recv(1 << 16)
                if not more:
                    raise Failed(f"the machine ended by itself: {self.console()[-2000:]} {(self.work / 'qemu.log').read_text()[-2000:]}")
                self.heard += more
        line, _, self.heard = self.heard.partition(b"\n")
        return line.strip()


def accelerators() -> list[tuple[str, list[str]]]:
    """Ways to run it, the fastest first. Not every /dev/kvm is one that runs a kernel which does not know of it, so the first one that boots is taken."""
    # Without cx16: qemu 7.2 spoils the flags in cmpxchg16b, and Linux uses it.
    ways = [("software (no usable /dev/kvm)", ["-M", "q35,smm=off", "-accel", "tcg", "-cpu", "max,-cx16"])]
    if os.access("/dev/kvm", os.R_OK | os.W_OK) and any(Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd")):
        ways.insert(0, ("KVM", ["-M", "q35,smm=off", "-accel", "kvm", "-cpu", "host,-arch-capabilities"]))
    return ways
