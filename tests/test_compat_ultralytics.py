# SPDX-License-Identifier: Apache-2.0
"""The real ultralytics, patched against unpatched: losses, decoding, suppression, and YOLOv8-n training."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peers.compare import assert_as_exact, evaluate
from torch import Tensor

from gfl_ops.compat import ultralytics as compat
from gfl_ops.core.random_inputs import boxes as draw_boxes

pytestmark = pytest.mark.peers
if importlib.util.find_spec("ultralytics") is None:
    pytest.skip("ultralytics is not installed (tests/support/peers/requirements.txt)", allow_module_level=True)

# It asks the network at import otherwise.
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
from ultralytics.nn.modules import block  # noqa: E402
from ultralytics.utils import loss as their_loss  # noqa: E402
from ultralytics.utils import nms as their_nms  # noqa: E402

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    compat.unpatch()


def both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What `call` gives with ultralytics patched and as it is."""
    with compat.patch():
        ours = call()
    return ours, call()


def test_it_says_what_it_replaces_and_puts_it_back() -> None:
    owners = [their_loss.DFLoss, their_loss.BboxLoss, their_loss.TaskAlignedAssigner, block.DFL, their_nms]
    owners.append(their_loss.v8DetectionLoss)
    before = [dict(vars(owner)) for owner in owners]
    names = compat.patch()
    print(names)
    ends = ["DFLoss", "BboxLoss", "TaskAlignedAssigner", "DFL", "non_max_suppression", "v8DetectionLoss"]
    assert [n.rsplit(".")[-1] for n in names] == ends
    assert compat.patch() == names
    assert [dict(vars(owner)) for owner in owners] != before
    assert compat.unpatch() == names and compat.unpatch() == []
    assert [dict(vars(owner)) for owner in owners] == before


@pytest.mark.parametrize("bins", [16, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 33])
def test_dfl_loss(n: int, dtype: torch.dtype, bins: int, generator: torch.Generator) -> None:
    """`reg_max` counts bins; a target beyond them is held at the last one, in place there, not here."""
    logits = (torch.randn(n * 4, bins, generator=generator) * 3).to(dtype)
    target = torch.rand(n, 4, generator=generator) * (bins + 2) - 1
    module = their_loss.DFLoss(bins)

    def call(x: Tensor) -> Tensor:
        return module(x, target.clone().to(torch.promote_types(x.dtype, torch.float32)))

    truth = evaluate(call, [logits.double()])
    ours, theirs = both(lambda: evaluate(call, [logits]))
    assert_as_exact(ours, theirs, truth, share=4.0)
    for theirs_or_ours in (compat.DFLoss(bins), module):
        given = target.clone()
        theirs_or_ours(logits, given)
        assert torch.equal(given, target) == (theirs_or_ours is not module or n == 0)


def test_a_target_in_bf16() -> None:
    """There its bound rounds to the last bin, beyond which theirs looks for another."""
    logits, target = torch.randn(4, 16), torch.full((1, 4), 15.5).bfloat16()
    with pytest.raises(RuntimeError, match="index 16 is out of bounds"):
        their_loss.DFLoss(16)(logits, target.clone())
    want = compat.DFLoss(16)(logits, target.float())
    assert torch.equal(compat.DFLoss(16)(logits, target), want)


def scene(n: int, dtype: torch.dtype, g: torch.Generator, channels: int = 64) -> dict[str, Any]:
    """Two images of 200 points, n positives."""
    points = torch.rand(200, 2, generator=g) * 40
    target = draw_boxes(400, CPU, torch.float32, g, extent=40.0).reshape(2, 200, 4)
    pred = target + torch.randn(2, 200, 4, generator=g)
    # What is predicted is never turned round.
    pred[..., 2:] = torch.maximum(pred[..., 2:], pred[..., :2] + 0.5)
    fg = torch.zeros(400, dtype=torch.bool)
    fg[torch.randperm(400, generator=g)[:n]] = True
    scores = torch.rand(2, 200, 3, generator=g) * fg.reshape(2, 200, 1)
    return {
        "pred_dist": (torch.randn(2, 200, channels, generator=g) * 2).to(dtype),
        "pred_bboxes": pred.to(dtype),
        "anchor_points": points,
        "target_bboxes": target,
        "target_scores": scores,
        "target_scores_sum": scores.sum().clamp(min=1),
        "fg_mask": fg.reshape(2, 200),
        "imgsz": torch.tensor([320.0, 640.0]),
        "stride": torch.full((200, 1), 8.0),
    }


@pytest.mark.parametrize("reg_max", [16, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [0, 57])
def test_bbox_loss(n: int, dtype: torch.dtype, reg_max: int, generator: torch.Generator) -> None:
    given = scene(n, dtype, generator, channels=4 * reg_max)
    module = their_loss.BboxLoss(reg_max)

    def call(dist: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dist.dtype, torch.float32)
        cast = {k: v.to(wide) if v.is_floating_point() else v.clone() for k, v in given.items()}
        return module(**{**cast, "pred_dist": dist, "pred_bboxes": boxes})

    leaves = [given["pred_dist"], given["pred_bboxes"]]
    truth = evaluate(call, [leaf.double() for leaf in leaves])
    ours, theirs = both(lambda: evaluate(call, leaves))
    # Sums of 57 losses in another order; theirs adds 1e-7 to the heights too.
    assert_as_exact(ours, theirs, truth, share=20.0 if dtype != torch.float64 else 2**32)


def test_bbox_loss_in_its_shorter_form(generator: torch.Generator) -> None:
    """Up to 8.3 ultralytics passes neither the images' size nor the strides."""
    given = scene(31, torch.float32, generator)
    whole = compat.BboxLoss(16)(**given)
    short = compat.BboxLoss(16)(**{k: v for k, v in given.items() if k not in ("imgsz", "stride")})
    assert torch.equal(torch.stack(whole), torch.stack(short))
    given = scene(31, torch.float32, generator, channels=4)
    loss_iou, nothing = compat.BboxLoss(1)(**{k: v for k, v in given.items() if k not in ("imgsz", "stride")})
    assert loss_iou > 0 and nothing == 0


def test_losses_under_autocast(generator: torch.Generator) -> None:
    """bf16 distributions, the rest fp32, as ultralytics trains."""
    given = scene(57, torch.float32, generator)
    given["pred_dist"] = given["pred_dist"].bfloat16()
    module = their_loss.BboxLoss(16)
    truth = module(**{k: v.double() if v.is_floating_point() else v for k, v in given.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = both(lambda: module(**given))
    for a, b, t in zip(ours, theirs, truth):
        assert a.dtype == torch.float32
        assert abs(a - t) <= 2 * abs(b - t) + 1e-5 * abs(t)


def test_complete_iou_loss(generator: torch.Generator) -> None:
    """At every overlap, unlike mmdet's, with its gradient; equal boxes too."""
    from ultralytics.utils.metrics import bbox_iou

    target = draw_boxes(300, CPU, torch.float64, generator, extent=60.0)
    pred = target + torch.randn(300, 4, generator=generator, dtype=torch.float64) * 4
    pred[:, 2:] = torch.maximum(pred[:, 2:], pred[:, :2] + 0.5)
    pred[::50] = target[::50] + 0.001
    ours = evaluate(compat.complete_iou_loss, [pred, target])
    theirs = evaluate(lambda p, t: 1 - bbox_iou(p, t, xywh=False, CIoU=True)[:, 0], [pred, target])
    for a, b in zip(ours, theirs, strict=True):
        # 1e-7 more height there.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("c1", [16, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 37), (1, 0)], ids=str)
def test_decoding(shape: tuple[int, int], dtype: torch.dtype, c1: int, generator: torch.Generator) -> None:
    module, x = block.DFL(c1), (torch.randn(shape[0], 4 * c1, shape[1], generator=generator) * 3).to(dtype)
    own = compat.DFL(c1)
    own.load_state_dict(module.state_dict())
    if shape[1] == 0:
        # Their convolution refuses no points; ours gives none.
        with compat.patch():
            assert module(x).shape == own(x).shape == (1, 4, 0)
        return
    truth = evaluate(module.double(), [x.double()])
    module.to(dtype)
    ours, theirs = both(lambda: evaluate(module, [x]))
    assert ours[0].dtype == dtype
    # A sum of 16 terms.
    assert_as_exact(ours, theirs, truth, share=16.0)
    assert torch.equal(own(x), ours[0])


def head_output(batch: int, classes: int, extra: int, places: int, g: torch.Generator) -> Tensor:
    """Boxes x, y, w, h, scores mostly low, and masks."""
    boxes = draw_boxes(batch * places, CPU, torch.float32, g, extent=200.0)
    xywh = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
    scores = torch.rand(batch * places, classes, generator=g) ** 6
    rows = torch.cat([xywh, scores, torch.randn(batch * places, extra, generator=g)], 1)
    return rows.reshape(batch, places, -1).transpose(1, 2)


OPTIONS = [
    {},
    {"multi_label": True, "conf_thres": 0.1},
    {"agnostic": True, "iou_thres": 0.7},
    {"classes": [0, 2], "max_det": 5},
    {"max_nms": 50, "conf_thres": 0.01},
    {"nc": 6},
    {"multi_label": True, "nc": 6, "conf_thres": 0.3},
    {"conf_thres": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_non_max_suppression(dtype: torch.dtype, options: dict[str, Any], generator: torch.Generator) -> None:
    maps = head_output(3, 6, 4 if "nc" in options else 0, 400, generator)
    maps[1, 4:10] = 0
    maps = maps.to(dtype)
    before = maps.clone()

    def call() -> Any:
        return their_nms.non_max_suppression(maps, **options, return_idxs=True)

    (ours, our_places), (theirs, their_places) = both(call)
    assert torch.equal(maps, before)
    assert len(ours) == len(theirs) == 3 and len(ours[1]) == 0
    for a, b, i, j in zip(ours, theirs, our_places, their_places, strict=True):
        assert a.shape[1] == b.shape[1] and a.dtype == torch.promote_types(dtype, torch.float32)
        assert i.dtype == torch.int64
        # Half precision has equal scores, which they leave in no order; and their offsets of 7680 a class cost bits.
        if dtype == torch.float16 or "max_nms" in options:
            assert abs(len(a) - len(b)) <= 2
        else:
            mine, their = ({(p, int(c)) for p, c in zip(x.flatten().tolist(), y[:, 5])} for x, y in ((i, a), (j, b)))
            assert len(mine ^ their) <= 2
        if torch.equal(i, j.flatten().long()):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0)


def test_suppression_of_lists_and_of_none() -> None:
    maps = torch.zeros(2, 10, 0)
    ours, theirs = both(lambda: their_nms.non_max_suppression([torch.zeros(2, 10, 30), None]))
    assert [x.shape for x in ours] == [x.shape for x in theirs] == [(0, 6), (0, 6)]
    assert [x.shape for x in compat.non_max_suppression(maps)] == [(0, 6), (0, 6)]
    with pytest.raises(ValueError, match=r"`prediction` must have shape \[B, 4 \+ C \+ M, A\], got \[2, 3, 5\]"):
        compat.non_max_suppression(torch.zeros(2, 3, 5))


def test_there_is_no_time_limit(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a clock that jumps an hour a look, theirs gives up after an image; upright or rotated."""
    upright, rotated = head_output(3, 6, 0, 200, generator), head_output(3, 6, 1, 200, generator)
    hours = iter(range(0, 10**7, 3600))
    monkeypatch.setattr(their_nms.time, "time", lambda: next(hours))
    theirs = their_nms.non_max_suppression(upright)
    assert len(theirs[0]) and not len(theirs[1]) and not len(theirs[2])
    with compat.patch():
        assert all(len(x) for x in their_nms.non_max_suppression(upright))
        assert all(len(x) for x in their_nms.non_max_suppression(rotated, nc=6, rotated=True))


def test_what_is_not_ours_to_serve(generator: torch.Generator) -> None:
    """End-to-end boxes are not suppressed; a traced module keeps their operators."""
    rows = torch.rand(2, 30, 6, generator=generator)
    ours, theirs = both(lambda: their_nms.non_max_suppression(rows, conf_thres=0.5))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    module = block.DFL(16)
    with compat.patch():
        traced = torch.jit.trace(module, torch.randn(1, 64, 5, generator=generator))
    assert "gfl" not in str(traced.inlined_graph)


def small_yolo(seed: int) -> Any:
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import LOGGER

    LOGGER.setLevel(logging.ERROR)
    torch.manual_seed(seed)
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    model.args = get_cfg()
    return model


def batch_of_rectangles(g: torch.Generator, side: int = 96, count: int = 3) -> dict[str, Tensor]:
    """Two images of coloured rectangles, their class the colour, and their boxes as ultralytics wants them."""
    images, boxes, labels = torch.full((2, 3, side, side), 0.5), [], []
    for image in images:
        image += torch.randn(3, 1, 1, generator=g) * 0.05
        for _ in range(count):
            size = torch.rand(2, generator=g) * 0.35 + 0.2
            corner = torch.rand(2, generator=g) * (1 - size)
            (x0, y0), (x1, y1) = (corner * side).int().tolist(), ((corner + size) * side).int().tolist()
            label = int(torch.randint(0, 3, (1,), generator=g))
            image[:, y0:y1, x0:x1] = torch.eye(3)[label][:, None, None]
            boxes.append(torch.tensor([x0 + x1, y0 + y1, 2 * (x1 - x0), 2 * (y1 - y0)]) / (2 * side))
            labels.append(label)
    return {
        "img": images,
        "batch_idx": torch.arange(2.0).repeat_interleave(count),
        "cls": torch.tensor(labels)[:, None].float(),
        "bboxes": torch.stack(boxes),
    }


def test_yolov8_has_the_same_gradients(seed: int) -> None:
    """Of one step in fp32, and no further off than those of weights that are moved by 1e-7 of themselves."""

    def gradients(nudge: float = 0.0) -> list[Tensor]:
        model = small_yolo(seed)
        model.train()
        g = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data.mul_(1 + nudge * torch.randn(p.shape, generator=g))
        total, _ = model.loss(batch_of_rectangles(torch.Generator().manual_seed(seed)))
        total.sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    ours, theirs = both(gradients)
    nudged = gradients(1e-7)

    def furthest(found: list[Tensor]) -> float:
        return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found, theirs, strict=True))

    print(f"gradients differ by {furthest(ours):.1e}; by {furthest(nudged):.1e} with weights moved by 1e-7")
    assert furthest(ours) <= max(1e-5, furthest(nudged))


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float64, 0.01), (torch.float32, 0.001)], ids=str)
def test_yolov8_trains_the_same(dtype: torch.dtype, lr: float, seed: int) -> None:
    """YOLOv8-n from its yaml, 20 steps, patched and unpatched from the same seed: loss curves within 1e-3.

    In fp64 with ultralytics' warm-up, whose lr of 0.01 is reached after 100 steps. In fp32 with a tenth of it: from
    random weights a last bit, whoever's it is, grows to some 5e-3 in 20 of the whole steps.
    """

    def curve() -> list[float]:
        model = small_yolo(seed).to(dtype)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.8, nesterov=True)
        g = torch.Generator().manual_seed(seed)
        losses = []
        for step in range(20):
            optimizer.param_groups[0]["lr"] = lr * step / 100
            batch = batch_of_rectangles(g)
            batch["img"] = batch["img"].to(dtype)
            total, _ = model.loss(batch)
            optimizer.zero_grad()
            total.sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            losses.append(float(total.detach().sum()))
        return losses

    ours, theirs = both(curve)
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs))
    print(f"20 steps: loss {theirs[0]:.4f} to {theirs[-1]:.4f}, largest relative difference {worst:.2e}")
    assert worst < 1e-3


def test_yolov8_finds_the_same(seed: int) -> None:
    model = small_yolo(seed)
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(seed))
    # As built, all places have the same score and box: take the norms' statistics, and weights one sees.
    for branch in (*model.model[-1].cv3, *model.model[-1].cv2):
        torch.nn.init.normal_(branch[-1].weight, std=0.2)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    model.eval()

    def detect() -> list[Tensor]:
        with torch.no_grad():
            return their_nms.non_max_suppression(model(images), conf_thres=1e-4, iou_thres=0.6, max_det=20)

    ours, theirs = both(detect)
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b) > 0
        torch.testing.assert_close(a[:, 4], b[:, 4], rtol=1e-4, atol=1e-6)
