"""A seeded permutation that is computed, not stored: a billion sequences need no array."""

from __future__ import annotations

from typing import Final

_ROUNDS: Final = 6
_WORD: Final = (1 << 64) - 1


class Permutation:
    """A bijection on range(size): a Feistel network on the next even number of bits, walked until it lands inside."""

    __slots__ = ("_half_bits", "_keys", "_mask", "size")

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        if size < 1:
            raise ValueError(f"size: {size}, expected at least 1")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        start = _mix(_mix(seed & _WORD) ^ (epoch & _WORD))
        self._keys = tuple(_mix(start + number) for number in range(_ROUNDS))

    def __getitem__(self, index: int) -> int:
        """Where `index` goes. Fewer than four walks are needed on average, since the domain is below 4 * size."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside range({self.size})")
        while (index := self._encipher(index)) >= self.size:
            pass
        return index

    def _encipher(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return left << self._half_bits | right


def _mix(value: int) -> int:
    """The finaliser of SplitMix64: every input bit moves every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _WORD
    return value ^ value >> 31
