"""Damage of files where atheris is not installed: bits, numbers, pieces, words of the formats. Without coverage."""

import random

WORDS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"null",
    b"true",
    b"NaN",
    b"Infinity",
    b"-1",
    b"0",
    b"1e400",
    b"1" * 400,
]
WORDS += [b"\\ud800", b"\\u0000", b"[" * 2000, b'{"a":' * 2000, b"PK\3\4", b"PK\1\2", b"PK\5\6", b"../", b"\0", b"\r\n"]
WORDS += [
    b"9223372036854775808",
    b"18446744073709551616",
    b"1.5",
    b'""',
    b"[]",
    b"{}",
    b"format",
    b"version",
    b"'descr'",
]
WORDS += [
    b"(",
    b"t",
    b"R",
    b"]",
    b"\x80\4",
    b"\x95",
    b"\x8a\xff",
    b"cos\nsystem\n",
    b"cbuiltins\nbytearray\n",
    b"q\0",
    b"h\0",
]
_NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def _set_bytes(data, rng, at):
    width = rng.choice((1, 2, 4, 8))
    data[at : at + width] = (rng.choice(_NUMBERS) % 256**width).to_bytes(width, rng.choice(("little", "big")))


def _insert_word(data, rng, at):
    data[at:at] = rng.choice(WORDS)


def _replace_by_word(data, rng, at):
    data[at : at + rng.randrange(1, 12)] = rng.choice(WORDS)


def _flip_bit(data, rng, at):
    if data:
        data[at % len(data)] ^= 1 << rng.randrange(8)


def _any_byte(data, rng, at):
    data[at : at + 1] = rng.randbytes(1)


def _remove(data, rng, at):
    del data[at : at + rng.choice((1, 2, 8, 64, 1024))]


def _copy(data, rng, at):
    start = rng.randrange(len(data) + 1)
    data[at:at] = data[start : start + rng.choice((1, 4, 16, 128))]


def _cut(data, rng, at):
    if rng.randrange(4) == 0:
        del data[at:]


_CHANGES = [_set_bytes, _insert_word, _replace_by_word, _flip_bit, _any_byte, _remove, _copy, _cut]


def mutate(seeds, seed, most=1 << 16):
    """Yield damaged files for ever; the same for the same seed."""
    rng = random.Random(seed)
    while True:
        data = bytearray(rng.choice(seeds))
        if rng.randrange(16) == 0:
            other = rng.choice(seeds)
            data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other) + 1) :]
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            rng.choice(_CHANGES)(data, rng, rng.randrange(len(data) + 1))
        yield bytes(data[:most])
