# SPDX-License-Identifier: Apache-2.0
"""Inputs larger than the registry's samples, where kernels take other paths: several tiles, panels, blocks, no room.

Every backend and device against the reference on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import gfl_ops
from gfl_ops.core import backends, random_inputs

CPU = torch.device("cpu")
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
STRIDES = [8.0, 16.0, 32.0, 64.0, 128.0]


class Large(NamedTuple):
    """A call of an operator: `draw` makes its arguments, `call` returns all that is compared."""

    stem: str
    draw: Callable[[torch.Generator], tuple[Any, ...]]
    call: Callable[..., Any]


def boxes_to_suppress(n: int, classes: int, extent: float, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        boxes = random_inputs.boxes(n, CPU, dtype, generator, extent=extent)
        # Every score once: what takes the first of equals is tested by the samples.
        scores = torch.randperm(n, generator=generator).float() / n
        return boxes, scores, torch.randint(0, classes, (n,), generator=generator)

    return draw


def scored_boxes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    n, classes = 3000, 5
    scores = torch.randperm(n * classes, generator=generator).view(n, classes) / (n * classes)
    return random_inputs.boxes(n, CPU, torch.float32, generator, extent=60.0), scores


def sides(rows: int) -> Callable[..., Any]:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        target = torch.rand(rows, generator=generator) * 16.5 - 0.25
        return torch.randn((rows, 17), generator=generator) * 3, target

    return draw


def dfl(pred: Tensor, target: Tensor) -> Any:
    leaf = pred.detach().requires_grad_()
    loss, distance = gfl_ops.dfl_integral(leaf, target)
    return loss, distance, torch.autograd.grad((loss * 2000, distance.sum()), leaf, (torch.ones_like(loss),) * 2)


def locations(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn((22400, 68), generator=generator) * 3, torch.rand((22400, 2), generator=generator) * 800


def pyramid(size: tuple[int, int]) -> list[tuple[int, int]]:
    return [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in STRIDES]


def objects(generator: torch.Generator, images: int, slots: int, extent: float) -> tuple[Tensor, Tensor]:
    boxes = random_inputs.boxes(images * slots, CPU, torch.float32, generator, extent=extent).view(images, slots, 4)
    return boxes, torch.randint(-1, 80, (images, slots), generator=generator)


def assign(boxes: Tensor, labels: Tensor) -> Any:
    return tuple(gfl_ops.atss_assign(pyramid((800, 1344)), STRIDES, boxes, labels))


def head(generator: torch.Generator) -> tuple[Any, ...]:
    sizes = pyramid((256, 320))
    boxes, labels = objects(generator, 2, 40, 250.0)
    assigned = gfl_ops.atss_assign(sizes, STRIDES, boxes, labels)
    maps = [[torch.randn((2, c, *size), generator=generator) for size in sizes] for c in (80, 68)]
    return (*maps, *assigned, boxes)


def head_loss(scores: Any, distances: Any, labels: Tensor, matched: Tensor, iou: Tensor, boxes: Tensor) -> Any:
    leaves = [m.detach().requires_grad_() for m in (*scores, *distances)]
    maps, assigned = (leaves[: len(STRIDES)], leaves[len(STRIDES) :]), gfl_ops.Assignment(labels, matched, iou)
    losses = gfl_ops.gfl_loss(*maps, STRIDES, assigned, boxes)
    return tuple(losses)[:3], torch.autograd.grad(losses.cls + losses.box + losses.dfl, leaves)


def crowded(generator: torch.Generator) -> tuple[Any, ...]:
    """More candidates in a level than a segment has room for (16 384), all of another score, in channels last."""
    classes, height, width = 8, 60, 80
    scores = torch.randperm(2 * classes * height * width, generator=generator).view(2, classes, height, width)
    logits = (scores / scores.numel() * 6 - 2.5).contiguous(memory_format=torch.channels_last)
    return [logits], [torch.randn((2, 68, height, width), generator=generator)], [(480.0, 640.0)] * 2


def detect(**options: Any) -> Callable[..., Any]:
    def call(scores: Any, distances: Any, sizes: Any) -> Any:
        found = gfl_ops.postprocess(scores, distances, [8.0], sizes, **options)
        return found.boxes, found.scores, found.labels, found.count

    return call


def batched(threshold: float) -> Callable[..., Any]:
    return lambda boxes, scores, classes: gfl_ops.batched_nms(boxes, scores, classes, threshold)


CASES = {
    "nms-one-class-6000": Large("nms", boxes_to_suppress(6000, 1, 500.0), batched(0.3)),
    "nms-three-classes-5000-fp64": Large("nms", boxes_to_suppress(5000, 3, 300.0, torch.float64), batched(0.3)),
    "nms-80-classes-10000": Large("nms", boxes_to_suppress(10000, 80, 60.0), batched(0.3)),
    "soft-nms-2000": Large("soft_nms", boxes_to_suppress(2000, 3, 300.0), gfl_ops.soft_nms),
    "multiclass-nms-15000-pairs": Large(
        "multiclass_nms", scored_boxes, lambda b, s: gfl_ops.multiclass_nms(b, s, 0.05, 0.5, 300)
    ),
    "decode-22400": Large("decode", locations, lambda p, points: gfl_ops.decode(p, points, 8.0, max_shape=(800, 800))),
    "dfl-integral-70001": Large("dfl_integral", sides(70001), dfl),
    "atss-16x60": Large("atss", lambda g: objects(g, 16, 60, 1000.0), assign),
    "head-loss-256x320": Large("gfl_loss", head, head_loss),
    "postprocess-no-room": Large("postprocess", crowded, detect(max_detections=300)),
    "postprocess-no-room-few-wanted": Large("postprocess", crowded, detect(nms_pre=50, topk_mode="anchor")),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_every_backend_agrees(name: str, backend: str, device: str, generator: torch.Generator) -> None:
    stem, draw, call = CASES[name]
    if reason := backends.unavailable(backend, stem, device):
        pytest.skip(reason)
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter would take minutes")
    args = draw(generator)
    with gfl_ops.set_backend("reference"):
        want = call(*args)
    with gfl_ops.set_backend(backend):
        got = call(*tree_map_only(Tensor, lambda t: t.to(device), args))
    # A coordinate keeps the rounding of its point and its distance, of up to a thousand pixels each.
    atol = 1e-4 if stem == "decode" else 2e-5
    torch.testing.assert_close(tree_map_only(Tensor, Tensor.cpu, got), want, rtol=2e-5, atol=atol)
