#!/usr/bin/env python3
"""The decoder's own ciphers beside the package cryptography's and the vectors of their RFCs. usage: primitives.py DECODER"""
import importlib.util
import os
import random
import sys

from cryptography.hazmat.primitives import hpke, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

import writer

spec = importlib.util.spec_from_file_location("decoder", sys.argv[1])
decoder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(decoder)


def is_equal(a, b, what):
    if a != b:
        sys.exit("primitives: %s: %r is not %r" % (what, a[:40] if a else a, b[:40] if b else b))


# AES-256-GCM: NIST's test case 16 (the specification of GCM, appendix B), then any length beside the package.
case = [bytes.fromhex(h) for h in (
    "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308", "cafebabefacedbaddecaf888",
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
    "76fc6ece0f4e1768cddf8853bb2d551b", "feedfacedeadbeeffeedfacedeadbeefabaddad2",
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39")]
assert decoder.LibcryptoGcm.usable() and decoder.PackageGcm.usable(), "libcrypto or cryptography is missing here"
ways = (decoder.OwnGcm, decoder.LibcryptoGcm, decoder.PackageGcm)
for way in ways:
    is_equal(way(case[0]).decrypt(*case[1:4]), case[4], "%s, NIST's case" % way.__name__)
for n in list(range(50)) + [1007, 1008, 1009, 1023, 1024, 1025, 2048, 4095, 70_001, 1 << 20]:
    key, nonce, plain, aad = os.urandom(32), os.urandom(12), os.urandom(n), os.urandom(random.choice((0, 1, 16, 72)))
    sealed = AESGCM(key).encrypt(nonce, plain, aad)
    changed = bytearray(sealed)
    changed[random.randrange(len(sealed))] ^= 1 << random.randrange(8)
    for way in ways:
        cipher = way(key)
        is_equal(cipher.decrypt(nonce, sealed, aad), plain, "%s of %d bytes" % (way.__name__, n))
        is_equal(cipher.decrypt(nonce, bytes(changed), aad), None, "%s of %d changed bytes" % (way.__name__, n))
        is_equal(cipher.decrypt(nonce, sealed, aad + b"x"), None, "%s with other data" % way.__name__)
        is_equal(cipher.decrypt(nonce, sealed[:15], aad), None, "%s, cut" % way.__name__)

# X25519: RFC 7748, 6.1, then beside the package.
alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
is_equal(decoder.public_key(alice).hex(), "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a", "the RFC's public key")
raw = serialization.Encoding.Raw
for private in [alice] + [os.urandom(32) for _ in range(20)]:
    theirs = X25519PrivateKey.from_private_bytes(private)
    public = theirs.public_key().public_bytes(raw, serialization.PublicFormat.Raw)
    is_equal(decoder.public_key(private), public, "a public key")
    other = X25519PrivateKey.generate()
    is_equal(decoder.x25519(private, other.public_key().public_bytes(raw, serialization.PublicFormat.Raw)), theirs.exchange(other.public_key()), "X25519")
    # HPKE: what the package seals (it takes no associated data), and what the tests' own writer does.
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    sealed = suite.encrypt(b"a pack key", theirs.public_key(), info=b"keepd/1 pack key")
    is_equal(decoder.hpke_open(private, sealed[:32], sealed[32:], b"keepd/1 pack key", b""), b"a pack key", "HPKE by the package")
    is_equal(decoder.hpke_open(private, sealed[:32], sealed[32:], b"keepd/1 pack kez", b""), None, "HPKE with another info")
    enc, sealed = writer.hpke_seal(public, b"a pack key", b"info", b"header")
    is_equal(decoder.hpke_open(private, enc, sealed, b"info", b"header"), b"a pack key", "HPKE with associated data")
    is_equal(decoder.hpke_open(private, enc, sealed, b"info", b"heades"), None, "HPKE with other associated data")
    is_equal(decoder.hpke_open(private, bytes(32), sealed, b"info", b"header"), None, "HPKE with a point of low order")

# Argon2id: RFC 9106, 5.3, then beside the package.
tag = decoder.own_argon2id(b"\1" * 32, b"\2" * 16, 32, 3, 4, 32, (b"\3" * 8, b"\4" * 12))
is_equal(tag.hex(), "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659", "Argon2id, the RFC's vector")
for kib, passes, lanes in ((8, 1, 1), (32, 3, 4), (64, 2, 1), (600, 3, 2), (1111, 2, 3), (2048, 2, 4)):
    theirs = Argon2id(salt=b"s" * 32, length=32, iterations=passes, lanes=lanes, memory_cost=kib).derive(b"password")
    is_equal(decoder.own_argon2id(b"password", b"s" * 32, kib, passes, lanes, 32), theirs, "Argon2id m=%d t=%d p=%d" % (kib, passes, lanes))

# CBOR: what the tests' own writer makes comes back; no bytes at all make it fail in another way than it should.
value = {0: [1, 2**32, 2**64 - 1, -5, b"\0x", "t\u00e4xt", None, True, False, [], {}], "k": [[b"y" * 300] * 30]}
is_equal([decoder.Cbor.whole(writer.cbor(value))], [value], "CBOR")
whole, seed = writer.cbor(value), random.Random(5)
for _ in range(3000):
    damaged = bytearray(whole[:seed.randrange(len(whole))] if seed.random() < 0.3 else whole)
    for _ in range(seed.randrange(1, 4)):
        if damaged:
            damaged[seed.randrange(min(len(damaged), 60))] = seed.randrange(256)
    for read in (decoder.Cbor.whole, lambda d: decoder.payload(bytes(d), 1 << 16), lambda d: decoder.payload(b"\1\5\0\0\0\x28\xb5\x2f\xfd" + bytes(d), 1 << 16)):
        try:
            read(damaged)
        except decoder.Bad:
            pass
print("all as they should be")
