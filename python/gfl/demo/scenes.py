# SPDX-License-Identifier: Apache-2.0
"""Textured scenes of cut-out shapes, with their boxes, as a data set in COCO's format.

A scene is a collage: patterned objects of five classes lie on a textured background among distractors of no class, and
cover one another. Colour, pattern, rotation and proportion are drawn regardless of the class, so only the outline tells
it. A box is the extent of the *whole* outline, clipped to the image, covered parts included: where an edge is hidden
its place can only be guessed, which is what a learned distribution is for.
"""

from __future__ import annotations

import colorsys
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("ring", "star", "cross", "moon", "heart")
# Longest side of an object's box: from this many pixels to this share of the image.
SMALLEST, LARGEST = 12, 0.5
# Share of every object that must stay uncovered and inside the image.
VISIBLE = 0.5
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """A drawn image and what is on it, n objects from the bottom to the top of the pile."""

    image: np.ndarray  # uint8 [size, size, 3], RGB
    boxes: np.ndarray  # float32 [n, 4], xyxy in pixels: the exact extent of each mask
    labels: np.ndarray  # int64 [n], indices into CLASSES
    masks: np.ndarray  # bool [n, size, size]: the whole objects, also where others cover them
    visible: np.ndarray  # float32 [n]: visible share of each object's whole area


def draw_scene(size: int, rng: np.random.Generator) -> Scene:
    """One scene of `size` × `size` pixels, at least 64 or it is a ValueError, determined by the generator's state."""
    if size < 64:
        raise ValueError(f"gfl.demo.draw_scene: `size` must be at least 64 pixels, got {size}")
    pile = _Pile(size, rng)
    kinds = rng.permutation([True] * int(rng.integers(3, 9)) + [False] * int(rng.integers(1, 4)))
    for is_object in kinds:
        pile.add(int(rng.integers(len(CLASSES))) if is_object else None)
    return pile.finish()


def write_dataset(folder: str | Path, *, train: int, val: int, size: int = 192, seed: int = 0) -> None:
    """Draws scenes into `folder`: ``train/``, ``val/`` (JPEG), ``annotations/train.json`` and ``annotations/val.json``.

    `train` scenes to train on and `val` held-out ones, `size` pixels wide and high. A scene depends on the random seed,
    its split and its number alone, so fewer scenes are the first ones of more.
    """
    folder = Path(folder)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, (name, count) in enumerate((("train", train), ("val", val))):
        (folder / name).mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            scene = draw_scene(size, np.random.default_rng([seed, split, index]))
            file_name = f"{index:05d}.jpg"
            Image.fromarray(scene.image).save(folder / name / file_name, quality=92)
            images.append({"id": index + 1, "file_name": file_name, "width": size, "height": size})
            for (x1, y1, x2, y2), label, mask in zip(scene.boxes.tolist(), scene.labels.tolist(), scene.masks):
                ids = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label + 1}
                box = [x1, y1, x2 - x1, y2 - y1]
                annotations.append(ids | {"bbox": box, "area": int(mask.sum()), "iscrowd": 0})
        categories = [{"id": label + 1, "name": title} for label, title in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))


class _Pile:
    """A scene while it is drawn."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        # Two dull colours, cloudy or in a pattern, lit from one side.
        first, second = color(rng, (0.05, 0.4)), color(rng, (0.05, 0.4))
        self.image = pattern((size, size), first, second, rng, contrast=(0.3, 1.0), clouds=0.5)
        # The object visible at a pixel: its index plus one, 0 for background and distractors.
        self.top = np.zeros((size, size), dtype=np.int64)
        self.masks: list[np.ndarray] = []
        self.labels: list[int] = []
        # Pixels of each object: all, and the visible ones.
        self.areas: list[int] = []
        self.seen = np.zeros(0, dtype=np.int64)

    def add(self, label: int | None) -> None:
        """Adds an object, or a distractor for None, where it hides no other too much; none if there is no place."""
        for _ in range(8):
            alpha, inside = self._outline(label)
            x = int(self.rng.integers(-alpha.shape[1] // 4, self.size - alpha.shape[1] * 3 // 4))
            y = int(self.rng.integers(-alpha.shape[0] // 4, self.size - alpha.shape[0] * 3 // 4))
            if self._place(alpha, inside, x, y, label):
                return

    def _outline(self, label: int | None) -> tuple[np.ndarray, int]:
        """Coverage ``[h, w]`` in [0, 1] of a shape rotated, squeezed and scaled at random, and its area in pixels."""
        rng = self.rng
        shapes = _OBJECTS[CLASSES[label]] if label is not None else _DISTRACTORS[int(rng.integers(len(_DISTRACTORS)))]
        turn, axis = rng.uniform(0, 2 * np.pi, 2)
        squeeze = rng.uniform(0.7, 1.0)
        matrix = _rotation(axis) @ np.diag([1.0, squeeze]) @ _rotation(turn - axis)
        # A third of the boxes are below 32 pixels.
        longest = SMALLEST * (self.size * LARGEST / SMALLEST) ** (rng.random() ** 0.6)
        outlines = [points @ matrix.T for points in shapes]
        low, high = outlines[0].min(0), outlines[0].max(0)
        scale = longest / (high - low).max()
        extent = np.ceil((high - low) * scale).astype(int)
        canvas = Image.new("L", tuple((extent * _SUPERSAMPLING).tolist()))
        pen = ImageDraw.Draw(canvas)
        for fill, points in zip((255, 0), outlines, strict=False):
            pen.polygon(((points - low) * scale * _SUPERSAMPLING).flatten().tolist(), fill=fill)
        alpha = np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float32) / 255
        return alpha, int((alpha >= 0.5).sum())

    def _place(self, alpha: np.ndarray, whole: int, x: int, y: int, label: int | None) -> bool:
        window, part = self._clip(alpha, x, y)
        mask = part >= 0.5
        if label is not None and mask.sum() < VISIBLE * whole:
            return False
        hidden = np.bincount(self.top[window][mask], minlength=len(self.areas) + 1)[1:]
        if np.any(self.seen - hidden < VISIBLE * np.array(self.areas)):
            return False
        self.seen = self.seen - hidden
        self._paint(alpha, x, y)
        if label is None:
            self.top[window][mask] = 0
            return True
        self.areas.append(whole)
        self.seen = np.append(self.seen, mask.sum())
        self.labels.append(label)
        full = np.zeros((self.size, self.size), dtype=bool)
        full[window] = mask
        self.masks.append(full)
        self.top[full] = len(self.areas)
        return True

    def _clip(self, drawn: np.ndarray, x: int, y: int) -> tuple[tuple[slice, slice], np.ndarray]:
        """The window of the image that something drawn at (x, y) covers, and the part of it that lies inside."""
        left, above = max(0, -x), max(0, -y)
        right, below = min(drawn.shape[1], self.size - x), min(drawn.shape[0], self.size - y)
        window = (slice(y + above, max(y + below, y + above)), slice(x + left, max(x + right, x + left)))
        return window, drawn[above:below, left:right]

    def _paint(self, alpha: np.ndarray, x: int, y: int) -> None:
        """A soft shadow, then the patterned shape itself."""
        rng = self.rng
        depth = max(1.5, 0.05 * max(alpha.shape))
        margin = int(np.ceil(3 * depth))
        shadow = Image.fromarray((np.pad(alpha, margin) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(depth))
        shade = 1 - 0.45 * np.asarray(shadow, dtype=np.float32) / 255
        drop = int(np.ceil(depth * 0.7))
        window, inside = self._clip(shade[..., None], x - margin + drop, y - margin + drop)
        self.image[window] *= inside
        skin = pattern(alpha.shape, color(rng), color(rng), rng, contrast=(0.2, 0.9))
        window, inside = self._clip(np.concatenate([skin, alpha[..., None]], 2, dtype=skin.dtype), x, y)
        target = self.image[window]
        target += inside[..., 3:] * (inside[..., :3] - target)

    def finish(self) -> Scene:
        size, count = self.size, len(self.masks)
        grain = self.rng.standard_normal((size, size, 1), dtype=np.float32) * np.float32(self.rng.uniform(1, 6))
        masks = np.array(self.masks, dtype=bool).reshape(count, size, size)
        return Scene(
            image=np.clip(self.image + grain, 0, 255).astype(np.uint8),
            boxes=np.array([Image.fromarray(mask).getbbox() for mask in masks], dtype=np.float32).reshape(count, 4),
            labels=np.array(self.labels, dtype=np.int64),
            masks=masks,
            visible=(self.seen / np.array(self.areas)).astype(np.float32),
        )


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _arc(x: float, y: float, radius: float, start: float, end: float, count: int = 40) -> np.ndarray:
    """Points on a circle, angles in degrees."""
    angle = np.radians(np.linspace(start, end, count))
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def _spikes(count: int, inner: float) -> np.ndarray:
    angle = np.arange(2 * count) * np.pi / count
    radius = np.where(np.arange(2 * count) % 2 == 0, 1.0, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _cross(a: float) -> np.ndarray:
    """The corners of a plus sign with arms of half-width `a`."""
    x = [a, 1, 1, a, a, -a, -a, -1, -1, -a, -a, a]
    y = [a, a, -a, -a, -1, -1, -a, -a, a, a, 1, 1]
    return np.stack([x, y], 1)


# Outlines around the origin; a second one is cut out of the first.
_OBJECTS = {
    "ring": [_arc(0, 0, 1, 0, 360, 64), _arc(0, 0, 0.5, 0, 360, 48)],
    "star": [_spikes(5, 0.45)],
    "cross": [_cross(0.32)],
    # Between a circle and a smaller one that meets it at ±60°.
    "moon": [np.concatenate([_arc(0, 0, 1, 60, 300), _arc(0.5, 0, np.sqrt(0.75), 270, 90)])],
    # A square's corner is the tip, half circles on its two far sides are the lobes.
    "heart": [np.concatenate([[[-0.5, -0.5], [0.5, -0.5]], _arc(0.5, 0, 0.5, -90, 90), _arc(0, 0.5, 0.5, 0, 180)])],
}
_DISTRACTORS = [
    [_arc(0, 0, 1, 0, 360, 64)],
    [_spikes(3, 0.5)],
    [np.array([(-1, -0.7), (1, -0.7), (1, 0.7), (-1, 0.7)], dtype=float)],
    [np.array([(-1, -0.12), (1, -0.12), (1, 0.12), (-1, 0.12)], dtype=float)],
    [_arc(0, 0, 1, 0, 180)],
]


def color(rng: np.random.Generator, saturation: tuple[float, float] = (0.45, 0.95)) -> np.ndarray:
    """An RGB colour of any hue, float32 ``[3]`` in [0, 255]."""
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(0.45, 1.0))
    return np.array(rgb, dtype=np.float32) * 255


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
