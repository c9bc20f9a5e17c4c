# SPDX-License-Identifier: Apache-2.0
"""Colours and patterns of the drawn scenes."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image


def color(rng: np.random.Generator, saturation: tuple[float, float] = (0.45, 0.95)) -> np.ndarray:
    """An RGB colour of any hue, float32 ``[3]`` in [0, 255]."""
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(0.45, 1.0))
    return np.array(rgb, dtype=np.float32) * 255


def ground(size: int, rng: np.random.Generator) -> np.ndarray:
    """A background, float32 ``[size, size, 3]``: two dull colours, cloudy or in a pattern, lit from one side."""
    dull = (0.05, 0.4)
    return pattern((size, size), color(rng, dull), color(rng, dull), rng, contrast=(0.3, 1.0), clouds=0.5)


def pattern(
    shape: tuple[int, ...],
    first: np.ndarray,
    second: np.ndarray,
    rng: np.random.Generator,
    *,
    contrast: tuple[float, float],
    clouds: float = 0.2,
) -> np.ndarray:
    """Two colours in a pattern, float32 ``[h, w, 3]``: clouds with probability `clouds`, else stripes, dots, ….

    `contrast` is the range of the share of their difference that is kept.
    """
    second = first + np.float32(rng.uniform(*contrast)) * (second - first)
    height, width = shape
    x = np.arange(width, dtype=np.float32)[None, :] - width / 2
    y = np.arange(height, dtype=np.float32)[:, None] - height / 2
    turn = np.float32(rng.uniform(0, np.pi))
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    longest = max(height, width)
    period = np.float32(max(4.0, longest * rng.uniform(0.08, 0.35)))
    if rng.random() < clouds:
        mix = _clouds(height, width, int(rng.integers(3, 12)), rng)
    else:
        scale = 2 * np.pi / period
        mix = _MIXES[int(rng.integers(len(_MIXES)))](u * scale, v * scale, longest / period)
    light = 1 + np.float32(rng.uniform(0.1, 0.25)) * (x + y) / longest
    return (first + mix[..., None] * (second - first)) * light[..., None]


def _clouds(height: int, width: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    def octave(cells: int) -> np.ndarray:
        coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))

    return np.clip(0.65 * octave(cells) + 0.35 * octave(4 * cells), 0, 1)


def _soft(wave: np.ndarray) -> np.ndarray:
    """A square wave with its edges smoothed over about a pixel, in [0, 1]."""
    return np.clip(0.5 + 2 * wave, 0, 1)


# (two coordinates in radians of the period, periods across the shape) -> mix of the two colours in [0, 1]
_MIXES = (
    lambda u, v, n: _soft(np.sin(u)),
    lambda u, v, n: _soft(np.sin(u) * np.sin(v) * 1.5),
    lambda u, v, n: _soft(np.cos(u) + np.cos(v) - 0.6),
    lambda u, v, n: 0.5 * _soft(np.sin(u)) + 0.5 * _soft(np.sin(v)),
    lambda u, v, n: np.clip(0.5 + u / (2 * np.pi * max(n, 1)), 0, 1),
    lambda u, v, n: _soft(np.sin(np.hypot(u, v))),
    lambda u, v, n: np.zeros_like(u * v),
)
