# SPDX-License-Identifier: Apache-2.0
"""The assignment against plain loops, and its backends against each other bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

import gfl_ops
from gfl_ops.core import backends
from gfl_ops.core.random_inputs import boxes as draw_boxes
from gfl_ops.core.registry import SPECS

pytestmark = pytest.mark.usefixtures("everywhere")

BACKENDS = ["reference"] + (["native"] if backends.unavailable("native", "atss", "cpu") is None else [])
STRIDES = [8, 16, 32, 64, 128]
SIZES = [(20, 30), (10, 15), (5, 8), (3, 4), (2, 2)]


def loops(sizes, strides, gt_boxes, gt_labels, valid=None, topk=9, anchor_scale=8.0, offset=0.0, legacy=False):
    """One image by the definition, in fp32 numbers one after another; candidates by a full sort."""
    f = lambda v: torch.tensor(float(v), dtype=torch.float32)  # noqa: E731
    extra = f(1 if legacy else 0)
    priors, labels, per_level = [], [], []
    for (height, width), stride in zip(sizes, strides):
        shift, side = f((stride - 1) / 2 if legacy else 0), anchor_scale * stride - (1 if legacy else 0)
        rows = height if valid is None else min(height, math.ceil(valid[0] / stride))
        columns = width if valid is None else min(width, math.ceil(valid[1] / stride))
        inside = []
        for y in range(height):
            for x in range(width):
                labels.append(-1 if y < rows and x < columns else -2)
                if labels[-1] == -1:
                    inside.append(len(priors))
                priors.append(
                    ((f(x) + f(offset)) * f(stride) + shift, (f(y) + f(offset)) * f(stride) + shift, f(side / 2))
                )
        per_level.append(inside)
    matched, best = [-1] * len(priors), [f(0)] * len(priors)
    for slot, (box, label) in enumerate(zip(gt_boxes.float(), gt_labels.tolist())):
        if label < 0:
            continue
        x1, y1, x2, y2 = box
        gx, gy = (x1 + x2) * 0.5, (y1 + y2) * 0.5
        area = (x2 - x1 + extra) * (y2 - y1 + extra)
        candidates = []
        for inside in per_level:
            distance = {i: ((priors[i][0] - gx) ** 2 + (priors[i][1] - gy) ** 2).item() for i in inside}
            candidates += sorted(inside, key=lambda i: (distance[i], i))[:topk]
        ious = []
        for i in candidates:
            cx, cy, half = priors[i]
            w = (torch.minimum(cx + half, x2) - torch.maximum(cx - half, x1) + extra).clamp(min=0)
            h = (torch.minimum(cy + half, y2) - torch.maximum(cy - half, y1) + extra).clamp(min=0)
            own = (cx + half - (cx - half) + extra) * (cy + half - (cy - half) + extra)
            ious.append(w * h / (own + area - w * h).clamp(min=1e-6))
        if len(ious) < 2:
            continue
        values = [v.item() for v in ious]
        mean = math.fsum(values) / len(values)
        threshold = f(mean) + f(math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)))
        for i, v in zip(candidates, ious):
            cx, cy, _ = priors[i]
            margin = min((cx - x1).item(), (cy - y1).item(), (x2 - cx).item(), (y2 - cy).item())
            if v >= threshold and margin > 0.01 and (matched[i] < 0 or v > best[i]):
                labels[i], matched[i], best[i] = label, slot, v
    return torch.tensor(labels), torch.tensor(matched), torch.stack(best) if best else torch.zeros(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("legacy", [False, True], ids=["mmdet", "legacy"])
@pytest.mark.parametrize("valid", [None, (97.0, 131.0)], ids=["whole", "valid"])
def test_it_is_the_definition(backend: str, legacy: bool, valid: tuple | None, generator: torch.Generator) -> None:
    gt = draw_boxes(6, torch.device("cpu"), torch.float32, generator, extent=200.0)
    gt[3:] = gt[3:].round()
    gt[0] = torch.tensor([13.0, 9.0, 91.0, 75.0])  # well inside, so that something is assigned
    labels = torch.tensor([3, 0, -1, 5, 5, 79])
    valid_sizes = None if valid is None else torch.tensor([valid])
    with gfl_ops.set_backend(backend):
        got = gfl_ops.atss_assign(SIZES, STRIDES, gt[None], labels[None], valid_sizes, legacy=legacy)
    for g, want in zip(got, loops(SIZES, STRIDES, gt, labels, valid, legacy=legacy)):
        torch.testing.assert_close(g[0], want, rtol=0, atol=0)
    assert (got.labels >= 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 30), (2, 30), (30, 1), (7, 11), (1, 1)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_small_levels_and_every_topk(backend: str, size: tuple[int, int], generator: torch.Generator) -> None:
    """Boxes at corners, on edges and far outside; half of them on half cells, where distances tie."""
    extent = 8.0 * max(size)
    centre = torch.rand((12, 2), generator=generator) * 1.4 * extent - 0.2 * extent
    centre[:6] = (centre[:6] / 4).round() * 4
    centre[:4] = torch.tensor([[0.0, 0], [8.0 * (size[1] - 1), 0], [0, 8.0 * (size[0] - 1)], [extent, extent]])
    side = torch.rand((12, 2), generator=generator) * 120 + 1
    gt = torch.cat([centre - side / 2, centre + side / 2], 1)
    labels = torch.arange(12)
    for topk in (1, 2, 3, 5, 9, 16, 25):
        with gfl_ops.set_backend(backend):
            got = gfl_ops.atss_assign([size, (3, 5)], [8, 16], gt[None], labels[None], topk=topk)
        for g, want in zip(got, loops([size, (3, 5)], [8, 16], gt, labels, topk=topk)):
            torch.testing.assert_close(g[0], want, rtol=0, atol=0, msg=lambda m, k=topk: f"topk {k}: {m}")


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
def test_native_is_the_reference_bit_for_bit(seed: int) -> None:
    """Over the registry's samples, and over a thousand boxes an image on a full-sized pyramid."""
    generator = torch.Generator().manual_seed(seed)
    cpu = torch.device("cpu")
    drawn = [(s.id, s.args) for s in SPECS["atss"].samples(cpu, torch.float32, generator)]
    sizes = [100, 168, 50, 84, 25, 42, 13, 21, 7, 11]
    gt = draw_boxes(1000, cpu, torch.float32, generator, extent=1300.0)[None]
    gt[:, 500:] = gt[:, 500:].round()
    labels = torch.randint(0, 80, (1, 1000), generator=generator)
    strides, zero = [float(s) for s in STRIDES], [0.0] * 5
    drawn.append(("thousand", (sizes, strides, gt, labels, None, 9, 8.0, zero, False)))
    drawn.append(("thousand-legacy-topk25", (sizes, strides, gt, labels, None, 25, 8.0, zero, True)))
    for name, args in drawn:
        got, want = torch.ops.gfl.atss(*args), SPECS["atss"].reference(*args)
        for g, w, part in zip(got, want, ("labels", "matched", "iou")):
            assert torch.equal(g, w), f"{name}: {part} differ at {int((g != w).sum())} locations"


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
def test_boxes_far_away_and_huge(generator: torch.Generator) -> None:
    """Where rounding makes rows of cells equally far, the window must still find what a full sort finds."""
    power = torch.rand((64, 1), generator=generator) * 12
    centre = (torch.rand((64, 2), generator=generator) - 0.5) * 10**power
    side = 10 ** (torch.rand((64, 2), generator=generator) * 12)
    gt = torch.cat([centre - side, centre + side], 1)[None]
    args = ([20, 30, 3, 100], [8.0, 32.0], gt, torch.zeros(1, 64, dtype=torch.long), None, 9, 8.0, [0.0, 0.5], False)
    for g, w in zip(torch.ops.gfl.atss(*args), SPECS["atss"].reference(*args)):
        assert torch.equal(g, w)


def test_public_function_takes_every_dtype_and_pads() -> None:
    gt = torch.tensor([[[10.0, 10, 90, 90], [0, 0, 1, 1]]])
    labels = torch.tensor([[4, -1]])
    want = gfl_ops.atss_assign(SIZES, STRIDES, gt, labels)
    assert want.labels.shape == (1, sum(h * w for h, w in SIZES)) and set(want.matched.unique().tolist()) == {-1, 0}
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        got = gfl_ops.atss_assign(SIZES, STRIDES, gt.to(dtype), labels.int(), center_offset=[0.0] * 5)
        assert torch.equal(got.labels, want.labels) and got.iou.dtype == torch.float32
    valid = gfl_ops.atss_assign(SIZES, STRIDES, gt, labels, valid_sizes=torch.tensor([[80, 120]]))
    assert int((valid.labels != -2).sum()) == 10 * 15 + 5 * 8 + 3 * 4 + 2 * 2 + 1


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"gt_boxes": torch.zeros(1, 2, 5)}, ValueError, r"`gt_boxes` must have shape \[B, G, 4\]"),
        ({"gt_labels": torch.zeros(1, 3).long()}, ValueError, r"`gt_labels` must have shape \[B, G\] = \[1, 2\]"),
        ({"gt_labels": torch.zeros(1, 2)}, TypeError, "`gt_labels` must have one of the dtypes int64"),
        ({"strides": [8]}, ValueError, "`strides` must hold one number for each of `level_sizes`, 5"),
        ({"strides": [8, 16, 32, 64, 0]}, ValueError, "`strides` must be > 0"),
        ({"topk": 0}, ValueError, "`topk` must be >= 1"),
        ({"topk": 1.5}, TypeError, "`topk` must be an integer"),
        ({"center_offset": [0.0]}, ValueError, "`center_offset` must hold one number per level, 5"),
        ({"valid_sizes": torch.zeros(2, 2)}, ValueError, r"`valid_sizes` must have shape \[B, 2\]"),
        ({"level_sizes": [5, 5]}, ValueError, "`level_sizes` must hold"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], text: str) -> None:
    arguments = {
        "level_sizes": SIZES,
        "strides": STRIDES,
        "gt_boxes": torch.zeros(1, 2, 4),
        "gt_labels": torch.zeros(1, 2).long(),
    }
    with pytest.raises(error, match="gfl_ops.atss_assign: " + text):
        gfl_ops.atss_assign(**(arguments | change))
