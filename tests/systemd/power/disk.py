"""A disk with a volatile write cache, served over NBD on a Unix socket: what its user has not flushed may be gone when the power goes.

The file always holds what the disk would answer; beside it stand, in memory, the blocks as they were when the cache was last flushed, and the writes since.
`power_lost` takes the file back to the flush and lets through any part of what was written after it, torn at the edges of blocks, in the order it was
written: the freedom that a real disk has.
"""

import os
import random
import socket
import struct
import threading

BLOCK = 4096
OPTION_MAGIC = 0x49484156454F5054
FLAGS = 1 | 1 << 2 | 1 << 3  # has flags, takes flushes, takes writes with FUA
READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3
FUA = 1 << 16


class Disk:
    def __init__(self, image: str, path: str) -> None:
        self.file = os.open(image, os.O_RDWR)
        self.size = os.fstat(self.file).st_size
        assert self.size % BLOCK == 0
        self.flushed: dict[int, bytes] = {}
        self.pending: list[tuple[int, bytes, bool]] = []
        self.flushes = 0
        self.lock = threading.Lock()
        self.listener = socket.socket(socket.AF_UNIX)
        self.path, self.is_used = path, False
        self.listener.bind(path)
        self.listener.listen(1)
        self.user: threading.Thread | None = None

    def plug_in(self) -> None:
        """Waits, in a thread, for the next machine to connect, and serves it until it is gone."""
        self.is_used = False
        self.user = threading.Thread(target=self._serve, daemon=True)
        self.user.start()

    def power_lost(self, how: str, rng: random.Random) -> tuple[int, int]:
        """After the machine is gone. `how`: 'kept' (nothing is lost but what the machine had in memory), 'dropped' (all since the last flush),
        'torn' (any blocks of any writes since then). Gives how many writes were in the cache, and how many of them are wholly on the disk."""
        if self.user:
            self.user.join(1)
            if not self.is_used:
                # The machine did not come as far as its disk: nobody else ends the waiting for it.
                with socket.socket(socket.AF_UNIX) as nobody:
                    nobody.connect(self.path)
            self.user.join(30)
            assert not self.user.is_alive(), "the machine did not let its disk go"
        with self.lock:
            pending, kept = self.pending, 0
            if how != "kept":
                for block, was in self.flushed.items():
                    os.pwrite(self.file, was, block * BLOCK)
                for offset, data, through in pending:
                    whole = True
                    for at in range(0, len(data), BLOCK):
                        if through or (how == "torn" and rng.random() < 0.5):
                            os.pwrite(self.file, data[at : at + BLOCK], offset + at)
                        else:
                            whole = False
                    kept += whole
            else:
                kept = len(pending)
            self.flushed, self.pending = {}, []
            return len(pending), kept

    def _write(self, offset: int, data: bytes, through: bool) -> None:
        with self.lock:
            for block in range(offset // BLOCK, (offset + len(data) + BLOCK - 1) // BLOCK):
                if block not in self.flushed:
                    self.flushed[block] = os.pread(self.file, BLOCK, block * BLOCK)
            os.pwrite(self.file, data, offset)
            self.pending.append((offset, data, through))

    def _flush(self) -> None:
        with self.lock:
            self.flushed, self.pending = {}, []
            self.flushes += 1

    def _serve(self) -> None:
        line, _ = self.listener.accept()
        self.is_used = True
        with line:
            try:
                if self._greet(line):
                    self._answer(line)
            except (ConnectionError, OSError):
                pass

    def _greet(self, line: socket.socket) -> bool:
        line.sendall(b"NBDMAGIC" + struct.pack(">QH", OPTION_MAGIC, 1 | 2))  # fixed newstyle, no zeroes
        (client,) = struct.unpack(">I", exactly(line, 4))
        while True:
            magic, option, length = struct.unpack(">QII", exactly(line, 16))
            assert magic == OPTION_MAGIC
            exactly(line, length)

            def reply(kind: int, data: bytes = b"") -> None:
                line.sendall(struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data)

            if option in (6, 7):  # info, go
                reply(3, struct.pack(">HQH", 0, self.size, FLAGS))
                reply(3, struct.pack(">HIII", 3, 512, BLOCK, 1 << 25))
                reply(1)
                if option == 7:
                    return True
            elif option == 1:  # export name, without an answer
                line.sendall(struct.pack(">QH", self.size, FLAGS) + (b"" if client & 2 else bytes(124)))
                return True
            elif option == 2:  # abort
                reply(1)
                return False
            else:
                reply(1 << 31 | 1)  # not known

    def _answer(self, line: socket.socket) -> None:
        while True:
            magic, flags_and_kind, handle, offset, length = struct.unpack(">IIQQI", exactly(line, 28))
            assert magic == 0x25609513
            kind = flags_and_kind & 0xFFFF
            answer = b""
            if kind == READ:
                answer = os.pread(self.file, length, offset)
            elif kind == WRITE:
                self._write(offset, exactly(line, length), bool(flags_and_kind & FUA))
            elif kind == FLUSH:
                self._flush()
            elif kind == DISCONNECT:
                return
            line.sendall(struct.pack(">IIQ", 0x67446698, 0 if kind <= FLUSH else 22, handle) + answer)


def exactly(line: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        more = line.recv(min(length - len(data), 1 << 20))
        if not more:
            raise ConnectionError("the machine is gone")
        data += more
    return bytes(data)
