#!/usr/bin/env python3
"""Writes small repositories of format 1 that keepd itself does not write (yet, or ever), from docs/format.md, for tests of readers.

usage: writer.py DIRECTORY [VARIANT...]

Makes DIRECTORY/VARIANT/repository for each (or all) and, beside it, what opens it: main.key, private.key, other.key, passphrase. VARIANTS below tells what there is. Keys
are fixed, salts random. Shares no code with the decoder; needs the packages cryptography and blake3.
"""
import hashlib
import hmac
import json
import os
import struct
import sys
import zlib

import blake3
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

PROFILE_KEY, OTHER_KEY, PRIVATE_KEY = bytes(range(32)), bytes(range(1, 33)), bytes(range(2, 34))
FIRST, SECOND, THIRD = b"\1" * 32, b"\2" * 32, b"\3" * 32
PASSPHRASE = "correct horse, b\u00e4ttery"
INFO = {1: b"keepd/1 data pack", 2: b"keepd/1 metadata pack", 3: b"keepd/1 index", 4: b"keepd/1 manifest", 5: b"keepd/1 mark"}
FILE, DIRECTORY, SYMLINK, HARDLINK = range(4)
TIME = [1_700_000_000, 5]
NOISE = b"".join(hashlib.sha256(struct.pack("<I", n)).digest() for n in range(12_000))


def cbor(v):
    def head(major, n):
        for code, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
            if n < 24:
                return bytes([major << 5 | n])
            if n < 1 << 8 * size:
                return bytes([major << 5 | code]) + n.to_bytes(size, "big")
    if v is None or v is True or v is False:
        return bytes([{False: 0xF4, True: 0xF5, None: 0xF6}[v]])
    if isinstance(v, int):
        return head(0, v) if v >= 0 else head(1, -1 - v)
    if isinstance(v, bytes):
        return head(2, len(v)) + v
    if isinstance(v, str):
        return head(3, len(v.encode())) + v.encode()
    if isinstance(v, (list, tuple)):
        return head(4, len(v)) + b"".join(map(cbor, v))
    return head(5, len(v)) + b"".join(cbor(k) + cbor(x) for k, x in v.items())


def derive(secret, salt, info):
    return HKDF(hashes.SHA256(), 32, salt or None, info).derive(secret)


def payload(plain, method=2):
    body = {0: lambda: plain, 2: lambda: zlib.compress(plain)}[method]()
    return bytes([method]) + struct.pack("<I", len(plain)) + body


def public_of(private):
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def hpke_seal(public, plain, info, aad, ephemeral=None):
    """RFC 9180, base mode, suite 0x0020, 0x0001, 0x0002: encapsulated key, ciphertext."""
    kem, suite = b"KEM" + bytes([0, 0x20]), b"HPKE" + bytes([0, 0x20, 0, 1, 0, 2])

    def extract(context, salt, label, ikm):
        return hmac.digest(salt, b"HPKE-v1" + context + label + ikm, "sha256")

    def expand(context, prk, label, data, length):
        return HKDFExpand(hashes.SHA256(), length, length.to_bytes(2, "big") + b"HPKE-v1" + context + label + data).derive(prk)

    ephemeral = ephemeral or os.urandom(32)
    enc = public_of(ephemeral)
    dh = X25519PrivateKey.from_private_bytes(ephemeral).exchange(X25519PublicKey.from_public_bytes(public))
    shared = expand(kem, extract(kem, b"", b"eae_prk", dh), b"shared_secret", enc + public, 32)
    context = b"\0" + extract(suite, b"", b"psk_id_hash", b"") + extract(suite, b"", b"info_hash", info)
    secret = extract(suite, shared, b"secret", b"")
    key, nonce = expand(suite, secret, b"key", context, 32), expand(suite, secret, b"base_nonce", context, 12)
    return enc, AESGCM(key).encrypt(nonce, plain, aad)


class Writer:
    def __init__(self, directory, masters=None, first=FIRST, epoch=0):
        self.root = os.path.join(directory, "repository")
        os.makedirs(os.path.join(self.root, "keys"))
        self.id = os.urandom(16)
        self.first, self.masters, self.epoch = first, masters or {0: first}, epoch
        self.chunk_key = derive(first, b"", b"keepd/1 chunk id")
        self.packs, self.slots = [], 0
        self.put("keepd.json", json.dumps({"format": 1, "repository": self.id.hex(), "created": "2026-01-01T00:00:00Z", "keepd_version": "test"}).encode())

    def put(self, name, data):
        path = os.path.join(self.root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "xb") as f:
            f.write(data)

    # Slots

    def keys(self):
        if self.masters == {0: self.first}:
            return self.first
        return self.first + b"".join(struct.pack("<H", e) + k for e, k in sorted(self.masters.items()) if e)

    def slot(self, method, key, kdf=None, keys=None, **changed):
        self.slots += 1
        salt = changed.pop("salt", None) or os.urandom(32)
        fields = {"format": 1, "repository": self.id.hex(), "slot": "%016x" % self.slots, "profile": "main", "method": method,
                  "fingerprint": hashlib.sha256(b"keepd/1 key fingerprint" + key).digest()[:8].hex() if key else "", "salt": salt.hex()}
        if kdf:
            fields["kdf"] = kdf
        aad = b"".join(struct.pack("<I", len(str(v).encode())) + str(v).encode() for v in fields.values())
        keys = keys or self.keys()
        wrapped = AESGCM(derive(key, salt, b"keepd/1 key slot")).encrypt(bytes(12), keys, aad) if key else keys
        fields.update(wrapped=wrapped.hex(), **changed)
        self.put("keys/%016x.json" % self.slots, json.dumps(fields).encode())

    def passphrase_slot(self, kdf="argon2id m=19456 t=2 p=1"):
        from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
        salt = os.urandom(32)
        m, t, p = (int(word[2:]) for word in kdf.split()[1:])
        key = Argon2id(salt=salt, length=32, iterations=t, lanes=p, memory_cost=m).derive(PASSPHRASE.encode()) if m < 1 << 20 else b"x" * 32
        self.slot("passphrase", key, kdf, salt=salt)

    # Objects

    def header(self, kind, wrap=0):
        return b"KEEPD\0\0\1" + bytes([kind, wrap]) + struct.pack("<H", self.epoch) + bytes(4) + self.id + os.urandom(32)

    def seal(self, header, ordinal, plain, key=None):
        key = key or derive(self.masters[self.epoch], header[32:], INFO[header[8]])
        n = struct.pack("<Q", ordinal)
        return AESGCM(key).encrypt(bytes(4) + n, plain, header + n)

    def object(self, kind, folder, body, raw=None):
        header = self.header(kind)
        data = header + self.seal(header, 0, raw if raw is not None else payload(cbor(body)))
        name = hashlib.sha256(data).hexdigest()
        self.put("%s/%s" % (folder, name), data)
        return name

    def pack(self, kind, plains, public=None, payloads=None, listed=True):
        """Stores chunks; gives their ids."""
        header, key = self.header(kind, 1 if public else 0), None
        if public:
            key = os.urandom(32)
        data, footer = header, []
        for n, plain in enumerate(plains):
            sealed = self.seal(header, n, payloads[n] if payloads else payload(plain, n % 2 * 2), key)
            footer.append([blake3.blake3(plain, key=self.chunk_key).digest(), len(sealed), len(plain)])
            data += sealed
        if public:
            enc, ciphertext = hpke_seal(public, key, b"keepd/1 pack key", header)
            data += hashlib.sha256(b"keepd/1 public key fingerprint" + public).digest()[:8] + enc + ciphertext
        sealed = self.seal(header, 2**64 - 1, cbor(footer))
        data += sealed + struct.pack("<I", len(sealed))
        name = hashlib.sha256(data).digest()
        self.put("packs/%s/%s" % (name.hex()[:2], name.hex()), data)
        if listed:
            self.packs.append([name, len(data), kind, footer])
        return [f[0] for f in footer]

    def index(self):
        self.object(3, "index", [self.packs, []])
        self.packs = []

    def page(self, table, entries):
        return self.pack(2, [cbor([table, entries])])[0]

    def manifest(self, sources, sequence=1, **more):
        body = {0: 1, 1: self.id, 2: sequence, 3: None, 4: "job", 5: "run", 6: "2026-01-01T00:00:0%dZ" % sequence, 7: "2026-01-01T00:01:00Z",
                8: "manual", 9: "good", 12: "host", 13: "test",
                14: [{0: name, 1: "files", 2: b"/srv/" + name.encode(), 3: pages, 4: 3, 5: 2, 6: 1, 7: 1, 8: "{}"} for name, pages in sources],
                11: [], 15: [[0, "root"]], 16: [[0, "root"]], 17: [], 18: 0, 19: 0}
        body.update({int(k[1:]): v for k, v in more.items()})
        return self.object(4, "backups", body)


def entry(path, kind=FILE, size=0, content=None, mode=None, extra=None):
    mode = mode if mode is not None else 0o755 if kind == DIRECTORY else 0o640
    content = content if content is not None or kind != FILE else [bytes(16), 0, []]
    return [0, path, kind, mode, os.getuid(), os.getgid(), TIME, TIME, 1, size, content, extra or {}]


def stored(path, size, parts):
    return entry(path, FILE, size, [bytes(16), 0, parts])


def usual(w, public=None, sequence=1):
    """What EXPECTED says, in a backup."""
    pieces = [b"hello", NOISE[:100_000], NOISE[100_000:300_000]]
    ids = w.pack(1, pieces, public)
    a_list = w.pack(2, [cbor([ids[1:], [1, 0, 100_000, 0, 0, 50_000, 2, 5, 199_995]])])[0]
    table = ids + [a_list]
    page = w.page(table, [entry(b"", DIRECTORY), stored(b"a.txt", 5, [1, 0, 5]), entry(b"dir", DIRECTORY, mode=0o750),
                          entry(b"dir/long", FILE, 349_995, [bytes(16), 1, [3]]),
                          stored(b"dir/sparse", 3_000_003, [0, 0, 3_000_000, 1, 1, 3])])
    more = w.page([], [entry(b"dir/z", HARDLINK, extra={1: b"dir/long"}), entry(b"link", SYMLINK, extra={1: b"/etc/passwd"}),
                       entry(b"odd \x1b[31m\xff", FILE)])
    w.index()
    return w.manifest([("files", [[page, b""], [more, b"dir/z"]])], sequence)


def expected(directory):
    """The same on disk, for comparison."""
    top = os.path.join(directory, "expected", "files").encode()
    os.makedirs(top + b"/dir")
    for name, data in ((b"a.txt", b"hello"), (b"dir/long", NOISE[:100_000] + bytes(50_000) + NOISE[100_005:300_000]),
                       (b"dir/sparse", bytes(3_000_000) + b"ell"), (b"odd \x1b[31m\xff", b"")):
        with open(top + b"/" + name, "xb") as f:
            f.write(data)
        os.chmod(top + b"/" + name, 0o640)
    os.link(top + b"/dir/long", top + b"/dir/z")
    os.symlink(b"/etc/passwd", top + b"/link")
    os.chmod(top + b"/dir", 0o750)
    os.chmod(top, 0o755)
    ns = TIME[0] * 10**9 + TIME[1]
    for where, folders, files in os.walk(top, topdown=False):
        for name in files:
            os.utime(where + b"/" + name, ns=(ns, ns), follow_symlinks=False)
        os.utime(where, ns=(ns, ns))


VARIANTS = {}


def variant(f):
    VARIANTS[f.__name__.replace("_", "-")] = f
    return f


@variant
def key_file(d):
    w = Writer(d)
    w.slot("key-file", PROFILE_KEY)
    usual(w)


@variant
def passphrase(d):
    w = Writer(d)
    w.passphrase_slot()
    usual(w)


@variant
def passphrase_too_dear(d):
    w = Writer(d)
    w.passphrase_slot("argon2id m=1048577 t=2 p=1")
    usual(w)


@variant
def passphrase_too_cheap(d):
    w = Writer(d)
    w.passphrase_slot("argon2id m=64 t=2 p=1")
    usual(w)


@variant
def token(d):
    w = Writer(d)
    w.slot("pkcs11", None, keys=bytes(60))
    usual(w)


@variant
def token_and_key_file(d):
    w = Writer(d)
    w.slot("pkcs11", None, keys=bytes(60))
    w.slot("key-file", PROFILE_KEY)
    usual(w)


@variant
def planted_none(d):
    """Somebody without the key put a slot there, and took the other away."""
    w = Writer(d)
    w.slot("none", None)
    usual(w)


@variant
def planted_beside(d):
    w = Writer(d)
    w.slot("none", None, keys=SECOND)
    w.slot("key-file", PROFILE_KEY)
    usual(w)


@variant
def changed_slot(d):
    w = Writer(d)
    w.slot("key-file", PROFILE_KEY, profile="other")
    usual(w)


@variant
def epochs(d):
    """While a re-encryption is under way: an old backup and a new one; a slot that was left behind knows less."""
    w = Writer(d, {1: SECOND, 2: THIRD}, epoch=1)
    usual(w)
    w.epoch = 2
    usual(w, sequence=2)
    w.slot("key-file", PROFILE_KEY, keys=FIRST)
    w.slot("key-file", PROFILE_KEY)


@variant
def old_epoch(d):
    """An object of a master key that is not in force any more."""
    w = Writer(d, {0: FIRST, 2: THIRD}, epoch=0)
    usual(w)
    w.slot("key-file", PROFILE_KEY)


@variant
def falling_epochs(d):
    w = Writer(d)
    w.slot("key-file", PROFILE_KEY, keys=FIRST + b"\2\0" + SECOND + b"\1\0" + THIRD)
    usual(w)


@variant
def write_only(d):
    w = Writer(d, {3: SECOND}, epoch=3)
    w.slot("key-file", PROFILE_KEY)
    usual(w, public_of(PRIVATE_KEY))


@variant
def write_only_unlisted(d):
    """No index lists the packs: their footers do."""
    w = Writer(d)
    w.slot("key-file", PROFILE_KEY)
    usual(w, public_of(PRIVATE_KEY))
    for name in os.listdir(os.path.join(w.root, "index")):
        os.unlink(os.path.join(w.root, "index", name))


@variant
def write_only_forged(d):
    """Somebody who has the public key puts other contents under the pack's name."""
    w = Writer(d)
    w.slot("key-file", PROFILE_KEY)
    public = public_of(PRIVATE_KEY)
    usual(w, public)
    for where, _, names in os.walk(os.path.join(w.root, "packs")):
        for path in (os.path.join(where, n) for n in names):
            with open(path, "rb") as f:
                data = f.read()
            if data[9] == 1:
                length = int.from_bytes(data[-4:], "little")
                tail, header, key = data[-4 - length:], data[:64], os.urandom(32)
                forged = header + w.seal(header, 0, payload(b"HELLO", 0), key)
                forged += data[len(forged):-4 - length - 88]
                enc, ciphertext = hpke_seal(public, key, b"keepd/1 pack key", header)
                with open(path, "wb") as f:
                    f.write(forged + hashlib.sha256(b"keepd/1 public key fingerprint" + public).digest()[:8] + enc + ciphertext + tail)


@variant
def twice(d):
    """Every chunk is in two packs, and one of the two is damaged."""
    w = Writer(d)
    w.slot("key-file", PROFILE_KEY)
    usual(w)
    first = [os.path.join(where, n) for where, _, names in os.walk(os.path.join(w.root, "packs")) for n in names]
    usual(w, sequence=2)
    for path in first:
        with open(path, "r+b") as f:
            f.seek(70)
            f.write(b"damage")


@variant
def lost_chunk(d):
    w = Writer(d)
    w.slot("key-file", PROFILE_KEY)
    ids = w.pack(1, [b"whole", NOISE[:5000]])
    gone = bytes(32)
    page = w.page(ids + [gone], [entry(b"", DIRECTORY), stored(b"half", 5005, [1, 0, 5, 3, 0, 5000]), stored(b"whole", 5, [1, 0, 5])])
    w.index()
    w.manifest([("files", [[page, b""]])])


def hostile(name, entries, source="files"):
    def make(d):
        w = Writer(d)
        w.slot("key-file", PROFILE_KEY)
        ids = w.pack(1, [b"hello"])
        page = w.page(ids, [entry(b"", DIRECTORY), *entries, stored(b"zz-last", 5, [1, 0, 5])])
        w.index()
        w.manifest([(source, [[page, b""]])])
    VARIANTS["hostile-" + name] = make


@variant
def unwritable(d):
    """Sources and entries that no target takes, and some that all do."""
    w = Writer(d)
    w.slot("key-file", PROFILE_KEY)
    ids = w.pack(1, [b"hello"])
    long = b"n" * 300
    page = w.page(ids, [entry(b"", DIRECTORY), entry(b"dir", DIRECTORY), entry(b"dir/" + long, DIRECTORY), five(b"dir/" + long + b"/f"),
                        five(b"long-" + long), five(b"zz-last")])
    alone = w.page(ids, [five(b"")])
    w.index()
    pages = [[page, b""]]
    w.manifest([("../outside", pages), ("alone", [[alone, b""]]), ("files", pages), ("s" * 300, pages)],
               _14=[{0: name, 1: "files", 2: origin, 3: p, 4: 3, 5: 2, 6: 1, 7: 1, 8: "{}"} for name, origin, p in
                    (("../outside", b"/srv", pages), ("alone", b"/srv/..", [[alone, b""]]), ("files", b"/srv", pages),
                     ("s" * 300, b"/srv", pages))])


def five(path):
    return stored(path, 5, [1, 0, 5])


hostile("up", [five(b"../outside")])
hostile("up-deep", [five(b"a/../../outside")])
hostile("absolute", [five(b"/tmp/keepd-decoder-outside")])
hostile("nul", [five(b"a\0b")])
hostile("empty-part", [five(b"a//b")])
hostile("through-link", [entry(b"sub", SYMLINK, extra={1: b".."}), five(b"sub/outside")])
hostile("link-then-directory", [entry(b"sub", SYMLINK, extra={1: b".."}), entry(b"sub", DIRECTORY), entry(b"sub", FILE)])
hostile("through-file", [five(b"sub"), five(b"sub/outside")])
hostile("hard-link-up", [entry(b"l", HARDLINK, extra={1: b"../../../main.key"})])
hostile("hard-link-through", [entry(b"s", SYMLINK, extra={1: b"../../.."}), entry(b"t", HARDLINK, extra={1: b"s/main.key"})])
hostile("source", [], "../outside")
hostile("source-dots", [], "..")
hostile("beyond-chunk", [stored(b"f", 9, [1, 0, 9])])
hostile("sizes", [stored(b"f", 2**40, [1, 0, 5])])
hostile("table", [stored(b"f", 5, [7, 0, 5])])
hostile("entry", [[0, b"f", 0]])
hostile("shared", [[99, b"f", 0, 0o644, 0, 0, TIME, TIME, 1, 0, [bytes(16), 0, []], {}]])
hostile("types", [[0, b"f", 0, "x", 0, 0, TIME, TIME, 1, 0, [bytes(16), 0, []], {}]])
hostile("times", [[0, b"f", 0, 0o644, os.getuid(), os.getgid(), [2**63, 0], TIME, 1, 0, [bytes(16), 0, []], {}]])


def broken_payload(name, raw):
    def make(d):
        w = Writer(d)
        w.slot("key-file", PROFILE_KEY)
        usual(w)
        w.object(4, "backups", None, raw=raw)
    VARIANTS["payload-" + name] = make


broken_payload("bomb", b"\2" + struct.pack("<I", 1000) + zlib.compress(bytes(1 << 26)))
broken_payload("huge", b"\0" + struct.pack("<I", 2**32 - 1) + b"x")
broken_payload("short", b"\0")
broken_payload("method", b"\7" + struct.pack("<I", 1) + b"x")
broken_payload("zlib", b"\2" + struct.pack("<I", 5) + b"xxxxx")
broken_payload("zstd", b"\1" + struct.pack("<I", 5) + b"\x28\xb5\x2f\xfd\x20\x05\x29xxxxx")
broken_payload("zstd-lengths", b"\1" + struct.pack("<I", 5) + b"\x28\xb5\x2f\xfd\xa0\xff\xff\xff\xff\x01\0\0")
broken_payload("zstd-window", b"\1" + struct.pack("<I", 5) + b"\x28\xb5\x2f\xfd\0\xf8\x01\0\0")
broken_payload("deep", payload(b"\x81" * 100_000 + b"\0"))
broken_payload("array", payload(b"\x9b" + b"\xff" * 8))
broken_payload("indefinite", payload(b"\x9f\xff"))
broken_payload("tag", payload(b"\xc0\0"))
broken_payload("text", payload(b"\x61\xff"))
broken_payload("rest", payload(b"\xa0\xa0"))
broken_payload("map", payload(b"\xa0"))
broken_payload("empty", payload(b""))
broken_payload("list-key", payload(b"\xa1\x80\0"))


def key_text(word, purpose, key):
    return "# for a test\n%s %s %s\n" % (word, key.hex(), hashlib.sha256(purpose + key).digest()[:4].hex())


def make(name, directory):
    os.makedirs(directory)
    for file, text in (("main.key", key_text("keepd-key-1", b"keepd key check", PROFILE_KEY)),
                       ("other.key", key_text("keepd-key-1", b"keepd key check", OTHER_KEY)),
                       ("private.key", key_text("keepd-private-1", b"keepd private key check", PRIVATE_KEY)),
                       ("public.key", key_text("keepd-public-1", b"keepd public key check", public_of(PRIVATE_KEY))),
                       ("passphrase", PASSPHRASE + "\n")):
        with open(os.open(os.path.join(directory, file), os.O_WRONLY | os.O_CREAT, 0o600), "w") as f:
            f.write(text)
    VARIANTS[name](directory)
    expected(directory)


if __name__ == "__main__":
    for name in sys.argv[2:] or VARIANTS:
        make(name, os.path.join(sys.argv[1], name))
