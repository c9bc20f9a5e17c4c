# SPDX-License-Identifier: Apache-2.0
"""Minimal filtering against the direct convolution in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from gfl.models.winograd import Winograd, as_maps, as_rows, plan, tiles_in, tiles_of


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
    where = plan(batch, sizes)
    assert where.tiles == tiles_in(batch, sizes) and where.gather.numel() == 36 * where.tiles
    found = as_maps(Winograd(weight, bias)(tiles_of(as_rows(maps), where), where), batch, sizes)
    for x, y in zip(maps, found, strict=True):
        want = functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        # The transforms' largest row sums are 10, 1 and 19: rounding of inputs and sums is enlarged by up to 10² on
        # the way in and 19² on the way out, in practice by about 20 (outputs here have deviation 1).
        torch.testing.assert_close(y, want.float(), rtol=0, atol=1e-4)
        assert y.is_contiguous(memory_format=torch.channels_last) and y.shape[2:] == x.shape[2:]


def test_without_a_bias_and_twice_the_same(generator: torch.Generator) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    maps = [torch.randn(2, 4, 6, 7, generator=generator)]
    where = plan(2, ((6, 7),))
    filters = Winograd(weight)
    first, second = (filters(tiles_of(as_rows(maps), where), where) for _ in range(2))
    assert torch.equal(first, second)
    (found,) = as_maps(first, 2, [(6, 7)])
    # Sums of 36 products of deviation 1: 6 times the tolerance above.
    torch.testing.assert_close(found, functional.conv2d(maps[0], weight, padding=1), rtol=0, atol=6e-4)


def test_rows_and_maps_are_each_others_inverse(generator: torch.Generator) -> None:
    sizes = [(3, 4), (2, 1)]
    maps = [torch.randn(2, 5, *size, generator=generator) for size in sizes]
    rows = as_rows(maps)
    assert not rows[-1].any() and len(rows) == 2 * (12 + 2) + 1
    for one, other in zip(as_maps(rows[:-1], 2, sizes), maps, strict=True):
        assert torch.equal(one, other)
