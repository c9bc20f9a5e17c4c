# SPDX-License-Identifier: Apache-2.0
"""Augmentation beside size and flip, for small data sets: by name, off unless asked for, boxes checked after each step.

All draws of an image follow from (seed, epoch, image), so a training that is resumed sees the same images, whatever
process reads them. Colours are one affine map of RGB, by pillow: 1.6 ms for 640×480 pixels, where torchvision's
ColorJitter takes 26. Steps of one's own are functions, or transforms of torchvision.transforms.v2.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..config import did_you_mean
from ..files import error_text
from .coco import Sample
from .transforms import resize, resize_boxes

# A hue's turn in degrees, and the ranges of three factors around 1.
HUE, BRIGHTNESS, CONTRAST, SATURATION = 8.0, 0.3, 0.3, 0.5
JITTER = (0.5, 1.5)
# A box stays if this share of it is still seen.
VISIBLE, UNCOVERED = 0.3, 0.4
OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
FILL = (124, 116, 104)  # ImageNet's mean
LUMA = np.array([0.299, 0.587, 0.114])
# Grey is turned into itself.
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


class Draw:
    """Random numbers of one image in one epoch."""

    def __init__(self, key: str) -> None:
        # Of a seeded generator only `random()` is the same in every Python.
        self.random = random.Random(f"augment {key}").random

    def uniform(self, low: float, high: float) -> float:
        """A number between the two."""
        return low + (high - low) * self.random()

    def below(self, number: int) -> int:
        """A whole number from 0 to one less."""
        return min(int(self.random() * number), number - 1)


# Takes an image, its random numbers and what gives another image of the data set.
Function = Callable[[Sample, Draw, Callable[[], Sample]], Sample]


class Step(NamedTuple):
    """A step and how often it is done."""

    name: str
    apply: Function
    probability: float


def parse(text: str) -> list[Step]:
    """The steps of ``augment``: names, each with ``=`` and a probability if it is not the usual one.

    Raises:
        ValueError: an unknown name, a probability out of range, a function of one's own that is not there.
    """
    steps: list[Step] = []
    function: Function
    for word in POLICIES.get(text.strip(), text).split(","):
        name, _, share = word.strip().partition("=")
        if not name or name == "none":
            continue
        if ":" in name:
            function, usual = Own(name), 1.0
        elif name in STEPS:
            function, usual = STEPS[name]
        else:
            known = (*STEPS, *POLICIES)
            meant = did_you_mean(name, known) or f"; there are {', '.join(known)} and FILE.py:NAME"
            raise ValueError(f"`augment`: no step {name!r}{meant}")
        try:
            probability = float(share) if share else usual
        except ValueError:
            probability = math.nan
        if not 0 <= probability <= 1:
            raise ValueError(f"`augment`: the probability of {name} must be in 0 to 1, got {share!r}")
        steps.append(Step(name, function, probability))
    return steps


def apply(steps: Sequence[Step], sample: Sample, key: str, other: Callable[[int], Sample], count: int) -> Sample:
    """An image after all steps; `other` reads one of the `count` images of the data set."""
    draw = Draw(key)
    for step in steps:
        if draw.random() < step.probability:
            sample = checked(step.apply(sample, draw, lambda: other(draw.below(count))), step.name)
    return sample


def checked(sample: Sample, name: str) -> Sample:
    """What a step gave: boxes clipped to the image, those less than a pixel wide or high left out.

    ValueError, which names the step, for what is no image with boxes and labels.
    """
    image, boxes, labels = sample.image, sample.boxes, sample.labels
    wrong = ""
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        wrong = "an image uint8 [3, H, W]"
    elif not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4 or not bool(boxes.isfinite().all()):
        wrong = "finite boxes [n, 4]"
    elif not isinstance(labels, Tensor) or labels.shape != boxes.shape[:1]:
        wrong = "a label for each box"
    if wrong:
        raise ValueError(f"`augment`: {name} did not give {wrong}")
    size = (int(image.shape[1]), int(image.shape[2]))
    limits = boxes.new_tensor([size[1], size[0]]).repeat(2)
    boxes = torch.minimum(boxes.clamp(min=0), limits).float()
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    return sample._replace(image=image, boxes=boxes[kept], labels=labels[kept].long(), size=size)


def color(sample: Sample, draw: Draw, other: Callable[[], Sample]) -> Sample:
    """Another hue, saturation, contrast and brightness."""
    turn = math.radians(draw.uniform(-HUE, HUE))
    brightness, contrast, saturation = (draw.uniform(1 - r, 1 + r) for r in (BRIGHTNESS, CONTRAST, SATURATION))
    cosine, sine = math.cos(turn) * saturation, math.sin(turn) * saturation
    hue = np.linalg.inv(TO_YIQ) @ np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) @ TO_YIQ
    photo = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
    mean = float(np.asarray(photo.resize((1, 1), Image.Resampling.BOX))[0, 0] @ LUMA)
    matrix = np.concatenate([brightness * contrast * hue, np.full((3, 1), brightness * (1 - contrast) * mean)], 1)
    pixels = np.array(photo.convert("RGB", tuple(matrix.reshape(-1).tolist())))
    return sample._replace(image=torch.from_numpy(pixels).permute(2, 0, 1))


def jitter(sample: Sample, draw: Draw, other: Callable[[], Sample]) -> Sample:
    """A part of the image, in which objects become larger, or the image on a larger one of grey."""
    height, width = sample.size
    factor = draw.uniform(*JITTER)
    new = max(1, round(height / factor)), max(1, round(width / factor))
    y, x = (round(draw.uniform(0, abs(new[i] - sample.size[i]))) for i in (0, 1))
    if factor >= 1:
        return _or(_window(sample, x, y, *new), sample)
    canvas = _canvas(*new)
    canvas[:, y : y + height, x : x + width] = sample.image
    return sample._replace(image=canvas, boxes=sample.boxes + torch.tensor([x, y, x, y]), size=new)


def crop(sample: Sample, draw: Draw, other: Callable[[], Sample]) -> Sample:
    """A part that overlaps an object by a drawn IoU at least (SSD, arXiv 1512.02325); boxes stay by their centres."""
    height, width = sample.size
    least = OVERLAPS[draw.below(len(OVERLAPS))]
    for _ in range(40):
        w, h = (max(1, round(draw.uniform(0.3, 1) * side)) for side in (width, height))
        x, y = draw.below(width - w + 1), draw.below(height - h + 1)
        if not 0.5 <= w / h <= 2:
            continue
        centres = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2
        first, last = torch.tensor([x, y]), torch.tensor([x + w, y + h])
        inside = ((centres > first) & (centres < last)).all(1)
        if not bool(inside.any()):
            continue
        boxes = sample.boxes[inside]
        clipped = torch.minimum(torch.maximum(boxes, first.repeat(2)), last.repeat(2))
        seen, whole = _area(clipped), _area(boxes)
        if float((seen / (whole + w * h - seen)).max()) >= least:
            image = sample.image[:, y : y + h, x : x + w]
            return sample._replace(
                image=image, boxes=clipped - first.repeat(2), labels=sample.labels[inside], size=(h, w)
            )
    return sample


def mosaic(sample: Sample, draw: Draw, other: Callable[[], Sample]) -> Sample:
    """Parts of four images around a point, at about half their size (arXiv 2004.10934)."""
    height, width = sample.size
    cy, cx = round(draw.uniform(0.3, 0.7) * height), round(draw.uniform(0.3, 0.7) * width)
    canvas, boxes, labels = _canvas(height, width), [], []
    for number, (y1, y2, x1, x2) in enumerate(
        ((0, cy, 0, cx), (0, cy, cx, width), (cy, height, 0, cx), (cy, height, cx, width))
    ):
        tile = sample if number == 0 else other()
        h, w = y2 - y1, x2 - x1
        if h < 1 or w < 1:
            continue
        scale = max(h / tile.size[0], w / tile.size[1]) * draw.uniform(1, 1.5)
        tile = _scaled(tile, max(h, round(tile.size[0] * scale)), max(w, round(tile.size[1] * scale)))
        x, y = draw.below(tile.size[1] - w + 1), draw.below(tile.size[0] - h + 1)
        tile = _window(tile, x, y, h, w)
        canvas[:, y1:y2, x1:x2] = tile.image
        boxes.append(tile.boxes + torch.tensor([x1, y1, x1, y1]))
        labels.append(tile.labels)
    return _or(sample._replace(image=canvas, boxes=torch.cat(boxes), labels=torch.cat(labels)), sample)


def mixup(sample: Sample, draw: Draw, other: Callable[[], Sample]) -> Sample:
    """The mean of two images, with the objects of both (arXiv 1710.09412)."""
    share, second = draw.uniform(0.4, 0.6), other()
    height, width = sample.size
    scale = min(height / second.size[0], width / second.size[1])
    second = _scaled(second, max(1, round(second.size[0] * scale)), max(1, round(second.size[1] * scale)))
    h, w = min(height, second.size[0]), min(width, second.size[1])
    image = sample.image.clone(memory_format=torch.preserve_format)
    mixed = image[:, :h, :w].float().mul_(share).add_(second.image[:, :h, :w].float(), alpha=1 - share)
    image[:, :h, :w] = mixed.round_().to(torch.uint8)
    boxes, labels = torch.cat([sample.boxes, second.boxes]), torch.cat([sample.labels, second.labels])
    return sample._replace(image=image, boxes=boxes, labels=labels)


def copypaste(sample: Sample, draw: Draw, other: Callable[[], Sample]) -> Sample:
    """Up to three objects of another image, as their boxes cut them out, over this one (arXiv 2012.07177)."""
    source, (height, width) = other(), sample.size
    image, boxes, labels = sample.image, sample.boxes, sample.labels
    for _ in range(min(len(source.boxes), 1 + draw.below(3))):
        chosen = draw.below(len(source.boxes))
        x1, y1, x2, y2 = (round(side) for side in source.boxes[chosen].tolist())
        scale = min(1.0, 0.5 * width / max(x2 - x1, 1), 0.5 * height / max(y2 - y1, 1))
        w, h = round((x2 - x1) * scale), round((y2 - y1) * scale)
        x, y = draw.below(max(width - w, 0) + 1), draw.below(max(height - h, 0) + 1)
        if min(w, h) < 4:
            continue
        if image is sample.image:
            image = image.clone(memory_format=torch.preserve_format)
        image[:, y : y + h, x : x + w] = resize(source.image[:, y1:y2, x1:x2], h, w)
        new = boxes.new_tensor([[x, y, x + w, y + h]])
        covered = torch.cat([torch.maximum(boxes[:, :2], new[:, :2]), torch.minimum(boxes[:, 2:], new[:, 2:])], 1)
        seen = 1 - _area(covered) / _area(boxes)
        boxes = torch.cat([boxes[seen >= UNCOVERED], new])
        labels = torch.cat([labels[seen >= UNCOVERED], source.labels[chosen : chosen + 1]])
    return sample._replace(image=image, boxes=boxes, labels=labels)


# Each step with its usual probability.
STEPS: dict[str, tuple[Function, float]] = {
    "copypaste": (copypaste, 0.3),
    "mosaic": (mosaic, 0.5),
    "mixup": (mixup, 0.1),
    "crop": (crop, 0.5),
    "jitter": (jitter, 0.5),
    "color": (color, 0.8),
}
# Steps by one name; that of the recipe for one's own data.
POLICIES = {"finetune": "mosaic=0.3,crop=0.3,jitter=0.5,color=0.8"}


class Own:
    """FILE.py:NAME or MODULE:NAME, a function of (image, boxes, labels) or a transform of torchvision's v2."""

    def __init__(self, name: str) -> None:
        source, _, attribute = name.rpartition(":")
        try:
            if source.endswith(".py"):
                spec = importlib.util.spec_from_file_location(source.rpartition("/")[2][:-3], source)
                if spec is None or spec.loader is None:
                    raise ImportError(f"{source} is no Python file")
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            else:
                module = importlib.import_module(source)
            self.name, self.function = name, getattr(module, attribute)
        except (ImportError, OSError, AttributeError) as error:
            raise ValueError(f"`augment`: {name} is not there: {error_text(error)}") from None

    def __call__(self, sample: Sample, draw: Draw, other: Callable[[], Sample]) -> Sample:
        call = _by_v2 if isinstance(self.function, nn.Module) else _plainly
        with _seeded(draw.below(2**31)):
            image, boxes, labels = call(self.function, sample)
        return sample._replace(image=image, boxes=boxes, labels=labels)

    def __reduce__(self) -> tuple[Any, ...]:
        return Own, (self.name,)


def _plainly(function: Callable[..., Any], sample: Sample) -> tuple[Any, Any, Any]:
    return function(sample.image, sample.boxes, sample.labels)


def _by_v2(transform: nn.Module, sample: Sample) -> tuple[Any, Any, Any]:
    from torchvision import tv_tensors

    boxes = tv_tensors.BoundingBoxes(sample.boxes, format="XYXY", canvas_size=sample.size)
    found = transform({"image": tv_tensors.Image(sample.image), "boxes": boxes, "labels": sample.labels})
    return found["image"].as_subclass(Tensor), found["boxes"].as_subclass(Tensor), found["labels"]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The generators that functions draw from, set for one image and then as they were."""
    before, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(of_numpy)


def _window(sample: Sample, x: int, y: int, height: int, width: int) -> Sample:
    """A part of an image, with the boxes of which enough is seen."""
    offset, limits = sample.boxes.new_tensor([x, y, x, y]), sample.boxes.new_tensor([width, height, width, height])
    clipped = torch.minimum((sample.boxes - offset).clamp(min=0), limits)
    kept = _area(clipped) >= VISIBLE * _area(sample.boxes)
    image = sample.image[:, y : y + height, x : x + width]
    return sample._replace(image=image, boxes=clipped[kept], labels=sample.labels[kept], size=(height, width))


def _or(sample: Sample, before: Sample) -> Sample:
    """An image that lost all of its objects stays as it was."""
    return before if len(before.boxes) and not len(sample.boxes) else sample


def _scaled(sample: Sample, height: int, width: int) -> Sample:
    boxes = resize_boxes(sample.boxes, sample.size, (height, width))
    return sample._replace(image=resize(sample.image, height, width), boxes=boxes, size=(height, width))


def _canvas(height: int, width: int) -> Tensor:
    fill = torch.tensor(FILL, dtype=torch.uint8)
    return fill.expand(height, width, 3).contiguous().permute(2, 0, 1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
