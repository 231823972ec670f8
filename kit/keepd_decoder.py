#!/usr/bin/env python3
# keepd_decoder: gives back what keepd stored, without keepd. Format 1.
#
# Written from docs/format.md and docs/archive.md of keepd alone. Python 3.8
# or newer is all it needs to start. Two packages make it quicker, and it uses
# them when they are there:    python3 -m pip install cryptography zstandard
# Without "cryptography" it takes the system's libcrypto, without that its own
# AES (some MB/s). Without "zstandard" it takes Python's own zstd (3.14), the
# system's libzstd or the program zstd; one of these must be there.
# With the package "blake3" it checks the ids of chunks as well.
import argparse
import array
import base64
import ctypes
import ctypes.util
import errno
import getpass
import gzip
import hashlib
import hmac
import io
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from collections import OrderedDict

USAGE = """\
keepd_decoder.py [REPOSITORY] [--key FILE]... list
keepd_decoder.py [REPOSITORY] [--key FILE]... ls BACKUP
keepd_decoder.py [REPOSITORY] [--key FILE]... restore BACKUP DIR [PATH...]
keepd_decoder.py [REPOSITORY] [--key FILE]... verify
keepd_decoder.py ARCHIVE [--key FILE]... list | ls | verify | stream
keepd_decoder.py ARCHIVE [--key FILE]... restore DIR [PATH...]
keepd_decoder.py REPOSITORY-OR-FILE [--key FILE]... config [-o FILE]"""
HELP = """\
REPOSITORY is a directory: a copy of a whole destination (with keepd.json in
it); without it, the directory where you are. BACKUP is an id, the start of
one, or 'latest'. DIR must not exist, or be empty: nothing is overwritten.
PATH is one as ls shows it. FILE is a key file, a private key file, or any
text with such a line; a recovery kit has its own key in it. ARCHIVE is a file
that keepctl export made; 'stream' writes the tar in it to standard output,
compressed as it was; it is whole if no error follows. 'config' writes keepd's
configuration as JSON: of a file that keepctl config export made, or the
newest in config/ of a copy of a destination."""

MIB = 1 << 20
HEADER, TAG, FOOTER = 64, 16, (1 << 64) - 1
MAX_OBJECT, MAX_SMALL, MAX_CHUNK = 64 * MIB, 64 << 10, 4 * MIB
MAX_FOOTER, SEALED_KEY = 16 * MIB, 88
KINDS = {1: b"keepd/1 data pack", 2: b"keepd/1 metadata pack",
         3: b"keepd/1 index", 4: b"keepd/1 manifest", 5: b"keepd/1 mark"}
FILE, DIRECTORY, SYMLINK, HARDLINK = range(4)
AVOID = set()  # libraries not to use


class Bad(Exception):
    """What is wrong, in one line."""


def shown(name):
    """A name from the repository, harmless on a terminal."""
    if isinstance(name, bytes):
        name = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else
                   c.encode("unicode_escape", "surrogatepass").decode()
                   for c in str(name))


def say(text):
    print("keepd_decoder: " + shown(text), file=sys.stderr)


def library(name):
    """An optional Python module, or None."""
    if name in AVOID:
        return None
    try:
        return __import__(name, fromlist=["*"])
    except Exception:  # also one that is broken
        return None


def shared_library(name):
    """A library of the system by ctypes, or None."""
    if "lib" + name in AVOID:
        return None
    try:
        found = ctypes.util.find_library(name)
        return ctypes.CDLL(found) if found else None
    except Exception:
        return None


# ---- AES-256-GCM ----------------------------------------------------------

def sbox(b):
    """AES's S-box on eight bit planes, the lowest first, but for the last
    step: what comes out is S(x) xor 0x63. The circuit is Boyar and Peralta's
    (https://eprint.iacr.org/2011/332)."""
    x7, x6, x5, x4, x3, x2, x1, x0 = b
    y14 = x3 ^ x5; y13 = x0 ^ x6; y9 = x0 ^ x3; y8 = x0 ^ x5; t0 = x1 ^ x2
    y1 = t0 ^ x7; y4 = y1 ^ x3; y12 = y13 ^ y14; y2 = y1 ^ x0; y5 = y1 ^ x6
    y3 = y5 ^ y8; t1 = x4 ^ y12; y15 = t1 ^ x5; y20 = t1 ^ x1; y6 = y15 ^ x7
    y10 = y15 ^ t0; y11 = y20 ^ y9; y7 = x7 ^ y11; y17 = y10 ^ y11
    y19 = y10 ^ y8; y16 = t0 ^ y11; y21 = y13 ^ y16; y18 = x0 ^ y16
    t2 = y12 & y15; t4 = (y3 & y6) ^ t2; t6 = (y4 & x7) ^ t2; t7 = y13 & y16
    t9 = (y5 & y1) ^ t7; t11 = (y2 & y7) ^ t7; t12 = y9 & y11
    t14 = (y14 & y17) ^ t12; t16 = (y8 & y10) ^ t12; t21 = t4 ^ t14 ^ y20
    t22 = t6 ^ t16 ^ y19; t23 = t9 ^ t14 ^ y21; t24 = t11 ^ t16 ^ y18
    t25 = t21 ^ t22; t26 = t21 & t23; t27 = t24 ^ t26; t29 = (t25 & t27) ^ t22
    t33 = ((t22 ^ t26) & (t23 ^ t24)) ^ t24; t36 = t24 & (t27 ^ t33)
    t37 = t36 ^ t23 ^ t33; t40 = t25 ^ (t29 & (t27 ^ t36)); t41 = t40 ^ t37
    t42 = t29 ^ t33; t43 = t29 ^ t40; t44 = t33 ^ t37; t45 = t42 ^ t41
    z0 = t44 & y15; z1 = t37 & y6; z2 = t33 & x7; z3 = t43 & y16
    z4 = t40 & y1; z5 = t29 & y7; z6 = t42 & y11; z7 = t45 & y17
    z8 = t41 & y10; z9 = t44 & y12; z10 = t37 & y3; z11 = t33 & y4
    z12 = t43 & y13; z13 = t40 & y5; z14 = t29 & y2; z15 = t42 & y9
    z16 = t45 & y14; z17 = t41 & y8
    t46 = z15 ^ z16; t48 = z5 ^ z13; t53 = z0 ^ z3; t57 = z2 ^ z12 ^ t53
    t58 = z4 ^ t46; t59 = z3 ^ z6 ^ z7; t62 = z7 ^ z8 ^ t58
    t63 = z9 ^ z10 ^ t58; t64 = z4 ^ t59; t65 = z14 ^ t57 ^ t62
    t66 = z1 ^ t63; s3 = t53 ^ t66
    return [t48 ^ t46 ^ t57, z12 ^ t48 ^ t62, z10 ^ z11 ^ t65,
            z2 ^ z5 ^ t66, s3, z16 ^ z17 ^ t64 ^ t65, t64 ^ s3, t59 ^ t63]


def transposed(planes, width):
    """Eight integers of `width` bytes each: bit j of byte q of number b
    changes places with bit b of byte q of number j."""
    p = list(planes)
    for step, byte in ((1, 0x55), (2, 0x33), (4, 0x0F)):
        mask = int.from_bytes(bytes([byte]) * width, "little")
        for a in range(8):
            if not a & step:
                t = ((p[a] >> step) ^ p[a + step]) & mask
                p[a + step] ^= t
                p[a] ^= t << step
    return p


def times(x, y):
    """The product of two elements of GCM's field, as big-endian numbers."""
    z = 0
    for bit in range(127, -1, -1):
        if x >> bit & 1:
            z ^= y
        y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
    return z


class OwnGcm:
    """AES-256-GCM in Python alone. All blocks of a section go through AES at
    once: each of the state's 128 bits is one long integer with a bit for
    every block. GHASH folds the blocks in halves in the same way."""
    table = None

    def __init__(self, key):
        if OwnGcm.table is None:
            bits = [sum((x >> i & 1) << x for x in range(256))
                    for i in range(8)]
            out = sbox(bits)
            OwnGcm.table = bytes(sum((out[i] >> x & 1) << i for i in range(8))
                                 ^ 0x63 for x in range(256))
        words, rcon = [key[i:i + 4] for i in range(0, 32, 4)], 1
        while len(words) < 60:
            w = words[-1]
            if len(words) % 8 == 0:
                w = (w[1:] + w[:1]).translate(OwnGcm.table)
                w, rcon = bytes([w[0] ^ rcon]) + w[1:], rcon << 1
            elif len(words) % 8 == 4:
                w = w.translate(OwnGcm.table)
            words.append(bytes(a ^ b for a, b in zip(w, words[-8])))
        flat = b"".join(words)
        # The 0x63 that sbox leaves out goes through all that follows it.
        self.keys = [bytes(k ^ (0x63 if r else 0)
                           for k in flat[16 * r:16 * r + 16])
                     for r in range(15)]
        self.h = int.from_bytes(self.stream(bytes(12), 0, 1), "big")
        self.folds = {}

    def stream(self, nonce, first, blocks):
        """AES of nonce and counter for `blocks` counters from `first`."""
        n = blocks + -blocks % 8
        ones = (1 << n) - 1
        state = [[ones if byte >> i & 1 else 0 for i in range(8)]
                 for byte in nonce + bytes(4)]
        for bit in range((first + n).bit_length()):
            width, plane = 2 << bit, ((1 << (1 << bit)) - 1) << (1 << bit)
            while width < first + n:
                plane |= plane << width
                width *= 2
            state[15 - bit // 8][bit % 8] = plane >> first & ones
        for r in range(15):
            if r:
                state = [sbox(byte) for byte in state]
                state = [state[(i + 4 * (i % 4)) % 16] for i in range(16)]
            if 0 < r < 14:
                mixed = []
                for c in range(0, 16, 4):
                    column = state[c:c + 4]
                    every = [p ^ q ^ s ^ t for p, q, s, t in zip(*column)]
                    for i in range(4):
                        a, b = column[i], column[(i + 1) % 4]
                        d = [p ^ q for p, q in zip(a, b)]
                        h = d[7]
                        d = [h, d[0] ^ h, d[1], d[2] ^ h, d[3] ^ h] + d[4:7]
                        mixed.append([p ^ q ^ s
                                      for p, q, s in zip(a, every, d)])
                state = mixed
            for byte, k in zip(state, self.keys[r]):
                for i in range(8):
                    if k >> i & 1:
                        byte[i] ^= ones
        out = bytearray(16 * n)
        for i, byte in enumerate(state):
            for j, lane in enumerate(transposed(byte, n // 8)):
                out[i + 16 * j::128] = lane.to_bytes(n // 8, "little")
        return bytes(out[:16 * blocks])

    def fold(self, half):
        """What multiplying by H to the power `half` (of two) does: for each
        coefficient, the coefficients of the product it goes to."""
        if half not in self.folds:
            power, rows = self.h, []
            for _ in range(half.bit_length() - 1):
                power = times(power, power)
            for _ in range(128):
                rows.append([d for d in range(128) if power >> (127 - d) & 1])
                power = power >> 1 ^ (0xE1 << 120 if power & 1 else 0)
            self.folds[half] = rows
        return self.folds[half]

    def ghash(self, data):
        n = len(data) // 16
        if n > 64:
            full = 1 << (n - 1).bit_length()
            data = bytes(16 * (full - n)) + data
            planes = []
            for i in range(16):
                lanes = [int.from_bytes(data[i + 16 * j::128], "little")
                         for j in range(8)]
                planes += reversed(transposed(lanes, full // 8))
            n = full
            while n > 32:
                n //= 2
                low = (1 << n) - 1
                out = [p >> n for p in planes]
                for p, row in zip(planes, self.fold(n)):
                    p &= low
                    for d in row:
                        out[d] ^= p
                planes = out
            blocks = [sum((p >> i & 1) << (127 - c)
                          for c, p in enumerate(planes)) for i in range(n)]
        else:
            blocks = [int.from_bytes(data[i:i + 16], "big")
                      for i in range(0, len(data), 16)]
        y = 0
        for block in blocks:
            y = times(y ^ block, self.h)
        return y

    def decrypt(self, nonce, sealed, aad):
        if len(sealed) < TAG:
            return None
        body, tag = sealed[:-TAG], sealed[-TAG:]
        blocks = -(-len(body) // 16)
        stream = self.stream(nonce, 1, 1 + blocks)
        y = self.ghash(aad + bytes(-len(aad) % 16)
                       + body + bytes(-len(body) % 16)
                       + struct.pack(">QQ", 8 * len(aad), 8 * len(body)))
        made = (y ^ int.from_bytes(stream[:16], "big")).to_bytes(16, "big")
        if not hmac.compare_digest(made, tag):
            return None
        plain = (int.from_bytes(body, "little")
                 ^ int.from_bytes(stream[16:16 + len(body)], "little"))
        return plain.to_bytes(len(body), "little")


class LibcryptoGcm:
    """AES-256-GCM by the system's OpenSSL."""
    lib = None

    def __init__(self, key):
        self.key = key

    @classmethod
    def usable(cls):
        lib = shared_library("crypto")
        try:
            for name, result, arguments in (
                    ("EVP_CIPHER_CTX_new", "p", ""),
                    ("EVP_CIPHER_CTX_free", "", "p"),
                    ("EVP_aes_256_gcm", "p", ""),
                    ("EVP_DecryptInit_ex", "i", "pppbb"),
                    ("EVP_CIPHER_CTX_ctrl", "i", "piib"),
                    ("EVP_DecryptUpdate", "i", "ppnbi"),
                    ("EVP_DecryptFinal_ex", "i", "ppn")):
                function = getattr(lib, name)
                types = {"p": ctypes.c_void_p, "i": ctypes.c_int, "": None,
                         "b": ctypes.c_char_p,
                         "n": ctypes.POINTER(ctypes.c_int)}
                function.restype = types[result]
                function.argtypes = [types[a] for a in arguments]
            cls.lib = lib
            return cls(TEST_KEY).decrypt(bytes(12), *TEST_SEALED) == b"keepd"
        except Exception:
            return False

    def decrypt(self, nonce, sealed, aad):
        if len(sealed) < TAG:
            return None
        lib, n = self.lib, ctypes.c_int(0)
        body, tag = sealed[:-TAG], sealed[-TAG:]
        out = ctypes.create_string_buffer(len(body) + 16)
        context = lib.EVP_CIPHER_CTX_new()
        try:
            good = (context and lib.EVP_DecryptInit_ex(
                context, lib.EVP_aes_256_gcm(), None, self.key, nonce) == 1
                and lib.EVP_DecryptUpdate(context, None, n, aad,
                                          len(aad)) == 1
                and lib.EVP_DecryptUpdate(context, out, n, body,
                                          len(body)) == 1
                and lib.EVP_CIPHER_CTX_ctrl(context, 0x11, TAG, tag) == 1
                and lib.EVP_DecryptFinal_ex(context, out, n) == 1)
        finally:
            lib.EVP_CIPHER_CTX_free(context)
        return ctypes.string_at(out, len(body)) if good else None


class PackageGcm:
    """AES-256-GCM by the package cryptography."""
    aead = None

    def __init__(self, key):
        self.gcm = self.aead.AESGCM(key)

    @classmethod
    def usable(cls):
        if "cryptography" in AVOID:
            return False
        cls.aead = library("cryptography.hazmat.primitives.ciphers.aead")
        try:
            return cls(TEST_KEY).decrypt(bytes(12), *TEST_SEALED) == b"keepd"
        except Exception:
            return False

    def decrypt(self, nonce, sealed, aad):
        try:
            return self.gcm.decrypt(nonce, sealed, aad)
        except Exception:  # InvalidTag
            return None


# "keepd" with associated data "aad": a library is used that opens this.
TEST_KEY = bytes(range(32))
TEST_SEALED = (bytes.fromhex(
    "65d9d0aed1b7531d5a9f0df6cc175f015a9cb99107"), b"aad")
GCM = []


def gcm(key):
    if not GCM:
        GCM.append(next(c for c in (PackageGcm, LibcryptoGcm, OwnGcm)
                        if c is OwnGcm or c.usable()))
        if GCM[0] is OwnGcm:
            say("neither the package cryptography nor libcrypto is here: "
                "deciphering in Python, some MB/s")
    return GCM[0](key)


# ---- Keys -----------------------------------------------------------------

def sha256(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


def hkdf(secret, salt, info, length=32):
    """RFC 5869"""
    prk = hmac.new(salt or bytes(32), secret, hashlib.sha256).digest()
    return hkdf_expand(prk, info, length)


def hkdf_expand(prk, info, length):
    out, block, n = b"", b"", 1
    while len(out) < length:
        block = hmac.new(prk, block + info + bytes([n]),
                         hashlib.sha256).digest()
        out, n = out + block, n + 1
    return out[:length]


def x25519(scalar, point):
    """RFC 7748. Slow, once for each write-only pack, and not in constant
    time, which matters to nobody who decodes his own backups."""
    p = (1 << 255) - 19
    k = int.from_bytes(scalar, "little") & ~7 & ~(1 << 255) | 1 << 254
    x1 = (int.from_bytes(point, "little") & ((1 << 255) - 1)) % p
    x2, z2, x3, z3 = 1, 0, x1, 1
    for t in range(254, -1, -1):
        bit = k >> t & 1
        if bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % p, b * b % p, d * a % p, c * b % p
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % p, x1 * (da - cb) ** 2 % p
        x2, z2 = aa * bb % p, e * (aa + 121665 * e) % p
        if bit:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, p - 2, p) % p).to_bytes(32, "little")


def public_key(private):
    return x25519(private, (9).to_bytes(32, "little"))


def hpke_open(private, enc, sealed, info, aad):
    """RFC 9180: base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256,
    AES-256-GCM, sequence number 0. None when it does not open."""
    suites = b"KEM\0\x20", b"HPKE\0\x20\0\1\0\2"

    def extract(suite, salt, label, ikm):
        return hmac.new(salt or bytes(32), b"HPKE-v1" + suite + label + ikm,
                        hashlib.sha256).digest()

    def expand(suite, prk, label, data, length):
        return hkdf_expand(prk, struct.pack(">H", length) + b"HPKE-v1"
                           + suite + label + data, length)

    kem, suite = suites
    dh = x25519(private, enc)
    if dh == bytes(32):
        return None
    shared = expand(kem, extract(kem, b"", b"eae_prk", dh),
                    b"shared_secret", enc + public_key(private), 32)
    context = (b"\0" + extract(suite, b"", b"psk_id_hash", b"")
               + extract(suite, b"", b"info_hash", info))
    secret = extract(suite, shared, b"secret", b"")
    key = expand(suite, secret, b"key", context, 32)
    nonce = expand(suite, secret, b"base_nonce", context, 12)
    return gcm(key).decrypt(nonce, sealed, aad)


def argon2id(secret, salt, kib, passes, lanes, length=32):
    """RFC 9106, version 0x13."""
    module = None
    if "cryptography" not in AVOID:
        module = library("cryptography.hazmat.primitives.kdf.argon2")
    if module:
        try:
            return module.Argon2id(
                salt=salt, length=length, iterations=passes, lanes=lanes,
                memory_cost=kib).derive(secret)
        except Exception:  # one whose OpenSSL has none
            pass
    say("the package cryptography is not here or has no Argon2id: working "
        "it out in Python, which takes %d minutes or more"
        % max(1, kib * passes // 200000))
    return own_argon2id(secret, salt, kib, passes, lanes, length)


def own_argon2id(secret, salt, kib, passes, lanes, length, extra=(b"", b"")):
    le32, m64 = struct.Struct("<I").pack, (1 << 64) - 1

    def long_hash(data, size):
        data = le32(size) + data
        if size <= 64:
            return hashlib.blake2b(data, digest_size=size).digest()
        v, out = hashlib.blake2b(data).digest(), b""
        while size - len(out) > 64:
            out += v[:32]
            left = size - len(out)
            v = hashlib.blake2b(v, digest_size=min(64, left)).digest()
        return out + v

    orders = []
    for i in range(8):
        orders.append(range(16 * i, 16 * i + 16))
    for i in range(8):
        orders.append([2 * i + 16 * j + k for j in range(8)
                       for k in (0, 1)])
    quarters = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
                (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
    steps = [tuple(o[i] for i in q) for o in orders for q in quarters]
    m32 = (1 << 32) - 1

    def compress(x, y):
        r = [p ^ q for p, q in zip(x, y)]
        w = r[:]
        for ia, ib, ic, id_ in steps:
            a, b, c, d = w[ia], w[ib], w[ic], w[id_]
            a = a + b + 2 * (a & m32) * (b & m32) & m64
            d ^= a
            d = d >> 32 | d << 32 & m64
            c = c + d + 2 * (c & m32) * (d & m32) & m64
            b ^= c
            b = b >> 24 | b << 40 & m64
            a = a + b + 2 * (a & m32) * (b & m32) & m64
            d ^= a
            d = d >> 16 | d << 48 & m64
            c = c + d + 2 * (c & m32) * (d & m32) & m64
            b ^= c
            w[ia], w[ib], w[ic], w[id_] = a, b >> 63 | b << 1 & m64, c, d
        return [p ^ q for p, q in zip(r, w)]

    seed = b"".join(map(le32, (lanes, length, kib, passes, 0x13, 2)))
    for part in (secret, salt) + extra:
        seed += le32(len(part)) + part
    seed = hashlib.blake2b(seed).digest()
    segment = kib // (4 * lanes)
    columns = 4 * segment
    block = struct.Struct("<128Q")
    memory = [[None] * columns for _ in range(lanes)]
    for i in range(lanes):
        for j in (0, 1):
            memory[i][j] = array.array("Q", block.unpack(
                long_hash(seed + le32(j) + le32(i), 1024)))
    zero = [0] * 128
    for t, s, i in ((t, s, i) for t in range(passes) for s in range(4)
                    for i in range(lanes)):
        lane, addresses = memory[i], None
        for k in range(2 if t == 0 and s == 0 else 0, segment):
            j = s * segment + k
            before = lane[j - 1]
            if t == 0 and s < 2:
                if addresses is None or k % 128 == 0:
                    head = [t, i, s, lanes * columns, passes, 2, k // 128 + 1]
                    addresses = compress(zero, compress(
                        zero, head + [0] * 121))
                word = addresses[k % 128]
            else:
                word = before[0]
            other = i if t == 0 and s == 0 else (word >> 32) % lanes
            if t == 0:
                area = s * segment + (k if other == i else 0)
                start = 0
            else:
                area = columns - segment + (k if other == i else 0)
                start = (s + 1) * segment % columns
            if other == i or k == 0:
                area -= 1
            low = word & m32
            z = area - 1 - (area * (low * low >> 32) >> 32)
            new = compress(before, memory[other][(start + z) % columns])
            if t:
                new = [p ^ q for p, q in zip(new, lane[j])]
            lane[j] = array.array("Q", new)
    last = memory[0][-1]
    for lane in memory[1:]:
        last = [p ^ q for p, q in zip(last, lane[-1])]
    return long_hash(block.pack(*last), length)


KEY_LINE = re.compile(r"[ ]*keepd-(key|private|public)-([0-9]+)(?:\s+(.*))?$")
CHECKS = {"key": b"keepd key check", "private": b"keepd private key check",
          "public": b"keepd public key check"}


def read_keys(path, wanted=True):
    """The profile keys and private keys of a text."""
    found = {"key": [], "private": [], "public": []}
    for line in read_own(path, MIB).decode("utf-8", "replace").splitlines():
        match = KEY_LINE.match(line.rstrip())
        if not match:
            continue
        word, version, rest = match.groups()
        if version != "1":
            raise Bad("%s: keys of version %s are newer than this decoder"
                      % (path, version))
        digits = re.fullmatch("([0-9a-fA-F]{64}) +([0-9a-fA-F]{8})",
                              rest or "")
        key = bytes.fromhex(digits.group(1)) if digits else b""
        if not digits or sha256(CHECKS[word], key)[:4].hex() \
                != digits.group(2).lower():
            raise Bad("%s: its keepd-%s-1 line is damaged or cut off: compare "
                      "it with another copy" % (path, word))
        if key not in found[word]:
            found[word].append(key)
    if wanted and not found["key"] and not found["private"]:
        raise Bad("%s: no line in it begins with keepd-key-1 or "
                  "keepd-private-1%s" % (path, ": a public key opens nothing"
                                         if found["public"] else ""))
    return found["key"], found["private"]


# ---- CBOR and payloads ----------------------------------------------------

class Cbor:
    """RFC 8949 as far as keepd uses it: no tags, no indefinite lengths."""

    def __init__(self, data):
        self.data, self.at = data, 0

    @classmethod
    def whole(cls, data):
        cbor = cls(data)
        value = cbor.value(0)
        if cbor.at != len(data):
            raise Bad("bytes follow the end of its CBOR")
        return value

    def value(self, depth):
        data, at = self.data, self.at
        if at >= len(data) or depth > 16:
            raise Bad("its CBOR is cut off or nested too deeply")
        major, n = data[at] >> 5, data[at] & 31
        at += 1
        if major == 7:
            self.at = at
            if n not in (20, 21, 22):
                raise Bad("its CBOR has a value that keepd does not write")
            return (False, True, None)[n - 20]
        if n >= 24:
            size = {24: 1, 25: 2, 26: 4, 27: 8}.get(n)
            if size is None or at + size > len(data):
                raise Bad("its CBOR is cut off or of indefinite length")
            n = int.from_bytes(data[at:at + size], "big")
            at += size
        self.at = at
        if major == 0:
            return n
        if major == 1:
            return -1 - n
        if major == 6:
            raise Bad("its CBOR has a tag, which keepd does not write")
        if n > len(data) - at:
            raise Bad("its CBOR is cut off")
        if major in (2, 3):
            self.at = at + n
            piece = data[at:at + n]
            if major == 2:
                return bytes(piece)
            try:
                return piece.decode("utf-8")
            except UnicodeDecodeError:
                raise Bad("its CBOR has a text that is not UTF-8") from None
        if major == 4:
            return [self.value(depth + 1) for _ in range(n)]
        found = {}
        for _ in range(n):
            key = self.value(depth + 1)
            if isinstance(key, (list, dict)) or key in found:
                raise Bad("its CBOR has a map with a strange or double key")
            found[key] = self.value(depth + 1)
        return found


def shaped(value, shape, what):
    """Checks a decoded value: a type, an int for a number from 0 to it, a
    list of one shape for an array of these, a tuple for an array of them."""
    if isinstance(shape, type):
        good = type(value) is shape
    elif isinstance(shape, int):
        good = type(value) is int and 0 <= value <= shape
    elif isinstance(shape, list):
        good = type(value) is list
        for v in value if good else ():
            shaped(v, shape[0], what)
    else:
        good = type(value) is list and len(value) == len(shape)
        for v, s in zip(value, shape) if good else ():
            shaped(v, s, what)
    if not good:
        raise Bad("its %s is not as format 1 has it" % what)
    return value


def chunk_id(value):
    if type(value) is not bytes or len(value) != 32:
        raise Bad("it has an id that is not 32 bytes long")
    return value


def frame_length(body):
    """The length a zstd frame announces, or None."""
    if len(body) < 5 or body[:4] != b"\x28\xb5\x2f\xfd":
        raise Bad("its payload is no zstd frame")
    flags = body[4]
    single, size = flags >> 5 & 1, (0, 2, 4, 8)[flags >> 6]
    size = 1 if single and not size else size
    at = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    if not size:
        return None
    n = int.from_bytes(body[at:at + size], "little")
    return n + 256 if size == 2 else n


def zstd_package():
    module = library("zstandard")
    if module:
        context = module.ZstdDecompressor()
        return lambda body, n: context.stream_reader(body).read(n + 1)
    return None


def zstd_python():
    module = library("compression.zstd")
    if module:
        return lambda body, n: module.ZstdDecompressor().decompress(
            body, max_length=n + 1)
    return None


def zstd_library():
    lib = shared_library("zstd")
    if not lib or not hasattr(lib, "ZSTD_decompress"):
        return None
    size = ctypes.c_size_t
    lib.ZSTD_decompress.restype = size
    lib.ZSTD_decompress.argtypes = [ctypes.c_char_p, size,
                                    ctypes.c_char_p, size]

    def run(body, n):
        out = ctypes.create_string_buffer(n + 1)
        came = lib.ZSTD_decompress(out, n + 1, body, len(body))
        return ctypes.string_at(out, came) if came <= n else b""
    return run


def zstd_program():
    path = None if "zstd" in AVOID else shutil.which("zstd")
    if not path:
        return None

    def run(body, n):
        child = subprocess.Popen([path, "-dcq", "--single-thread"],
                                 stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL)

        def feed():
            try:
                child.stdin.write(body)
                child.stdin.close()
            except OSError:
                pass

        feeder = threading.Thread(target=feed)
        feeder.start()
        out = child.stdout.read(n + 1)
        child.stdout.close()
        child.kill() if len(out) > n else None
        feeder.join()
        return out if child.wait() == 0 else b""
    return run


ZSTD = []


def payload(raw, limit):
    """What is in a payload of at most `limit` bytes before compression."""
    if len(raw) < 5:
        raise Bad("its payload is too short")
    method, length = struct.unpack("<BI", raw[:5])
    body = raw[5:]
    if length > limit:
        raise Bad("its payload claims %d bytes, more than the %d it may have"
                  % (length, limit))
    if method == 0:
        plain = body
    elif method == 1:
        if not ZSTD:
            for make in (zstd_package, zstd_python, zstd_library,
                         zstd_program):
                run = make()
                if run:
                    ZSTD.append(run)
                    break
            else:
                raise SystemExit(
                    "keepd_decoder: this needs zstd: install the Python "
                    "package zstandard, or the program zstd")
        announced = frame_length(body)
        if announced is not None and announced != length:
            raise Bad("its payload's lengths contradict each other")
        try:
            plain = ZSTD[0](body, length)
        except Exception:
            plain = None
    elif method == 2:
        try:
            inflater = zlib.decompressobj()
            plain = inflater.decompress(body, length + 1)
            if not inflater.eof and len(plain) <= length:
                plain += inflater.flush()
        except zlib.error:
            plain = None
    else:
        raise Bad("its payload is compressed in a way (%d) that this decoder "
                  "does not know" % method)
    if plain is None or len(plain) != length:
        raise Bad("its payload does not decompress to what it should be")
    return plain


def open_object(path):
    """A file of the repository. Whoever put a pipe there, or a device, does
    not have us wait for it."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    fd = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_file(path, limit, opened=open_object):
    try:
        with opened(path) as f:
            data = f.read(limit + 1)
    except OSError as e:
        raise Bad("cannot read %s: %s"
                  % (os.fsdecode(path), e.strerror or e)) from None
    if len(data) > limit:
        raise Bad("%s is longer than the %d bytes it may have"
                  % (os.fsdecode(path), limit))
    return data


def read_own(path, limit):
    """A file that the caller named, which may be a pipe."""
    return read_file(path, limit, lambda name: open(name, "rb"))


# ---- The repository -------------------------------------------------------

class Cipher:
    """Opens the sections of one object."""

    def __init__(self, header, key):
        self.header, self.gcm = header, gcm(key)

    def open(self, ordinal, sealed):
        n = struct.pack("<Q", ordinal)
        plain = self.gcm.decrypt(bytes(4) + n, sealed, self.header + n)
        if plain is None:
            raise Bad("it does not open: its bytes are damaged, or were "
                      "sealed with another key")
        return plain


class Pack:
    """Where a pack's chunks are."""

    def __init__(self, name, size, kind, chunks, room=0):
        self.name, self.size, self.kind = name, size, kind
        self.offsets = array.array("I")
        self.lengths = array.array("I")
        offset = HEADER
        for _, sealed, plain in chunks:
            self.offsets.append(min(offset, MAX_OBJECT))
            self.lengths.append(plain)
            offset += sealed
        self.offsets.append(min(offset, MAX_OBJECT))
        if offset + room > size or size > MAX_OBJECT:
            raise Bad("packs/%s: its chunks are longer than it" % name)


CHUNK_SHAPE = (bytes, MAX_OBJECT, MAX_CHUNK)


class Repository:
    what = "repository"

    def __init__(self, root, keys, privates, passphrase):
        self.root = root
        config = self.json("keepd.json")
        if config.get("format") != 1:
            raise Bad("the repository is of format %s, this decoder reads 1"
                      % config.get("format"))
        self.id = self.hex(config, "repository", 16, "keepd.json")
        self.privates = {
            sha256(b"keepd/1 public key fingerprint", public_key(p))[:8]: p
            for p in privates}
        self.masters, first = self.unlock(keys, passphrase)
        self.blake3 = library("blake3")
        self.chunk_key = hkdf(first, b"", b"keepd/1 chunk id")
        self.ciphers, self.plain = OrderedDict(), OrderedDict()
        self.plain_bytes = 0
        self.packs, self.chunks, self.more = [], {}, {}
        self.unlisted_read = False
        self.problems = 0
        self.load_index()

    def problem(self, text):
        self.problems += 1
        say(text)

    # -- plain objects

    def path(self, *parts):
        return os.path.join(self.root, *parts)

    def json(self, name):
        try:
            found = json.loads(read_file(self.path(name), MAX_SMALL).decode())
        except (ValueError, RecursionError):
            raise Bad("%s is not JSON" % name) from None
        if type(found) is not dict:
            raise Bad("%s is not a JSON object" % name)
        return found

    @staticmethod
    def hex(fields, name, length, where):
        value = fields.get(name)
        if type(value) is not str or not re.fullmatch("([0-9a-f]{2})*", value):
            raise Bad("%s: its %s is not hexadecimal" % (where, name))
        if length is not None and len(value) != 2 * length:
            raise Bad("%s: its %s has not %d bytes" % (where, name, length))
        return bytes.fromhex(value)

    def names(self, folder):
        try:
            return sorted(n for n in os.listdir(self.path(folder))
                          if re.fullmatch("[0-9a-f]{64}", n))
        except FileNotFoundError:
            return []
        except OSError as e:
            raise Bad("cannot list %s: %s"
                      % (self.path(folder), e.strerror or e)) from None

    def pack_names(self):
        try:
            folders = sorted(os.listdir(self.path("packs")))
        except FileNotFoundError:
            folders = []
        except OSError as e:
            raise Bad("cannot list %s: %s"
                      % (self.path("packs"), e.strerror or e)) from None
        for folder in folders:
            if re.fullmatch("[0-9a-f]{2}", folder):
                try:
                    names = self.names(os.path.join("packs", folder))
                except Bad as e:
                    self.problem(e)
                    continue
                for name in names:
                    yield name

    def named(self, folder, name, limit=MAX_OBJECT):
        data = read_file(self.path(folder, name), limit)
        if hashlib.sha256(data).hexdigest() != name:
            raise Bad("its SHA-256 is not its name")
        return data

    # -- keys

    def slots(self):
        """Where each key slot is, and what it is if that is known."""
        try:
            names = sorted(os.listdir(self.path("keys")))
        except OSError as e:
            raise Bad("cannot list %s: %s"
                      % (self.path("keys"), e.strerror)) from None
        return [("keys/" + n, None) for n in names if n.endswith(".json")]

    def unlock(self, keys, passphrase):
        """The master keys by epoch, and the first master key."""
        opened, wanted, refused, none = [], [], [], None
        slots = []
        for where, slot in self.slots():
            try:
                slot = self.json(where) if slot is None else slot
                for field in ("repository", "slot", "profile", "method",
                              "fingerprint", "salt", "wrapped"):
                    if type(slot.get(field)) is not str:
                        raise Bad("%s: it has no %s" % (where, field))
                if type(slot.get("kdf", "")) is not str:
                    raise Bad("%s: its kdf is no text" % where)
                if slot.get("format") != 1 or type(slot["format"]) is bool:
                    raise Bad("%s is of another format" % where)
                if slot["repository"] != self.id.hex():
                    raise Bad("%s belongs to another %s" % (where, self.what))
                slots.append((where, slot))
            except Bad as e:
                say(e)
        for where, slot in slots:
            method, prints = slot["method"], slot["fingerprint"]
            try:
                if method == "none":
                    none = none or (where, slot)
                elif method == "key-file":
                    wanted.append("the key file of profile %r with "
                                  "fingerprint %s" % (slot["profile"], prints))
                    for key in keys:
                        if self.fingerprint(key) == prints:
                            opened.append(self.unwrap(slot, key, where))
                elif method == "passphrase":
                    wanted.append("the passphrase of profile %r"
                                  % slot["profile"])
                elif method == "pkcs11":
                    wanted.append("the token of profile %r (this decoder "
                                  "cannot ask tokens: it needs another key)"
                                  % slot["profile"])
                else:
                    wanted.append("profile %r by a method (%s) that this "
                                  "decoder does not know"
                                  % (slot["profile"], method))
            except Bad as e:
                refused.append(str(e))
        given = bool(keys)
        asked = [s for s in slots if s[1]["method"] == "passphrase"]
        if not opened and asked:
            secret = passphrase(asked[0][1]["profile"])
            given = given or secret is not None
            for where, slot in asked if secret is not None else ():
                try:
                    key = self.stretch(secret, slot, where)
                    if self.fingerprint(key) == slot["fingerprint"]:
                        opened.append(self.unwrap(slot, key, where))
                        break
                except Bad as e:
                    refused.append(str(e))
        if not opened and none and not given and not wanted:
            opened.append(self.epochs(
                self.hex(none[1], "wrapped", None, none[0]), none[0]))
        if opened:
            # Slots that were left behind by a re-encryption know less.
            return max(opened, key=lambda o: max(o[0]))
        for text in refused:
            say(text)
        if none:
            raise Bad("%s says that the repository is not encrypted, but %s: "
                      "refused, for whoever can write to the storage could "
                      "have put it there%s" % (
                          none[0], "a key was given" if given else
                          "others ask for a key",
                          " (--no-key opens what is not encrypted)"
                          if given and not wanted else ""))
        raise Bad("no key that was given opens the %s; it wants %s" % (
            self.what, "; or ".join(wanted) or "a key slot, and has none"))

    @staticmethod
    def fingerprint(key):
        return sha256(b"keepd/1 key fingerprint", key)[:8].hex()

    @staticmethod
    def stretch(secret, slot, where):
        match = re.fullmatch("argon2id m=([0-9]{1,9}) t=([0-9]{1,9}) "
                             "p=([0-9]{1,9})", slot.get("kdf", ""))
        if not match:
            raise Bad("%s: its kdf is not argon2id" % where)
        m, t, p = map(int, match.groups())
        if not (19456 <= m <= 1048576 and 2 <= t <= 16 and 1 <= p <= 16):
            raise Bad("%s: its kdf (%s) is out of bounds and refused"
                      % (where, slot["kdf"]))
        salt = Repository.hex(slot, "salt", 32, where)
        return argon2id(secret, salt, m, t, p)

    @classmethod
    def unwrap(cls, slot, key, where):
        salt = cls.hex(slot, "salt", 32, where)
        aad = b""
        for field in ("format", "repository", "slot", "profile", "method",
                      "fingerprint", "salt", "kdf"):
            if field in slot:
                text = str(slot[field]).encode("utf-8", "surrogatepass")
                aad += struct.pack("<I", len(text)) + text
        plain = gcm(hkdf(key, salt, b"keepd/1 key slot")).decrypt(
            bytes(12), cls.hex(slot, "wrapped", None, where), aad)
        if plain is None:
            raise Bad("%s does not open" % where)
        return cls.epochs(plain, where)

    @staticmethod
    def epochs(plain, where):
        if len(plain) == 32:
            return {0: plain}, plain
        first, rest = plain[:32], plain[32:]
        masters, last = {}, 0
        if not rest or len(rest) % 34:
            raise Bad("%s: its keys have another length" % where)
        for at in range(0, len(rest), 34):
            epoch = int.from_bytes(rest[at:at + 2], "little")
            if epoch <= last:
                raise Bad("%s: its epochs do not rise" % where)
            masters[epoch], last = rest[at + 2:at + 34], epoch
        return masters, first

    # -- sealed objects

    def cipher(self, header, kind):
        if len(header) < HEADER or header[:5] != b"KEEPD":
            raise Bad("it is no keepd object, or cut off")
        if header[5:8] != b"\0\0\1":
            raise Bad("it is of another format")
        if header[8] != kind:
            raise Bad("it is of kind %d, not %d" % (header[8], kind))
        if header[9] > (1 if kind == 1 else 0) or any(header[12:16]):
            raise Bad("it is sealed in a way this decoder does not know")
        if header[16:32] != self.id:
            raise Bad("it belongs to another repository")
        epoch = int.from_bytes(header[10:12], "little")
        if epoch not in self.masters:
            raise Bad("it is sealed with the master key of epoch %d; the key "
                      "slots have %s" % (epoch, sorted(self.masters)))
        return Cipher(header, hkdf(self.masters[epoch], header[32:64],
                                   KINDS[kind]))

    def body(self, kind, folder, name):
        """The CBOR of an index object, manifest or mark."""
        try:
            limit = MAX_SMALL if kind == 5 else MAX_OBJECT
            data = self.named(folder, name, limit)
            cipher = self.cipher(data[:HEADER], kind)
            plain = cipher.open(0, data[HEADER:])
            return Cbor.whole(payload(plain, limit))
        except Bad as e:
            raise Bad("%s/%s: %s" % (folder, name, e)) from None

    def load_index(self):
        indexes = []
        for name in self.names("index"):
            try:
                body = self.body(3, "index", name)
                shaped(body, ([(bytes, MAX_OBJECT, 2, [CHUNK_SHAPE])],
                              [bytes]), "index")
                indexes.append((name, body))
            except Bad as e:
                say("%s (its packs say themselves what they hold)" % e)
        old = {s.hex() for _, body in indexes for s in body[1]}
        for name, (packs, _) in indexes:
            for pack, size, kind, chunks in packs if name not in old else ():
                try:
                    self.add(chunk_id(pack).hex(), size, kind, chunks)
                except Bad as e:
                    say("index/%s: %s" % (name, e))

    def add(self, name, size, kind, chunks, room=0):
        number = len(self.packs)
        self.packs.append(Pack(name, size, kind, chunks, room))
        for ordinal, (chunk, _, _) in enumerate(chunks):
            place = number << 24 | ordinal
            if self.chunks.setdefault(chunk_id(chunk), place) != place:
                self.more.setdefault(chunk, []).append(place)

    def pack_path(self, name):
        return self.path("packs", name[:2], name)

    def footer(self, name):
        """Kind, size and chunks of a pack by itself, the length of what
        follows the chunks, and the bytes of a sealed pack key."""
        path = self.pack_path(name)
        try:
            with open_object(path) as f:
                size = f.seek(0, 2)
                if not HEADER + TAG + 4 <= size <= MAX_OBJECT:
                    raise Bad("its length (%d) is out of bounds" % size)
                f.seek(0)
                header = f.read(HEADER)
                f.seek(size - 4)
                length = int.from_bytes(f.read(4), "little")
                if not TAG <= length <= min(size - HEADER - 4, MAX_FOOTER):
                    raise Bad("its footer is out of bounds")
                extra = SEALED_KEY if header[9] == 1 else 0
                f.seek(max(0, size - 4 - length - extra))
                tail = f.read(length + extra)
        except OSError as e:
            raise Bad("cannot read it: %s" % (e.strerror or e)) from None
        kind = header[8]
        if kind not in (1, 2):
            raise Bad("it is no pack")
        sealed = tail[extra:]
        chunks = shaped(Cbor.whole(self.cipher(header, kind).open(
            FOOTER, sealed)), [CHUNK_SHAPE], "footer")
        return kind, size, chunks, length + 4 + extra, tail[:extra]

    def read_unlisted(self):
        """Packs that no index lists, from their footers."""
        self.unlisted_read = True
        known = {p.name for p in self.packs}
        for name in self.pack_names():
            if name not in known:
                try:
                    kind, size, chunks, room, _ = self.footer(name)
                    self.add(name, size, kind, chunks, room)
                except Bad as e:
                    say("packs/%s: %s" % (name, e))

    def pack_cipher(self, pack):
        """Opens a pack's chunks."""
        if pack.name in self.ciphers:
            self.ciphers.move_to_end(pack.name)
            return self.ciphers[pack.name]
        path = self.pack_path(pack.name)
        try:
            with open_object(path) as f:
                header = f.read(HEADER)
        except OSError as e:
            raise Bad("cannot read it: %s" % (e.strerror or e)) from None
        cipher = self.cipher(header, pack.kind)
        if header[9] == 1:
            cipher = self.write_only(pack.name, header)
        self.ciphers[pack.name] = cipher
        if len(self.ciphers) > 256:
            self.ciphers.popitem(last=False)
        return cipher

    def write_only(self, name, header):
        # Anybody can seal something to a public key: only its name in the
        # index tells that this is the pack that was written.
        self.named(os.path.join("packs", name[:2]), name)
        sealed = self.footer(name)[4]
        pair = sealed[:8]
        if pair not in self.privates:
            raise NoPrivateKey("it is write-only and opens with the private "
                               "key of fingerprint %s, which was not given"
                               % pair.hex())
        key = hpke_open(self.privates[pair], sealed[8:40], sealed[40:],
                        b"keepd/1 pack key", header)
        if key is None or len(key) != 32:
            raise Bad("its pack key does not open")
        return Cipher(header, key)

    def checked(self, chunk, pack, ordinal, sealed):
        plain = payload(self.pack_cipher(pack).open(ordinal, sealed),
                        MAX_CHUNK)
        if len(plain) != pack.lengths[ordinal]:
            raise Bad("a chunk has another length than the index says")
        if self.blake3 and self.blake3.blake3(
                plain, key=self.chunk_key).digest() != chunk:
            raise Bad("a chunk is another than its id says")
        return plain

    def chunk(self, chunk):
        """A chunk's plaintext; the last 64 MiB of them are remembered."""
        if chunk in self.plain:
            self.plain.move_to_end(chunk)
            return self.plain[chunk]
        if chunk not in self.chunks and not self.unlisted_read:
            self.read_unlisted()
        if chunk not in self.chunks:
            raise Bad("chunk %s is in no pack" % chunk.hex())
        error, plain = None, None
        for place in [self.chunks[chunk]] + self.more.get(chunk, []):
            pack, ordinal = self.packs[place >> 24], place & 0xFFFFFF
            start, end = pack.offsets[ordinal:ordinal + 2]
            try:
                try:
                    with open_object(self.pack_path(pack.name)) as f:
                        f.seek(start)
                        sealed = f.read(end - start)
                except OSError as e:
                    raise Bad("cannot read it: %s"
                              % (e.strerror or e)) from None
                plain = self.checked(chunk, pack, ordinal, sealed)
                break
            except Bad as e:
                error = type(e)("packs/%s: %s" % (pack.name, e))
        if plain is None:
            raise error
        self.plain[chunk] = plain
        self.plain_bytes += len(plain)
        while self.plain_bytes > 64 * MIB:
            self.plain_bytes -= len(self.plain.popitem(last=False)[1])
        return plain

    # -- backups

    def backups(self):
        """All that can be read, the oldest first."""
        found = []
        for name in self.names("backups"):
            try:
                found.append(Backup(name, self.body(4, "backups", name)))
            except Bad as e:
                self.problem(e)
                continue
            for source in found[-1].sources:
                if source.odd:
                    self.problem(
                        "backups/%s: refused: the source name %s leads "
                        "elsewhere" % (name, shown(source.name)))
        by_name = {b.name: b for b in found}
        marks = []
        for name in self.names("marks"):
            try:
                m = self.body(5, "marks", name)
                if type(m) is dict and type(m.get(1)) is bytes:
                    marks.append((str(m.get(3)), name, m[1].hex(), m.get(2)))
            except Bad as e:
                say(e)
        for _, _, backup, kind in sorted(marks, key=lambda m: m[:2]):
            if backup in by_name and kind in ("accept", "suspect"):
                by_name[backup].outcome = {"accept": "good"}.get(kind, kind)
        return sorted(found, key=lambda b: (b.sequence, b.name))

    def backup(self, name, job=None):
        found = [b for b in self.backups() if job in (None, b.job)]
        if not found:
            raise Bad("there is no backup%s that can be read"
                      % (" of job %s" % job if job else ""))
        if name == "latest":
            good = [b for b in found if b.outcome == "good"
                    and b.type != "pre-restore"]
            if not good:
                raise Bad("no backup is good; name one that 'list' shows")
            return good[-1]
        named = [b for b in found
                 if b.name.startswith(name) or b.id.startswith(name)]
        if len(named) != 1 or not name:
            raise Bad("%s backups have an id that begins with %s"
                      % (len(named) or "no", name))
        return named[0]

    def entries(self, source):
        """The entries of a source. Pages that cannot be read and names that
        lead elsewhere are problems, and left out."""
        for page, first in source.pages:
            try:
                body = Cbor.whole(self.chunk(page))
                table, entries = shaped(body, ([bytes], [list]), "page")
                for c in table:
                    chunk_id(c)
            except Bad as e:
                self.problem("%s: what begins with %s is not readable: %s"
                             % (source.name, shown(first), e))
                continue
            before = b""
            for fields in entries:
                try:
                    entry = Entry(fields, before, table)
                except Bad as e:
                    self.problem("%s: what follows %s in its page is not "
                                 "readable: %s" % (
                                     source.name,
                                     shown(before) or "the beginning", e))
                    break
                before = entry.path
                if odd_path(entry.path):
                    self.problem("%s: refused: the name %s leads elsewhere"
                                 % (source.name, shown(entry.path)))
                    continue
                yield entry

    def segments(self, entry):
        """(chunk or None, offset, length) in order; None is a hole"""
        if entry.form == 0:
            return triples(entry.parts, entry.table)
        return self.listed(entry)

    def listed(self, entry):
        for n in entry.parts:
            if n >= len(entry.table):
                raise Bad("a list is outside its table")
            table, parts = shaped(Cbor.whole(self.chunk(entry.table[n])),
                                  ([bytes], [FOOTER]), "list")
            for segment in triples(parts, [chunk_id(c) for c in table]):
                yield segment


class NoPrivateKey(Bad):
    pass


def triples(parts, table):
    if len(parts) % 3:
        raise Bad("its segments are no triples")
    for at in range(0, len(parts), 3):
        t, offset, length = parts[at:at + 3]
        if t > len(table):
            raise Bad("a segment is outside its table")
        yield (table[t - 1] if t else None), offset, length


def odd_path(path):
    return path != b"" and any(c in (b"", b".", b"..") or b"\0" in c
                               for c in path.split(b"/"))


class Entry:
    """A file, directory or link of a source."""

    def __init__(self, fields, before, table):
        u32 = (1 << 32) - 1
        if len(fields) != 12:
            raise Bad("an entry has another length")
        shaped(fields[:6] + fields[8:10],
               (len(before), bytes, 3, 0o7777, u32, u32, FOOTER, FOOTER),
               "entry")
        shaped(fields[6], (int, 999999999), "time")
        shaped(fields[11], dict, "entry")
        self.path = before[:fields[0]] + fields[1]
        self.kind, self.mode, self.uid, self.gid = fields[2:6]
        self.mtime = fields[6][0] * 10**9 + fields[6][1]
        self.size, self.table = fields[9], table
        self.form, self.parts = 0, ()
        if self.kind == FILE:
            shaped(fields[10], (bytes, 1, [FOOTER]), "content")
            self.form, self.parts = fields[10][1:]
        extra = fields[11]
        self.target = shaped(extra.get(1, b""), bytes, "target")
        self.xattrs = shaped(extra.get(2, []), [(bytes, bytes)], "attributes")


class Source:
    def __init__(self, body):
        shaped(body, dict, "source")
        self.name = shaped(body.get(0), str, "source's name")
        self.origin = body.get(2)
        if type(self.origin) is not bytes:
            self.origin = b""
        self.pages = shaped(body.get(3), [(bytes, bytes)], "list of pages")
        for page, _ in self.pages:
            chunk_id(page)
        self.odd = not self.name or "/" in self.name or odd_path(
            self.name.encode("utf-8", "surrogatepass"))


class Backup:
    def __init__(self, name, body):
        self.name = name
        try:
            shaped(body, dict, "manifest")
            if body.get(0) != 1:
                raise Bad("it is of another format")
            self.sequence = shaped(body.get(2), FOOTER, "sequence")
            text = {n: shown(body.get(n) if body.get(n) is not None else "-")
                    for n in (4, 6, 8, 9, 10)}
            self.job, self.started, self.type = text[4], text[6], text[8]
            self.outcome, self.title = text[9], text[10]
            origin = body.get(22)
            self.id = origin.hex() if type(origin) is bytes else name
            self.sources = [Source(s) for s in
                            shaped(body.get(14), list, "list of sources")]
            pairs = [(FOOTER, str)]
            self.users = dict(shaped(body.get(15) or [], pairs, "users"))
            self.groups = dict(shaped(body.get(16) or [], pairs, "groups"))
        except Bad as e:
            raise Bad("backups/%s: %s" % (name, e)) from None


# ---- What it does ---------------------------------------------------------

# What the next file would meet as well.
FULL = {errno.ENOSPC, errno.EIO, errno.EROFS, getattr(errno, "EDQUOT", -1)}


class Restore:
    """Writes a backup to a new directory. Symlinks are made when everything
    else is there, so nothing can be written through one."""

    def __init__(self, repository, backup, target, paths, damaged):
        self.repository, self.backup = repository, backup
        self.target = os.fsencode(target)
        self.paths = [p.strip(b"/") for p in map(os.fsencode, paths)]
        self.damaged = damaged
        self.matched = set()
        self.files = self.bytes = self.warnings = 0
        self.root = getattr(os, "geteuid", lambda: -1)() == 0
        self.ids = {}

    def warn(self, text):
        self.warnings += 1
        if self.warnings <= 20:
            say("warning: " + text)

    def selected(self, full):
        if not self.paths:
            return True
        hits = [p for p in self.paths
                if full == p or full.startswith(p + b"/")]
        self.matched.update(hits)
        return bool(hits)

    def run(self):
        root = os.path.realpath(os.fsencode(self.repository.root))
        target = os.path.realpath(self.target)
        if target == root or target.startswith(root.rstrip(b"/") + b"/"):
            raise Bad("%s lies in the repository, in which nothing is written:"
                      " name another directory" % os.fsdecode(self.target))
        try:
            os.mkdir(self.target, 0o700)
        except FileExistsError:
            try:
                if os.listdir(self.target):
                    raise Bad("%s is not empty, and nothing is overwritten: "
                              "name a new directory"
                              % os.fsdecode(self.target))
            except NotADirectoryError:
                raise Bad("%s is not a directory"
                          % os.fsdecode(self.target)) from None
        except OSError as e:
            raise Bad("cannot make %s: %s" % (
                os.fsdecode(self.target), e.strerror or e)) from None
        try:
            self.sources()
        except OSError as e:
            raise Bad("cannot write to %s: %s; what is there is not whole"
                      % (os.fsdecode(self.target), e.strerror or e)) from None
        for path in self.paths:
            if path not in self.matched:
                self.repository.problem("the backup has nothing called %s"
                                        % shown(path))
        if self.warnings > 20:
            say("warning: and %d more" % (self.warnings - 20))
        if hasattr(os, "sync"):
            os.sync()

    def sources(self):
        for source in self.backup.sources:
            if not source.odd:  # else named when the backup was read
                self.source(source)

    def source(self, source):
        name = source.name.encode("utf-8", "surrogatepass")
        self.made, late = set(), []
        # Links whose first name is not asked for get its contents.
        stand_in = {}
        if self.paths:
            for e in self.repository.entries(source):
                if e.kind == HARDLINK and self.selected(name + b"/" + e.path) \
                        and not self.selected(name + b"/" + e.target):
                    stand_in.setdefault(e.target, e.path)
        alone = None
        for e in self.repository.entries(source):
            if e.path == b"" and e.kind == FILE:
                e.path = source.origin.rsplit(b"/", 1)[-1]
                if odd_path(e.path) or not e.path:
                    self.repository.problem(
                        "not restored: %s: refused: the name %s leads "
                        "elsewhere" % (source.name, shown(source.origin)))
                    continue
                alone = e.path
            full = name + b"/" + e.path if e.path else name
            if not self.selected(full):
                if e.kind != FILE or e.path not in stand_in:
                    continue
                e.path = stand_in[e.path]
                full = name + b"/" + e.path
            where = os.path.join(self.target, full)
            try:
                self.parents(full)
                if e.kind == DIRECTORY:
                    if full not in self.made:
                        os.mkdir(where, 0o700)
                        self.made.add(full)
                    e.table = None
                    late.append((e, where))
                elif e.kind == FILE:
                    self.file(e, where, full)
                elif stand_in.get(e.target) != e.path or e.kind == SYMLINK:
                    e.table = None
                    late.append((e, where))
            except FileExistsError:
                self.repository.problem("not restored: %s: there are two of "
                                        "that name" % shown(full))
            except (OSError, ValueError, OverflowError, Bad) as error:
                self.not_restored(shown(full), error)
        self.links(name, late, stand_in, alone)
        for e, where in reversed(late):
            if e.kind == DIRECTORY:
                self.describe(e, where)

    def not_restored(self, what, error):
        """One entry that this target does not take; the rest goes on, but
        where it would meet the same."""
        if isinstance(error, OSError) and error.errno in FULL:
            raise error
        self.repository.problem("not restored: %s: %s" % (
            what, getattr(error, "strerror", None) or error))

    def parents(self, full):
        parts = full.split(b"/")
        for n in range(1, len(parts)):
            parent = b"/".join(parts[:n])
            if parent not in self.made:
                try:
                    os.mkdir(os.path.join(self.target, parent), 0o700)
                except FileExistsError:
                    raise Bad("refused: it lies in what is no directory") \
                        from None
                self.made.add(parent)

    def file(self, e, where, full):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        fd = os.open(where, flags, 0o600)
        try:
            with os.fdopen(fd, "wb") as f:
                self.contents(e, f, full)
        except BaseException:
            os.unlink(where)
            raise
        self.files += 1
        self.describe(e, where)

    def contents(self, e, f, full):
        at = 0
        for chunk, offset, length in self.repository.segments(e):
            if at + length > e.size:
                raise Bad("its pieces are longer than it")
            if chunk is not None:
                try:
                    piece = self.repository.chunk(chunk)[offset:][:length]
                    if len(piece) != length:
                        raise Bad("a piece of it lies outside its chunk")
                    f.seek(at)
                    f.write(piece)
                    self.bytes += length
                except Bad as error:
                    if not self.damaged:
                        raise
                    self.repository.problem(
                        "%s: bytes %d to %d are lost and zeros now: %s"
                        % (shown(full), at, at + length - 1, error))
            at += length
        if at != e.size:
            raise Bad("its pieces do not sum up to its size")
        f.truncate(e.size)

    def links(self, name, late, stand_in, alone):
        for kind in (HARDLINK, SYMLINK):
            for e, where in late:
                if e.kind != kind:
                    continue
                try:
                    if kind == SYMLINK:
                        os.symlink(e.target, where)
                        self.owner(e, where)
                        os.utime(where, ns=(e.mtime, e.mtime),
                                 follow_symlinks=False)
                        continue
                    target = stand_in.get(e.target, e.target)
                    if odd_path(target):
                        raise Bad("refused: it links to %s, which leads "
                                  "elsewhere" % shown(e.target))
                    first = os.path.join(self.target, name, target)
                    if not os.path.lexists(first):
                        raise Bad("what it links to, %s, is not there"
                                  % shown(e.target))
                    if not stat.S_ISREG(os.lstat(first).st_mode):
                        raise Bad("refused: it links to %s, which is no file"
                                  % shown(e.target))
                    try:
                        os.link(first, where)
                    except FileExistsError:
                        raise
                    except OSError:
                        self.copy(first, where)
                except (OSError, ValueError, OverflowError, Bad) as error:
                    self.not_restored(
                        "the link " + shown(name + b"/" + e.path), error)

    @staticmethod
    def copy(first, where):
        try:
            shutil.copy2(first, where)
        except BaseException:
            if os.path.lexists(where):
                os.unlink(where)
            raise

    def owner(self, e, where):
        if not self.root:
            return True
        ids = []
        for number, names, module, field in (
                (e.uid, self.backup.users, "pwd", "pw_uid"),
                (e.gid, self.backup.groups, "grp", "gr_gid")):
            if (module, number) not in self.ids:
                found = number
                if number in names:
                    try:
                        look = getattr(__import__(module),
                                       "getpwnam" if module == "pwd"
                                       else "getgrnam")
                        found = getattr(look(names[number]), field)
                    except (KeyError, ValueError):
                        pass
                self.ids[module, number] = found
            ids.append(self.ids[module, number])
        try:
            os.chown(where, ids[0], ids[1], follow_symlinks=False)
            return True
        except OSError as error:
            self.warn("%s: its owner could not be set: %s"
                      % (shown(where), error.strerror))
            return False

    def describe(self, e, where):
        def attributes(security):
            for key, value in e.xattrs:
                # A new owner takes a file its capabilities.
                if key.startswith(b"security.") == security:
                    try:
                        os.setxattr(where, key, value)
                    except (OSError, ValueError, AttributeError) as error:
                        self.warn("%s: the attribute %s could not be set: %s"
                                  % (shown(where), shown(key), error))

        attributes(False)
        owned = self.owner(e, where)
        attributes(True)
        # Set-user-ID for another owner than meant would hand out rights.
        mine = self.root and owned or not self.root \
            and getattr(os, "geteuid", lambda: -1)() == e.uid
        try:
            os.chmod(where, e.mode & (0o7777 if mine else 0o1777))
            os.utime(where, ns=(e.mtime, e.mtime))
        except (OSError, OverflowError) as error:
            self.warn("%s: its mode or time could not be set: %s"
                      % (shown(where), error))


# ---- Archives -------------------------------------------------------------

SEGMENT, MAX_SLOTS, MAX_WINDOW = MIB + TAG, 32, 1 << 26


class Sealed(io.RawIOBase):
    """The plaintext of a sealed archive; gives nothing that is not proven."""

    def __init__(self, f, key, header):
        self.f, self.cipher, self.header = f, gcm(key), header
        self.number, self.plain, self.at, self.last = 0, b"", 0, False
        self.next = f.read(SEGMENT)

    def readable(self):
        return True

    def segment(self):
        sealed, self.next = self.next, self.f.read(SEGMENT)
        self.last = not self.next
        nonces = [struct.pack("<B3xQ", last, self.number)
                  for last in (self.last, not self.last)]
        self.plain = self.cipher.decrypt(nonces[0], sealed, self.header) \
            if len(sealed) >= TAG else None
        if self.plain is None:
            other = len(sealed) >= TAG and self.cipher.decrypt(
                nonces[1], sealed, self.header) is not None
            raise Bad("the archive is cut off after segment %d" % self.number
                      if other and self.last else
                      "something follows the end of the archive" if other else
                      "segment %d of the archive does not open: it is damaged,"
                      " cut off, or not in its place" % self.number)
        self.number, self.at = self.number + 1, 0

    def readinto(self, into):
        while self.at == len(self.plain):
            if self.last:
                return 0
            self.segment()
        piece = self.plain[self.at:self.at + len(into)]
        into[:len(piece)] = piece
        self.at += len(piece)
        return len(piece)


class Frames(io.RawIOBase):
    """zstd by the system's library, frame by frame: of 4 MiB at most."""

    def __init__(self, f):
        self.f, self.lib, self.data, self.plain = f, shared_library("zstd"), \
            b"", b""
        self.find = self.lib.ZSTD_findFrameCompressedSize
        self.find.restype = ctypes.c_size_t
        self.find.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        self.run = zstd_library()

    def readable(self):
        return True

    def readinto(self, into):
        while not self.plain:
            if not self.data:
                self.data = self.f.read(4 * MIB)
            if not self.data:
                return 0
            size = self.find(self.data, len(self.data))
            while size > len(self.data):
                most = 4 * MIB if len(self.data) < 8 * MIB else 0
                more = self.f.read(most)
                if not more:
                    raise Bad("the archive's zstd stream is damaged or cut"
                              " off")
                self.data += more
                size = self.find(self.data, len(self.data))
            frame, self.data = self.data[:size], self.data[size:]
            length = frame_length(frame)
            if length is None or length > 4 * MIB:
                raise Bad("the archive's zstd stream is not as keepd makes it:"
                          " install the Python package zstandard")
            self.plain = self.run(frame, length)
            if len(self.plain) != length:
                raise Bad("the archive's zstd stream is damaged")
        n = min(len(into), len(self.plain))
        into[:n], self.plain = self.plain[:n], self.plain[n:]
        return n


class Program(io.RawIOBase):
    """zstd by the program."""

    def __init__(self, f, path):
        self.f, self.failed = f, None
        self.child = subprocess.Popen(
            [path, "-dcq", "--single-thread", "--memory=64MB"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        self.feeder = threading.Thread(target=self.feed, daemon=True)
        self.feeder.start()

    def readable(self):
        return True

    def feed(self):
        try:
            shutil.copyfileobj(self.f, self.child.stdin, MIB)
        except BrokenPipeError:
            pass
        except Exception as e:
            self.failed = e
        try:
            self.child.stdin.close()
        except OSError:
            pass

    def readinto(self, into):
        data = self.child.stdout.read(len(into))
        if not data:
            self.feeder.join()
            if self.failed:
                raise self.failed
            if self.child.wait() != 0:
                raise Bad("the archive's zstd stream is damaged or cut off")
        into[:len(data)] = data
        return len(data)

    def close(self):
        if not self.closed:
            self.child.kill()
            self.child.wait()
            self.child.stdout.close()
            self.feeder.join()
        super().close()


def unzstd(f):
    package, own = library("zstandard"), library("compression.zstd")
    if package:
        return package.ZstdDecompressor(max_window_size=MAX_WINDOW) \
            .stream_reader(f, read_across_frames=True)
    if own:
        return own.ZstdFile(f)
    lib = shared_library("zstd")
    if lib and hasattr(lib, "ZSTD_findFrameCompressedSize"):
        return Frames(f)
    path = None if "zstd" in AVOID else shutil.which("zstd")
    if not path:
        raise Bad("this needs zstd: install the Python package zstandard, or "
                  "the program zstd")
    return Program(f, path)


class Member:
    """An entry of an archive, as Entry is one of a repository."""
    table = None

    def __init__(self, info, path):
        def text(value):
            return value.encode("utf-8", "surrogateescape")

        self.path, self.info = path, info
        self.kind = (FILE if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
                     and not info.issparse() else
                     DIRECTORY if info.isdir() else
                     SYMLINK if info.issym() else
                     HARDLINK if info.islnk() else None)
        if self.kind is None:
            raise Bad("%s is no file, directory or link" % shown(info.name))
        self.mode, self.uid, self.gid = info.mode & 0o7777, info.uid, info.gid
        self.size = info.size if self.kind == FILE else 0
        self.target = text(info.linkname)
        whole, _, part = info.pax_headers.get(
            "mtime", "%d" % info.mtime).lstrip("-").partition(".")
        self.mtime = int(whole) * 10**9 + int((part + "0" * 9)[:9])
        if info.mtime < 0:
            self.mtime = -self.mtime
        prefix = "SCHILY.xattr."
        self.xattrs = [
            (text(key[len(prefix):]).replace(b"%3D", b"=")
             .replace(b"%25", b"%"), text(value))
            for key, value in info.pax_headers.items()
            if key.startswith(prefix)]


class ArchiveSource:
    def __init__(self, fields):
        self.name = fields["name"]
        self.origin = fields["place"]["path"].encode("utf-8", "surrogatepass")
        self.odd = not self.name or "/" in self.name or odd_path(
            self.name.encode("utf-8", "surrogatepass"))
        if self.odd:
            raise Bad("the archive has a source called %s" % shown(self.name))


class ArchiveBackup:
    """The backup that an archive is of."""

    def __init__(self, head, tail):
        origin, tail = head["origin"], tail or head
        self.id = origin["backup"]
        self.job, self.started, self.type = (
            shown(origin[k]) for k in ("job", "started", "type"))
        self.outcome = shown(tail.get("outcome") or origin.get("outcome"))
        self.sources = [ArchiveSource(s) for s in head["sources"]]
        self.users, self.groups = (
            {int(k): v for k, v in tail.get(n, {}).items()
             if type(v) is str} for n in ("users", "groups"))


class Archive(Repository):
    """A file that keepctl export made. It is read once for each look at it,
    and its contents are proven by the list in it."""
    what = "archive"

    def __init__(self, path, keys, privates, passphrase):
        self.root, self.problems = path, 0
        self.header = self.key = None
        self.privates = {
            sha256(b"keepd/1 public key fingerprint", public_key(p))[:8]
            .hex(): p for p in privates}
        with open_object(path) as f:
            start = f.read(HEADER)
            if start[:8] == b"KEEPDENC":
                self.unseal(start, f, keys, passphrase)

    def unseal(self, header, f, keys, passphrase):
        if len(header) != HEADER:
            raise Bad("the %s is cut off" % self.what)
        if header[8:12] != b"\1\x14\0\0":
            raise Bad("the %s is sealed in format %d, or its header is "
                      "damaged; this decoder reads 1" % (self.what, header[8]))
        size, = struct.unpack("<I", header[12:16])
        raw = f.read(size) if size <= MAX_SMALL else b""
        try:
            found = json.loads(raw.decode())
        except (ValueError, RecursionError):
            found = None
        if type(found) is not list or not 0 < len(found) <= MAX_SLOTS \
                or not all(type(s) is dict for s in found):
            raise Bad("the key slots of the %s are damaged" % self.what)
        self.header, self.id, self.start = header, header[16:32], HEADER + size
        self.found = [("key slot %d" % n, s) for n, s in enumerate(found)
                      if s.get("method") != "none"]
        master = self.sealed_to_public()
        if master is None:
            master = self.unlock(keys, passphrase)[1]
        self.key = hkdf(master, header[32:64], b"keepd/1 archive")

    def slots(self):
        return self.found

    def sealed_to_public(self):
        for where, slot in self.found:
            if slot.get("method") != "public-key":
                continue
            private = self.privates.get(slot.get("fingerprint"))
            if private is None:
                raise Bad("no key that was given opens the %s; it wants "
                          "the private key %s"
                          % (self.what, shown(slot.get("fingerprint"))))
            wrapped = self.hex(slot, "wrapped", 80, where)
            master = hpke_open(private, wrapped[:32], wrapped[32:],
                               b"keepd/1 archive key", self.header)
            if master is None:
                raise Bad("%s does not open" % where)
            return master
        return None

    def opened(self):
        """What is sealed in it, or it itself."""
        f = open_object(self.root)
        if self.header is None:
            return f
        f.seek(self.start)
        return io.BufferedReader(Sealed(f, self.key, self.header), MIB)

    def unpacked(self):
        f = self.opened()
        magic = f.peek(4)[:4]
        if magic[:2] == b"\x1f\x8b":
            return gzip.GzipFile(fileobj=f)
        return unzstd(f) if magic == b"\x28\xb5\x2f\xfd" else f

    def members(self):
        """Each with a reader of its contents; to the very end, or an error.
        Nothing but what is wrong with the archive is raised from here."""
        began = False
        try:
            f = self.unpacked()
            try:
                tar = tarfile.open(fileobj=f, mode="r|", bufsize=MIB,
                                   encoding="utf-8", errors="surrogateescape")
                while True:
                    info = tar.next()
                    if info is None:
                        break
                    tar.members, began = [], True
                    yield info, tar.extractfile(info) if info.isreg() else None
                # Those who cut it, cut the end.
                if tar.fileobj.read(512) != bytes(512):
                    raise Bad("the archive is damaged, or cut off: it has no "
                              "end")
                rest = tar.fileobj.read(MIB)
                while rest:
                    if rest.strip(b"\0"):
                        raise Bad("something follows the end of the archive")
                    rest = tar.fileobj.read(MIB)
            finally:
                f.close()
        except Bad:
            raise
        except Exception as e:  # of tarfile, gzip and any zstd
            raise Bad(("the archive is damaged or cut off: %s" if began else
                       shown(self.root) + " is no archive of keepd, or a "
                       "damaged one: %s") % (e or type(e).__name__)) from None

    def listing(self, info, f):
        try:
            found = json.loads(f.read().decode())
            if type(found) is dict and type(found.get("archive")) is str:
                return found
        except (ValueError, RecursionError, MemoryError):
            pass
        raise Bad("%s of the archive is damaged" % info.name)

    def backups(self):
        """Reads its head, and its tail where it has one."""
        head = tail = None
        for info, f in self.members():
            if head is None:
                if info.name != "manifest.json" or not f:
                    raise Bad("%s is no archive of keepd: it does not begin "
                              "with manifest.json" % self.root)
                head = self.listing(info, f)
                if head.get("format") != 1:
                    raise Bad("the archive is of format %s, this decoder reads"
                              " 1" % shown(head.get("format")))
                if head.get("contents") != "last":
                    break
            elif info.name == "contents.json" and f:
                tail = self.listing(info, f)
        if head is None or head.get("contents") == "last" and tail is None:
            raise Bad("the archive is not whole")
        try:
            self.tail = tail is not None
            self.files = {}
            for line in (tail or head)["files"]:
                name = line["path"].encode("utf-8", "surrogatepass")
                if "base64" in line:
                    name = base64.b64decode(line["base64"], validate=True)
                self.files[name] = (line["size"], line["sha256"])
            return [ArchiveBackup(head, tail)]
        except (LookupError, TypeError, AttributeError, ValueError):
            raise Bad("manifest.json of the archive is damaged") from None

    def backup(self, name, job=None):
        return self.backups()[0]

    def entries(self, source):
        mine = source.name.encode("utf-8", "surrogatepass")
        last, first = None, True
        left = {n for n in self.files if n.split(b"/", 1)[0] == mine}
        for info, f in self.members():
            if first or info.name == "contents.json" and self.tail:
                first = False
                continue
            full = info.name.encode("utf-8", "surrogateescape").rstrip(b"/")
            name, _, path = full.partition(b"/")
            if name != mine:
                continue
            if odd_path(path):
                self.problem("not restored: %s: refused: it leads elsewhere"
                             % shown(full))
                continue
            order = [path] if not path else path.split(b"/")
            if last is not None and order <= last and path:
                self.problem("not restored: %s: refused: it does not stand "
                             "where it belongs" % shown(full))
                continue
            last = order if path else []
            try:
                e = Member(info, path)
            except (Bad, ValueError) as error:
                self.problem("not restored: refused: %s" % error)
                continue
            if e.kind == FILE:
                left.discard(full)
            if e.kind == HARDLINK:
                of, _, target = e.target.partition(b"/")
                if of != mine or odd_path(target):
                    self.problem("not restored: %s: refused: it links to %s, "
                                 "which leads elsewhere"
                                 % (shown(full), shown(e.target)))
                    continue
                e.target = target
            e.form = (full, f)
            yield e
        for name in sorted(left):
            self.problem("%s is in the archive's list of files, and not in it"
                         % shown(name))

    def proven(self, e, write):
        """Gives the contents of a file, and says whether they are those."""
        full, f = e.form
        total, digest = 0, hashlib.sha256()
        while True:
            try:
                piece = f.read(MIB)
            except Bad:
                raise
            except Exception as error:
                raise Bad("the archive is damaged or cut off: %s"
                          % error) from None
            if not piece:
                break
            write(piece)
            digest.update(piece)
            total += len(piece)
        if self.files.get(full) != (total, digest.hexdigest()):
            raise Bad("its contents are not those that were archived")
        return total

    def verify(self):
        files = total = 0
        for source in self.backup("").sources:
            for e in self.entries(source):
                if e.kind == FILE:
                    try:
                        total += self.proven(e, lambda piece: None)
                        files += 1
                    except Bad as error:
                        self.problem("%s: %s" % (shown(e.form[0]), error))
        if not self.problems:
            print("%d files with %d bytes are whole" % (files, total))

    def stream(self):
        with self.opened() as f:
            shutil.copyfileobj(f, sys.stdout.buffer, MIB)


class Configuration(Archive):
    """An export of keepd's configuration: JSON, compressed, sealed."""
    what = "configuration"

    @staticmethod
    def newest(directory):
        try:
            names = os.listdir(os.path.join(directory, "config"))
        except OSError as e:
            raise Bad("no configuration is stored in %s: cannot read config/: "
                      "%s" % (directory, e.strerror)) from None
        # By their times, whether they are sealed or not.
        names = sorted(n for n in names if re.fullmatch(
            r"config_backup_[0-9]{8}T[0-9]{6}Z\.json\.gz(\.enc)?", n))
        if not names:
            raise Bad("no configuration is stored in %s" % directory)
        return os.path.join(directory, "config", names[-1])

    def json(self):
        try:
            f = self.unpacked()
            try:
                data = more = f.read(MIB)
                while more and len(data) <= MAX_OBJECT:
                    more = f.read(MIB)
                    data += more
            finally:
                f.close()
        except Bad:
            raise
        except Exception as e:  # of gzip and any zstd
            raise Bad("%s is damaged or cut off: %s" % (
                self.root, e or type(e).__name__)) from None
        if len(data) > MAX_OBJECT:
            raise Bad("%s is longer than any configuration" % self.root)
        try:
            found = json.loads(data.decode())
            version = found.get("format_version")
            items = len(found["items"])
        except (ValueError, RecursionError, AttributeError, KeyError,
                TypeError):
            raise Bad("%s is no configuration of keepd" % self.root) from None
        if version != 1:
            raise Bad("the configuration is of format %s, this decoder reads 1"
                      % shown(version))
        if items != found.get("item_count"):
            raise Bad("%s is damaged: it has not as many items as it says"
                      % self.root)
        return data

    def write(self, to):
        data = self.json()
        if to is None:
            sys.stdout.buffer.write(data)
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        fd = os.open(to, flags | getattr(os, "O_BINARY", 0), 0o600)
        with os.fdopen(fd, "wb") as f:
            f.write(data)
        print("%s is in %s" % (shown(self.root), shown(to)))


class RestoreArchive(Restore):
    def contents(self, e, f, full):
        self.bytes += self.repository.proven(e, f.write)


def verify(repository):
    """Every object's SHA-256, every chunk of every pack, and that every
    backup finds what it refers to."""
    packs = chunks = unread = 0
    for name in repository.pack_names():
        try:
            data = repository.named(os.path.join("packs", name[:2]), name)
            kind, size, found, room, _ = repository.footer(name)
            pack = Pack(name, size, kind, found, room)
            if pack.offsets[-1] != size - room:
                raise Bad("its footer does not begin where its chunks end")
            packs += 1
            for ordinal, (chunk, _, _) in enumerate(found):
                start, end = pack.offsets[ordinal:ordinal + 2]
                repository.checked(chunk, pack, ordinal, data[start:end])
                chunks += 1
        except NoPrivateKey as e:
            unread += 1
            if unread == 1:
                say("packs/%s: %s; of such packs the names alone are checked"
                    % (name, e))
        except Bad as e:
            repository.problem("packs/%s: %s" % (name, e))
    for name in repository.names("condemned"):
        try:
            repository.named("condemned", name)
        except Bad as e:
            repository.problem("condemned/%s: %s" % (name, e))
    for name in repository.names("index"):
        try:
            repository.body(3, "index", name)
        except Bad as e:
            repository.problem(e)
    for name in repository.names("marks"):
        try:
            repository.body(5, "marks", name)
        except Bad as e:
            repository.problem(e)
    repository.read_unlisted()
    backups = repository.backups()
    seen = set()
    for backup in backups:
        for source in backup.sources:
            for e in repository.entries(source):
                try:
                    for chunk, _, _ in repository.segments(e):
                        if chunk is not None and chunk not in seen:
                            if chunk not in repository.chunks:
                                raise Bad("chunk %s is in no pack"
                                          % chunk.hex())
                            seen.add(chunk)
                except Bad as error:
                    repository.problem("backups/%s: %s/%s: %s" % (
                        backup.name, source.name, shown(e.path), error))
    if repository.problems:
        raise Bad("problems: %d; what else there is, is whole"
                  % repository.problems)
    print("%d backups, %d packs and %d chunks are whole; %s" % (
        len(backups), packs, chunks,
        "chunk ids were checked" if repository.blake3 else
        "chunk ids were not checked (install the Python package blake3)"))
    if unread:
        print("the contents of %d write-only packs were not checked: that "
              "needs the private key" % unread)


def ask_passphrase(path):
    """Gives a function that asks once, or reads it from a file."""
    def ask(profile):
        if path:
            secret = read_own(path, MAX_SMALL)
            # Editors end a file with a line feed.
            return re.sub(rb"\r?\n?\Z", b"", secret, count=1)
        try:
            open("/dev/tty").close()
        except OSError:
            if not sys.stdin or not sys.stdin.isatty():
                return None
        return getpass.getpass("Passphrase of profile %s: "
                               % shown(profile)).encode()
    return ask


def arguments():
    p = argparse.ArgumentParser(
        prog="keepd_decoder.py", usage=USAGE, epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    p.add_argument("--key", action="append", default=[], metavar="FILE")
    p.add_argument("--no-key", action="store_true",
                   help="do not use the key in this file itself")
    p.add_argument("--passphrase-file", metavar="FILE")
    p.add_argument("--job", help="of which job 'latest' is meant")
    p.add_argument("-o", dest="out", metavar="FILE",
                   help="where 'config' writes to: a new file, readable by "
                   "you alone; without it, standard output")
    p.add_argument("--damaged", action="store_true",
                   help="keep files of which something is lost, with zeros "
                   "in its place")
    p.add_argument("--avoid", default="", metavar="LIBRARY,...",
                   help="do not use cryptography, libcrypto, zstandard, "
                   "compression.zstd, libzstd, zstd or blake3")
    a = p.parse_intermixed_args()
    lengths = {"list": (0, 0), "ls": (1, 1), "verify": (0, 0),
               "restore": (2, 1 << 30), "config": (0, 0)}
    if a.words[:1] == ["config"]:
        # Also the other way round.
        a.words = (a.words[1:2] or ["."]) + ["config"] + a.words[2:]
    if a.words and os.path.isfile(a.words[0]):
        # Of an archive there is one backup.
        lengths = {"list": (0, 0), "ls": (0, 0), "verify": (0, 0),
                   "stream": (0, 0), "restore": (1, 1 << 30),
                   "config": (0, 0)}
    if a.words and a.words[0] in lengths:
        a.words.insert(0, ".")
    least, most = lengths.get(a.words[1] if len(a.words) > 1 else "", (1, 0))
    if not least <= len(a.words) - 2 <= most:
        p.error("name a REPOSITORY or an ARCHIVE, and one of list, ls, "
                "restore, verify, config (and stream of an archive), "
                "with what it wants")
    return a


def main():
    a = arguments()
    AVOID.update(a.avoid.split(","))
    keys, privates = [], []
    own = globals().get("__file__")
    for path in ([own] if own and not a.no_key else []) + a.key:
        more = read_keys(path, path != own)
        keys += more[0]
        privates += more[1]
    archive = os.path.isfile(a.words[0])
    if a.words[1] == "config":
        place = a.words[0] if archive else Configuration.newest(a.words[0])
        Configuration(place, keys, privates,
                      ask_passphrase(a.passphrase_file)).write(a.out)
        return
    repository = (Archive if archive else Repository)(
        a.words[0], keys, privates, ask_passphrase(a.passphrase_file))
    command, rest = a.words[1], a.words[2:]
    if archive and command in ("ls", "restore"):
        rest.insert(0, "latest")
    if command == "list":
        for b in repository.backups():
            print("%s  %s  %s  %s  %s  %s" % (
                b.id[:16], b.started, b.job, b.type, b.outcome,
                " ".join(shown(s.name) for s in b.sources)))
    elif command == "ls":
        for source in repository.backup(rest[0], a.job).sources:
            for e in repository.entries(source):
                path = e.path
                if not path and e.kind == FILE:
                    path = source.origin.rsplit(b"/", 1)[-1]
                print("%s %4o %12d %s" % ("fdlh"[e.kind], e.mode, e.size,
                                          shown(source.name) + "/"
                                          + shown(path)))
    elif command == "stream":
        repository.stream()
    elif command == "verify":
        repository.verify() if archive else verify(repository)
    else:
        restore = (RestoreArchive if archive else Restore)(
            repository, repository.backup(rest[0], a.job), rest[1], rest[2:],
            a.damaged)
        restore.run()
        print("%d files with %d bytes are in %s" % (
            restore.files, restore.bytes, shown(rest[1])))
    if repository.problems:
        raise Bad("problems: %d; not all is as it should be"
                  % repository.problems)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except Bad as e:
        say(e)
        sys.exit(1)
    except BrokenPipeError:
        os._exit(1)
    except KeyboardInterrupt:
        say("interrupted")
        os._exit(130)
    except (OSError, MemoryError) as e:
        say(str(e) or "not enough memory")
        sys.exit(1)
    except Exception as e:
        say("something was not as this decoder expects it (%s: %s)"
            % (type(e).__name__, e))
        sys.exit(1)
