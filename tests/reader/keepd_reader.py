#!/usr/bin/env python3
"""A second, independent reader of keepd repositories, format 1, written from docs/format.md alone.

usage:
  keepd_reader.py REPOSITORY [--key FILE] list
  keepd_reader.py REPOSITORY [--key FILE] ls BACKUP
  keepd_reader.py REPOSITORY [--key FILE] restore BACKUP DIR
  keepd_reader.py REPOSITORY [--key FILE] verify        every object's SHA-256, every chunk's id

REPOSITORY is a directory. BACKUP is an id, a unique start of one, or 'latest'.
Needs the packages cryptography, zstandard, cbor2 and blake3.
"""
import argparse
import hashlib
import hmac
import json
import os
import sys
import zlib

import blake3
import cbor2
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

HEADER = 64
KINDS = {1: b"keepd/1 data pack", 2: b"keepd/1 metadata pack", 3: b"keepd/1 index", 4: b"keepd/1 manifest"}
FOOTER = (1 << 64) - 1


class Bad(Exception):
    pass


def hkdf(secret, salt, info, length=32):
    """HKDF-SHA256, RFC 5869."""
    prk = hmac.new(salt or bytes(32), secret, hashlib.sha256).digest()
    out, block, n = b"", b"", 1
    while len(out) < length:
        block = hmac.new(prk, block + info + bytes([n]), hashlib.sha256).digest()
        out, n = out + block, n + 1
    return out[:length]


def read_key_file(path):
    for line in open(path, encoding="ascii"):
        line = line.strip()
        if line and not line.startswith("#"):
            word, key, check = line.split()
            key = bytes.fromhex(key)
            if word != "keepd-key-1" or hashlib.sha256(b"keepd key check" + key).digest()[:4].hex() != check.lower():
                raise Bad("%s is no intact keepd key file" % path)
            return key
    raise Bad("%s holds no key" % path)


def payload(raw):
    """method, length before compression, bytes"""
    method, length, body = raw[0], int.from_bytes(raw[1:5], "little"), raw[5:]
    if method == 0:
        plain = body
    elif method == 1:
        plain = zstandard.ZstdDecompressor().decompress(body, max_output_size=length) if length else b""
    elif method == 2:
        plain = zlib.decompress(body)
    else:
        raise Bad("compression method %d" % method)
    if len(plain) != length:
        raise Bad("a payload of %d bytes where %d were announced" % (len(plain), length))
    return plain


class Cipher:
    def __init__(self, repo, header, kind):
        if header[:8] != b"KEEPD\0\0\1" or header[8] != kind or header[9:16] != bytes(7) or header[16:32] != repo.id:
            raise Bad("a header that does not fit")
        self.header = header
        self.gcm = AESGCM(hkdf(repo.master, header[32:64], KINDS[kind]))

    def open(self, ordinal, sealed):
        n = ordinal.to_bytes(8, "little")
        try:
            return self.gcm.decrypt(bytes(4) + n, sealed, self.header + n)
        except InvalidTag:
            raise Bad("a section does not open")


class Repository:
    def __init__(self, root, key_file):
        self.root = root
        config = json.load(open(os.path.join(root, "keepd.json")))
        if config["format"] != 1:
            raise Bad("format %s" % config["format"])
        self.id = bytes.fromhex(config["repository"])
        self.master = self.unlock(read_key_file(key_file) if key_file else None)
        self.chunk_key = hkdf(self.master, b"", b"keepd/1 chunk id")
        self.ciphers = {}
        self.chunks = {}
        self.load_index()

    def unlock(self, key):
        for name in sorted(os.listdir(os.path.join(self.root, "keys"))):
            slot = json.load(open(os.path.join(self.root, "keys", name)))
            if slot["format"] != 1 or bytes.fromhex(slot["repository"]) != self.id:
                continue
            if slot["method"] == "none" and key is None:
                return bytes.fromhex(slot["wrapped"])
            if slot["method"] == "key-file" and key is not None:
                if hashlib.sha256(b"keepd/1 key fingerprint" + key).digest()[:8].hex() != slot["fingerprint"]:
                    continue
                aad = b""
                for field in (str(slot["format"]), slot["repository"], slot["slot"], slot["profile"], slot["method"], slot["fingerprint"], slot["salt"]):
                    field = field.encode()
                    aad += len(field).to_bytes(4, "little") + field
                kek = hkdf(key, bytes.fromhex(slot["salt"]), b"keepd/1 key slot")
                return AESGCM(kek).decrypt(bytes(12), bytes.fromhex(slot["wrapped"]), aad)
        raise Bad("no key slot opens with this key")

    def named(self, folder, name):
        data = open(os.path.join(self.root, folder, name), "rb").read()
        if hashlib.sha256(data).hexdigest() != name:
            raise Bad("%s/%s: its SHA-256 is not its name" % (folder, name))
        return data

    def body(self, kind, data):
        return payload(Cipher(self, data[:HEADER], kind).open(0, data[HEADER:]))

    def load_index(self):
        folder = os.path.join(self.root, "index")
        indexes = {n: cbor2.loads(self.body(3, self.named("index", n))) for n in (os.listdir(folder) if os.path.isdir(folder) else [])}
        superseded = {s.hex() for packs, old in indexes.values() for s in old}
        for name, (packs, _) in indexes.items():
            if name in superseded:
                continue
            for pack, size, kind, chunks in packs:
                offset = HEADER
                for ordinal, (chunk, sealed, length) in enumerate(chunks):
                    self.chunks.setdefault(chunk, (pack.hex(), kind, ordinal, offset, sealed, length))
                    offset += sealed

    def pack(self, pack):
        return os.path.join(self.root, "packs", pack[:2], pack)

    def chunk(self, chunk):
        pack, kind, ordinal, offset, sealed, length = self.chunks[chunk]
        with open(self.pack(pack), "rb") as f:
            if pack not in self.ciphers:
                self.ciphers[pack] = Cipher(self, f.read(HEADER), kind)
            f.seek(offset)
            plain = payload(self.ciphers[pack].open(ordinal, f.read(sealed)))
        if len(plain) != length or blake3.blake3(plain, key=self.chunk_key).digest() != chunk:
            raise Bad("chunk %s is another than its id says" % chunk.hex())
        return plain

    def backups(self):
        folder = os.path.join(self.root, "backups")
        found = [(n, cbor2.loads(self.body(4, self.named("backups", n)))) for n in (os.listdir(folder) if os.path.isdir(folder) else [])]
        return sorted(found, key=lambda b: b[1][2])

    def backup(self, name):
        found = self.backups()
        if name == "latest":
            return found[-1]
        found = [b for b in found if b[0].startswith(name)]
        if len(found) != 1:
            raise Bad("%d backups are called %s" % (len(found), name))
        return found[0]

    def segments(self, content, table):
        """(None, 0, length) is a hole, else (chunk, offset, length)"""
        _, form, parts = content
        if form == 1:
            for n in parts:
                inner, triples = cbor2.loads(self.chunk(table[n]))
                yield from self.triples(triples, inner)
        else:
            yield from self.triples(parts, table)

    @staticmethod
    def triples(parts, table):
        for at in range(0, len(parts), 3):
            t, offset, length = parts[at:at + 3]
            yield (table[t - 1] if t else None, offset, length)

    def entries(self, source):
        for chunk, _first in source[3]:
            table, entries = cbor2.loads(self.chunk(chunk))
            before = b""
            for e in entries:
                path = before[:e[0]] + e[1]
                before = path
                yield {"path": path, "kind": e[2], "mode": e[3], "uid": e[4], "gid": e[5], "mtime": e[6][0] * 10**9 + e[6][1],
                       "size": e[9], "content": e[10], "table": table, "extra": e[11]}

    def restore(self, backup, target):
        cache = [None, None]

        def plain(chunk):
            if cache[0] != chunk:
                cache[:] = [chunk, self.chunk(chunk)]
            return cache[1]

        for source in backup[14]:
            top = os.path.join(os.fsencode(target), source[0].encode())
            entries = list(self.entries(source))
            if len(entries) == 1 and entries[0]["kind"] == 0:
                os.makedirs(top)
                entries[0]["path"] = source[2].rsplit(b"/", 1)[-1]
            late = []
            for e in entries:
                where = os.path.join(top, e["path"]) if e["path"] else top
                if e["kind"] == 1:
                    os.makedirs(where)
                    late.append((e, where))
                elif e["kind"] == 0:
                    with open(where, "xb") as f:
                        for chunk, offset, length in self.segments(e["content"], e["table"]):
                            if chunk is None:
                                f.seek(length, 1)
                            else:
                                f.write(plain(chunk)[offset:offset + length])
                        f.truncate(e["size"])
                    os.chmod(where, e["mode"])
                    os.utime(where, ns=(e["mtime"], e["mtime"]))
                else:
                    late.append((e, where))
            for e, where in late:
                if e["kind"] == 2:
                    os.symlink(e["extra"][1], where)
                    os.utime(where, ns=(e["mtime"], e["mtime"]), follow_symlinks=False)
                elif e["kind"] == 3:
                    os.link(os.path.join(top, e["extra"][1]), where)
            for e, where in reversed(late):
                if e["kind"] == 1:
                    os.chmod(where, e["mode"])
                    os.utime(where, ns=(e["mtime"], e["mtime"]))

    def verify(self):
        names = 0
        for folder, _, files in os.walk(os.path.join(self.root, "packs")):
            for name in files:
                data = open(os.path.join(folder, name), "rb").read()
                if hashlib.sha256(data).hexdigest() != name:
                    raise Bad("packs/%s: its SHA-256 is not its name" % name)
                kind = data[8]
                cipher = Cipher(self, data[:HEADER], kind)
                length = int.from_bytes(data[-4:], "little")
                offset = HEADER
                for ordinal, (chunk, sealed, size) in enumerate(cbor2.loads(cipher.open(FOOTER, data[-4 - length:-4]))):
                    plain = payload(cipher.open(ordinal, data[offset:offset + sealed]))
                    if len(plain) != size or blake3.blake3(plain, key=self.chunk_key).digest() != chunk:
                        raise Bad("packs/%s: chunk %d is another than its id says" % (name, ordinal))
                    offset += sealed
                if offset != len(data) - 4 - length:
                    raise Bad("packs/%s: the footer does not begin where the chunks end" % name)
                names += 1
        return names


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("repository")
    p.add_argument("--key")
    p.add_argument("command", choices=["list", "ls", "restore", "verify"])
    p.add_argument("arguments", nargs="*")
    a = p.parse_args()
    repo = Repository(a.repository, a.key)
    if a.command == "list":
        for name, m in repo.backups():
            print(name, m[2], m[4], m[6], m[9])
    elif a.command == "ls":
        for source in repo.backup(a.arguments[0])[1][14]:
            for e in repo.entries(source):
                print("%s %o %d %s/%s" % ("fdlh"[e["kind"]], e["mode"], e["size"], source[0], e["path"].decode("utf-8", "backslashreplace")))
    elif a.command == "restore":
        repo.restore(repo.backup(a.arguments[0])[1], a.arguments[1])
    else:
        print("%d packs are whole" % repo.verify())


if __name__ == "__main__":
    try:
        main()
    except Bad as e:
        sys.exit("keepd_reader: %s" % e)
