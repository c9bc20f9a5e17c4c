# SPDX-License-Identifier: Apache-2.0
"""The whole detection loss in the real ultralytics, patched against unpatched: losses, gradients, training."""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peers.assignment_scenes import FLAT, POINTS, SIDE, real, theirs_of_wide_cuts
from torch import Tensor, nn

from gfl_ops.compat import ultralytics as compat

pytestmark = pytest.mark.peers
if importlib.util.find_spec("ultralytics") is None:
    pytest.skip("ultralytics is not installed (tests/support/peers/requirements.txt)", allow_module_level=True)

# It asks the network at import otherwise.
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
from ultralytics.cfg import get_cfg  # noqa: E402
from ultralytics.nn import tasks  # noqa: E402
from ultralytics.utils import LOGGER  # noqa: E402
from ultralytics.utils import loss as their_loss  # noqa: E402

V84 = hasattr(their_loss.v8DetectionLoss, "loss")
SIZES = [(12, 16), (6, 8), (3, 4)]
STRIDES = [8.0, 16.0, 32.0]
CLASSES = 5
# Boxes drawn at random, of whole pixels on every cell's edge (ties), none, and those of photos.
SCENES = ("drawn", "ties", "none", "one image empty", "real")


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    compat.unpatch()


def both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What `call` gives with ultralytics patched and as it is."""
    with compat.patch() as names:
        assert names[-1] == "ultralytics.utils.loss.v8DetectionLoss"
        ours = call()
    return ours, call()


def criterion(bins: int = 16, kind: str = "v8DetectionLoss", classes: int = CLASSES, **options: Any) -> Any:
    """Their loss of a model that has nothing but a head."""
    head = SimpleNamespace(stride=torch.tensor(STRIDES), nc=classes, reg_max=bins)
    model = SimpleNamespace(args=get_cfg(), model=[head], parameters=lambda: iter([torch.zeros(1)]), class_weights=None)
    return getattr(their_loss, kind)(model, **options)


def drawn_batch(g: torch.Generator, scene: str = "drawn") -> dict[str, Tensor]:
    count = 0 if scene == "none" else 13
    boxes = torch.cat(
        [torch.rand(count, 2, generator=g) * 0.7 + 0.15, torch.rand(count, 2, generator=g) * 0.5 + 0.05], 1
    )
    if scene == "ties":
        boxes = (boxes * 16).round() / 16
    image = torch.zeros(count) if scene == "one image empty" else torch.arange(count).ge(6).float()
    return {
        "batch_idx": image,
        "cls": torch.randint(0, CLASSES, (count, 1), generator=g).float(),
        "bboxes": boxes,
    }


def drawn_maps(g: torch.Generator, bins: int, dtype: torch.dtype, scene: str = "drawn") -> list[Tensor]:
    """Leaves: class logits ``[B, C, A]`` and box maps ``[B, 4·bins, A]``."""
    cells = sum(h * w for h, w in SIZES)
    scores = torch.randn(2, CLASSES, cells, generator=g, dtype=torch.float64)
    sides = torch.randn(2, 4 * bins, cells, generator=g, dtype=torch.float64) * 2
    if scene == "ties":
        scores, sides = torch.zeros_like(scores), torch.zeros_like(sides)
    if bins == 1:
        sides = sides.abs() + 0.5
    return [x.to(dtype).requires_grad_() for x in (scores, sides)]


def photos(g: torch.Generator, bins: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Leaves as above and the batch, of every fourth photo: predicted boxes are near the objects around them."""
    scores, boxes, _, labels, gt, mask = (part if part is POINTS else part[::4] for part in real(g))
    stride = torch.cat([torch.full((h * w, 1), s) for h, w, s in zip(FLAT[::2], FLAT[1::2], STRIDES)])
    distance = (torch.cat([POINTS - boxes[..., :2], boxes[..., 2:] - POINTS], -1) / stride).double()
    if bins > 1:
        peaks = -2 * (distance.clamp(0, bins - 1)[..., None] - torch.arange(bins)) ** 2
        distance = (peaks + torch.randn(peaks.shape, generator=g, dtype=torch.float64) * 0.5).flatten(2)
    maps = [scores.double().clamp(1e-4, 1 - 1e-4).logit(), distance]
    image, slot = (mask[..., 0] > 0).nonzero(as_tuple=True)
    xyxy = gt[image, slot] / SIDE
    batch = {
        "batch_idx": image.float(),
        "cls": labels[image, slot],
        "bboxes": torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], 1),
    }
    return [x.transpose(1, 2).to(dtype).contiguous().requires_grad_() for x in maps], batch


def predictions(scores: Tensor, sides: Tensor) -> Any:
    """What a head in training gives, in the installed version's form."""
    sizes = SIZES if scores.shape[1] == CLASSES else list(zip(FLAT[::2], FLAT[1::2]))
    feats = [scores.new_zeros(len(scores), 1, h, w) for h, w in sizes]
    if V84:
        return {"boxes": sides, "scores": scores, "feats": feats}
    parts = torch.cat([sides, scores], 1).split([h * w for h, w in sizes], 2)
    return [part.unflatten(2, size) for part, size in zip(parts, sizes)]


def items_of(items: Any) -> Tensor:
    return torch.stack(list(items.values())) if isinstance(items, dict) else items


def outcome(loss: Any, maps: list[Tensor], preds: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Total, items, and gradients of the maps for factors that tell the losses apart."""
    total, items = loss(preds, batch)
    grads = torch.autograd.grad((total * torch.tensor([1.0, 0.5, -2.0])).sum(), maps, retain_graph=True)
    ones = torch.autograd.grad(total.sum(), maps)
    return [total.detach(), items_of(items).detach(), *grads, *ones]


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("bins", [16, 1])
@pytest.mark.parametrize("options", [{}, {"tal_topk": 7, "tal_topk2": 1}], ids=["many", "one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_losses_and_gradients(
    dtype: torch.dtype, options: dict[str, int], bins: int, scene: str, generator: torch.Generator
) -> None:
    if options and not V84:
        options = {"tal_topk": 1}
    loss = criterion(bins, classes=80 if scene == "real" else CLASSES, **options)

    def draw() -> tuple[list[Tensor], dict[str, Tensor]]:
        if scene == "real":
            return photos(generator, bins, dtype)
        return drawn_maps(generator, bins, dtype, scene), drawn_batch(generator, scene)

    def evaluated(given: tuple[list[Tensor], dict[str, Tensor]]) -> list[Tensor]:
        return outcome(loss, given[0], predictions(*given[0]), given[1])

    given, theirs = theirs_of_wide_cuts(draw, evaluated)
    with compat.patch() as names:
        assert names[-1] == "ultralytics.utils.loss.v8DetectionLoss"
        ours = evaluated(given)
    assert scene == "none" or float(theirs[0][0]) > 0
    assert [x.dtype for x in ours[:2]] == [x.dtype for x in theirs[:2]]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(b).all()
        # Totals are fp32 in either dtype; arithmetic in fp32 leaves some 1e-6 in the scores' sixth powers.
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.skipif(not V84, reason="the end-to-end loss with `topk2` is of ultralytics 8.4")
@pytest.mark.parametrize("bins", [16, 1])
def test_the_end_to_end_loss(bins: int, generator: torch.Generator) -> None:
    loss = criterion(bins, "E2ELoss")

    def draw() -> tuple[list[list[Tensor]], dict[str, Tensor]]:
        return [drawn_maps(generator, bins, torch.float64) for _ in range(2)], drawn_batch(generator)

    def evaluated(given: tuple[list[list[Tensor]], dict[str, Tensor]]) -> list[Tensor]:
        maps, batch = given
        preds = dict(zip(("one2many", "one2one"), (predictions(*m) for m in maps)))
        return outcome(loss, [*maps[0], *maps[1]], preds, batch)

    given, theirs = theirs_of_wide_cuts(draw, evaluated)
    with compat.patch():
        ours = evaluated(given)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_what_stays_ultralytics(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tasks' losses, class weights, and a subclass that defines a step anew; and all of it with loss=False."""
    import gfl_ops.compat._yolo_loss as ours

    calls: list[int] = []
    original = ours.assigned_loss
    monkeypatch.setattr(ours, "assigned_loss", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    maps, batch = drawn_maps(generator, 16, torch.float32), drawn_batch(generator)
    method = "loss" if V84 else "__call__"

    class Changed(their_loss.v8DetectionLoss):  # type: ignore[misc]
        def preprocess(self, *arguments: Any, **named: Any) -> Tensor:
            return super().preprocess(*arguments, **named)

    changed = criterion()
    changed.__class__ = Changed
    weighted, bare = criterion(), criterion()
    weighted.class_weights = torch.ones(1, 1, CLASSES)
    if V84:
        others = (their_loss.v8SegmentationLoss, their_loss.v8PoseLoss, their_loss.v8OBBLoss)
        before = [getattr(other, method) for other in others]
        with compat.patch():
            assert [getattr(other, method) for other in others] == before
    with compat.patch():
        changed(predictions(*maps), batch)
        if V84:
            weighted(predictions(*maps), batch)
        assert not calls
        bare(predictions(*maps), batch)
        assert calls == [1]
        names = compat.patch(loss=False)
        assert "ultralytics.utils.loss.v8DetectionLoss" not in names
        bare(predictions(*maps), batch)
        assert calls == [1]
    compat.patch(loss=False)
    bare(predictions(*maps), batch)
    assert calls == [1]


def small_model(yaml: str, seed: int, dtype: torch.dtype) -> Any:
    LOGGER.setLevel(logging.ERROR)
    torch.manual_seed(seed)
    model = tasks.DetectionModel(yaml, nc=3, verbose=False).to(dtype)
    model.args = get_cfg()
    return model.train()


def scene_of_rectangles(g: torch.Generator, dtype: torch.dtype, side: int = 64) -> dict[str, Tensor]:
    """Two images of coloured rectangles, their class the colour."""
    images, boxes, labels = torch.full((2, 3, side, side), 0.5, dtype=dtype), [], []
    for image in images:
        for _ in range(3):
            size = torch.rand(2, generator=g) * 0.35 + 0.3
            centre = torch.rand(2, generator=g) * (1 - size) + size / 2
            (x0, y0), (x1, y1) = (
                ((centre - size / 2) * side).int().tolist(),
                ((centre + size / 2) * side).int().tolist(),
            )
            label = int(torch.randint(0, 3, (1,), generator=g))
            image[:, y0:y1, x0:x1] = torch.eye(3, dtype=dtype)[label][:, None, None]
            boxes.append(torch.cat([centre, size]))
            labels.append([float(label)])
    index = torch.tensor([0.0, 0, 0, 1, 1, 1])
    return {"img": images, "batch_idx": index, "cls": torch.tensor(labels), "bboxes": torch.stack(boxes)}


def curve(
    yaml: str, dtype: torch.dtype, lr: float, seed: int, steps: int, forward: Any = None, nudge: float = 0.0
) -> list[float]:
    """Losses of a training in ultralytics' warm-up, from weights that are moved by `nudge` of themselves."""
    model = small_model(yaml, seed, dtype)
    for p in model.parameters():
        p.data.mul_(1 + nudge * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(dtype))
    call = model if forward is None else forward(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.8, nesterov=True)
    g = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * step / 100
        batch = scene_of_rectangles(g, dtype)
        total, _ = model.loss(batch, call(batch["img"]))
        optimizer.zero_grad()
        total.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(float(total.detach().sum()))
    return losses


def difference(curve: list[float], other: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(curve, other, strict=True))


def assert_same_curve(ours: list[float], theirs: list[float], nudged: Callable[[], list[float]]) -> None:
    """Within 1e-3, or about as near as the curve of weights that are moved by a few roundings: a step of a network that
    is not trained yet may make much of one, and more of one than of another."""
    worst = difference(ours, theirs)
    print(f"{len(ours)} steps: loss {theirs[0]:.4f} to {theirs[-1]:.4f}, largest relative difference {worst:.2e}")
    assert worst < 1e-3 or worst <= 4 * difference(nudged(), theirs)


MODELS = ["yolov8n.yaml", "yolo11n.yaml", *(["yolo26n.yaml"] if V84 else [])]


@pytest.mark.parametrize(
    ("steps", "dtype"),
    [
        pytest.param(10, torch.float32, id="10 steps, fp32"),
        pytest.param(50, torch.float32, id="50 steps, fp32", marks=pytest.mark.slow),
        pytest.param(50, torch.float64, id="50 steps, fp64", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("yaml", MODELS)
def test_steps_of_training(yaml: str, steps: int, dtype: torch.dtype, seed: int) -> None:
    """From the same seed, patched and unpatched, at a learning rate where a training follows from its start: at 0.01,
    weights that are moved by 1e-10 of themselves change a loss by 1e-3 after 20 steps, in fp64 too."""
    ours, theirs = both(lambda: curve(yaml, dtype, 0.0001, seed, steps))
    nudge = 1e-9 if dtype == torch.float64 else 1e-6
    assert_same_curve(ours, theirs, lambda: curve(yaml, dtype, 0.0001, seed, steps, nudge=nudge))


def test_a_compiled_model_trains_the_same(seed: int) -> None:
    def compiled(model: Any) -> Any:
        torch._dynamo.reset()
        return torch.compile(model, backend="aot_eager")

    ours, theirs = both(lambda: curve("yolov8n.yaml", torch.float64, 0.0001, seed, 10, compiled))
    assert difference(ours, theirs) < 1e-3
