# SPDX-License-Identifier: Apache-2.0
"""Minimal filtering against the direct convolution in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from gfl.models import winograd
from gfl.models.winograd import Winograd, tiles_in


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        (1, ((1, 1),)),
        (2, ((4, 4),)),
        (1, ((5, 3),)),
        (3, ((9, 13), (5, 7), (1, 2))),
        (2, ((12, 8), (1, 1), (4, 5), (2, 3), (1, 4))),
    ],
)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 5), (64, 68)])
def test_it_is_the_convolution(batch: int, sizes: tuple, inputs: int, outputs: int, generator: torch.Generator) -> None:
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5
    bias = torch.randn(outputs, generator=generator)
    maps = [torch.randn(batch, inputs, *size, generator=generator) for size in sizes]
    for x, y in zip(maps, Winograd(weight, bias)(maps), strict=True):
        want = functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        # The transforms' largest row sums are 10, 1 and 19: rounding of inputs and sums is enlarged by up to 10² on
        # the way in and 19² on the way out, in practice by about 20 (outputs here have deviation 1).
        torch.testing.assert_close(y, want.float(), rtol=0, atol=1e-4)
        assert y.is_contiguous(memory_format=torch.channels_last) and y.shape[2:] == x.shape[2:]


def test_without_a_bias_and_twice_the_same(generator: torch.Generator) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    maps = [torch.randn(2, 4, 6, 7, generator=generator)]
    filters = Winograd(weight)
    (first,), (second,) = filters(maps), filters(maps)
    assert torch.equal(first, second)
    # Sums of 36 products of deviation 1: 6 times the tolerance above.
    torch.testing.assert_close(first, functional.conv2d(maps[0], weight, padding=1), rtol=0, atol=6e-4)


def test_blocks_change_no_bit(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 tiles, the last one shorter, against one block of all."""
    sizes = ((17, 29), (9, 15), (1, 1))
    maps = [torch.randn(2, 64, *size, generator=generator) for size in sizes]
    filters = Winograd(torch.randn(80, 64, 3, 3, generator=generator), torch.randn(80, generator=generator))
    assert tiles_in(2, sizes) == 2 * (5 * 8 + 3 * 4 + 1)
    whole = filters(maps)
    monkeypatch.setattr(winograd, "BLOCK_BYTES", 1)
    for one, other in zip(whole, filters(maps), strict=True):
        assert torch.equal(one, other)
