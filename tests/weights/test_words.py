"""Small integers in 32-bit words, against one long binary number written out."""

from __future__ import annotations

import pytest
import torch

from peftfn.weights.codecs import bit_packing


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_lie_in_words_as_in_one_long_binary_number(bits: int) -> None:
    values = torch.randint(0, 2**bits, (64, 3))
    packed = bit_packing.packed(values, bits)
    assert packed.dtype == torch.int32 and packed.shape == (64 * bits // 32, 3)
    for column in range(3):
        number = sum(int(value) << (bits * place) for place, value in enumerate(values[:, column]))
        assert [int(word) & 0xFFFFFFFF for word in packed[:, column]] == [
            number >> (32 * place) & 0xFFFFFFFF for place in range(len(packed))
        ]
    assert bit_packing.unpacked(packed, bits).equal(values.to(torch.int16))
