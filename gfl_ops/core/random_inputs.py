# SPDX-License-Identifier: Apache-2.0
"""Random inputs for the registry's samples, made on the CPU so that a seed gives the same numbers on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device=device, dtype=dtype)


def uniform(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    return drawn.to(device=device, dtype=dtype)


def boxes(
    count: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator, extent: float = 640.0
) -> Tensor:
    """`count` boxes xyxy in [0, extent], with sides log-uniform from a few pixels to half the extent."""
    centre = torch.rand((count, 2), generator=generator, dtype=torch.float64) * extent
    size = 4.0 * (extent / 8.0) ** torch.rand((count, 2), generator=generator, dtype=torch.float64)
    return torch.cat([centre - size / 2, centre + size / 2], 1).clamp(0, extent).to(device=device, dtype=dtype)
