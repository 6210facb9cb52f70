"""Philox4x32-10 (Salmon et al. 2011) and the random drop made of it, in plain Python."""

from __future__ import annotations

import hashlib

WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds on 128 bits of counter with 64 bits of key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & WORD, (a >> 32) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def words(key: int, first: int, count: int) -> list[int]:
    """The words at positions ``first`` to ``first + count`` of the stream of a 64-bit key."""
    found: list[int] = []
    for block in range(first // 4, (first + count + 3) // 4):
        found += philox((block & WORD, block >> 32, 0, 0), (key & WORD, key >> 32))
    return found[first % 4 : first % 4 + count]


def stream(seed: int, model: str, tensor: str, count: int) -> list[int]:
    """The first words of the stream that belongs to one tensor of one model."""
    digest = hashlib.blake2b(f"{seed}\0{model}\0{tensor}".encode(), digest_size=8).digest()
    return words(int.from_bytes(digest, "little"), 0, count)


def keeps(seed: int, model: str, tensor: str, count: int, density: float) -> list[bool]:
    """Which entries a random drop keeps: those whose word is below the density, on 32 bits."""
    if density >= 1:
        return [True] * count
    return [word < round(density * 2**32) for word in stream(seed, model, tensor, count)]
