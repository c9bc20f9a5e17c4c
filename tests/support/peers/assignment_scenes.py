# SPDX-License-Identifier: Apache-2.0
"""Drawn and real scenes for the assigners of other frameworks, and what the tests of them share."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from real_data import annotations, category_ids, missing
from torch import Tensor

from gfl_ops.core.random_inputs import boxes as draw_boxes
from gfl_ops.ops.head.task_aligned_reference import locations

from . import mmdet_stub

CPU = torch.device("cpu")
STRIDES, SIDE = [8, 16, 32], 320
FLAT = [SIDE // s for s in STRIDES for _ in (0, 1)]
POINTS = locations(FLAT, STRIDES, [0.5] * 3, CPU)
Given = list[Tensor]


def needs(package: str) -> pytest.MarkDecorator:
    reason = f"{package} is not installed (tests/support/peers/requirements.txt, requirements_alone.txt)"
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=reason)


def predictions(gt: Tensor, labels: Tensor, classes: int, g: torch.Generator) -> Given:
    """As the assigners take them: scores, boxes near those that contain the location, points, labels, boxes, mask."""
    images, slots = labels.shape
    chosen = torch.randint(0, slots, (images, len(POINTS)), generator=g)
    near = gt.gather(1, chosen[..., None].expand(-1, -1, 4))
    inside = ((near[..., :2] < POINTS) & (near[..., 2:] > POINTS)).all(-1, keepdim=True)
    side = torch.exp(torch.randn(images, len(POINTS), 2, generator=g) * 0.7 + 3)
    boxes = torch.where(
        inside, near + torch.randn(near.shape, generator=g) * 4, torch.cat([POINTS - side, POINTS + side], -1)
    )
    scores = torch.rand(images, len(POINTS), classes, generator=g) ** 3
    mask = (labels >= 0)[..., None].float()
    return [scores, boxes, POINTS, labels.clamp(min=0)[..., None].float(), gt * mask, mask]


def drawn(g: torch.Generator, slots: int = 30, classes: int = 12) -> Given:
    gt = draw_boxes(3 * slots, CPU, torch.float32, g, extent=float(SIDE)).reshape(3, slots, 4)
    labels = torch.randint(0, classes, (3, slots), generator=g)
    labels[1, slots // 2 :], labels[2] = -1, -1
    return predictions(gt, labels, classes, g)


def real(g: torch.Generator) -> Given:
    """The objects of 47 photos of COCO val2017, each photo stretched to a square."""
    if reason := missing():
        pytest.skip(reason)
    content = json.loads(annotations().read_text())
    classes = {c: i for i, c in enumerate(category_ids())}
    found: dict[int, list[tuple[int, list[float]]]] = {image["id"]: [] for image in content["images"]}
    scale = {image["id"]: (SIDE / image["width"], SIDE / image["height"]) for image in content["images"]}
    for item in content["annotations"]:
        (x, y, w, h), (sx, sy) = item["bbox"], scale[item["image_id"]]
        found[item["image_id"]].append((classes[item["category_id"]], [x * sx, y * sy, (x + w) * sx, (y + h) * sy]))
    slots = max(map(len, found.values()))
    gt, labels = torch.zeros(len(found), slots, 4), torch.full((len(found), slots), -1)
    for b, objects in enumerate(found.values()):
        for j, (label, box) in enumerate(objects):
            gt[b, j], labels[b, j] = torch.tensor(box), label
    return predictions(gt, labels, 80, g)


SCENES = {"drawn": drawn, "real": real}
scenes = pytest.mark.parametrize("scene", SCENES)


def by_lower_index(x: Tensor, k: int, dim: int = -1, largest: bool = True, **others: Any) -> Any:
    """torch.topk with ties by the lower index, as on CUDA."""
    values, indices = x.sort(dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


def stable_sort(x: Tensor, dim: int = -1, descending: bool = False) -> Any:
    """torch.sort with ties by the lower index."""
    return x.sort(dim=dim, descending=descending, stable=True)


class Cuts:
    """torch.topk with ties by the lower index, and the narrowest of its cuts: between what is selected and what is not,
    relative. A cut that is a few roundings wide may be made elsewhere by other arithmetic; equal values may not."""

    def __init__(self) -> None:
        self.narrowest = 1.0

    @property
    def hang_on_rounding(self) -> bool:
        return self.narrowest < 5e-6

    def __call__(self, x: Tensor, k: int, dim: int = -1, largest: bool = True, **others: Any) -> Any:
        if 0 < k < x.shape[dim]:
            values = x.sort(dim=dim, descending=largest, stable=True).values
            last, first = values.narrow(dim, k - 1, 1), values.narrow(dim, k, 1)
            cut = ((last - first).abs() / torch.maximum(last.abs(), first.abs()))[last != first]
            self.narrowest = min([self.narrowest, *cut[cut.isfinite()].flatten().tolist()])
        return by_lower_index(x, k, dim, largest)


def theirs_of_wide_cuts(draw: Callable[[], Any], call: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The first of what `draw` gives for which theirs, by `call`, selects nothing by a few roundings; and their result.

    Without this one seed in some hundred would fail a test for a decision that is as good as theirs.
    """
    for _ in range(50):
        given, cuts = draw(), Cuts()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch, "topk", cuts)
            patched.setattr(torch, "sort", stable_sort)
            want = call(given)
        if not cuts.hang_on_rounding:
            return given, want
    raise AssertionError("every scene has a cut of a few roundings")


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float = 2e-6) -> None:
    """Equal decisions; scores up to the rounding of a sixth power."""
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        torch.testing.assert_close(g, w, rtol=0, atol=tolerance if g.is_floating_point() else 0)


def mmyolo_assigner(name: str) -> Any:
    """The class of mmyolo's assigner, which refuses mmcv from 2.1 on by its number."""
    mmdet_stub.install()
    import mmcv

    with pytest.MonkeyPatch.context() as its_number:
        its_number.setattr(mmcv, "__version__", "2.0.1")
        from mmyolo.models.task_modules import assigners
    return getattr(assigners, name)
