# SPDX-License-Identifier: Apache-2.0
"""A small detector as a whole: maps, losses, detections, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl.models import GFL, create_model

CLASSES = 6
STRIDES = (8, 16, 32, 64, 128)


@pytest.fixture
def model(seed: int) -> GFL:
    torch.manual_seed(seed)
    model = create_model("gfl_tiny", num_classes=CLASSES, width=16, norm_eval=True)
    # Scores near 1/2 instead of 1/100, so that there is something to detect.
    torch.nn.init.normal_(model.bbox_head.gfl_cls.weight, std=0.3)
    torch.nn.init.zeros_(model.bbox_head.gfl_cls.bias)
    return model.eval()


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 96, 160, generator=generator)


def target(*boxes: tuple[float, ...], label: int = 2) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.full((len(boxes),), label)}


@pytest.fixture
def targets() -> list[dict[str, Tensor]]:
    return [target((8.0, 10, 70, 60), (90, 20, 150, 90), (3, 4, 20, 22)), target((20.0, 20, 60, 70), label=5)]


@pytest.mark.parametrize("size", [(96, 160), (65, 33), (1, 1)])
def test_maps_have_a_cell_a_stride_rounded_up(model: GFL, size: tuple[int, int]) -> None:
    cls_scores, reg_preds = model.predict_maps(torch.randn(2, 3, *size))
    cells = [(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES]
    assert [m.shape for m in cls_scores] == [(2, CLASSES, *c) for c in cells]
    assert [m.shape for m in reg_preds] == [(2, 68, *c) for c in cells]


@pytest.mark.parametrize("levels", [3, 6])
def test_other_numbers_of_levels(levels: int, images: Tensor, targets: list) -> None:
    model = create_model("gfl_tiny", num_classes=CLASSES, width=16, strides=[8 * 2**i for i in range(levels)])
    assert len(model.predict_maps(images)[0]) == levels
    assert all(torch.isfinite(v) for v in model.loss(images, targets).values())
    assert model.eval()(images).boxes.shape == (2, 100, 4)


def test_the_loss_is_gfl_ops_of_its_maps(model: GFL, images: Tensor, targets: list) -> None:
    sizes = torch.tensor([[96, 160], [70, 90]])
    losses = model.loss(images, targets, sizes)
    cls_scores, reg_preds = model.predict_maps(images)
    boxes, labels = torch.zeros(2, 3, 4), torch.full((2, 3), -1)
    for i, t in enumerate(targets):
        boxes[i, : len(t["labels"])], labels[i, : len(t["labels"])] = t["boxes"], t["labels"]
    cells = [tuple(m.shape[2:]) for m in cls_scores]
    assignment = gfl_ops.atss_assign(cells, STRIDES, boxes, labels, valid_sizes=sizes)
    assert (assignment.labels == -2).any() and (assignment.labels >= 0).any(1).all()
    want = gfl_ops.gfl_loss(cls_scores, reg_preds, STRIDES, assignment, boxes)
    assert list(losses) == ["loss_cls", "loss_bbox", "loss_dfl"]
    for got, expected in zip(losses.values(), want):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_gradients_reach_what_is_trained(model: GFL, images: Tensor, targets: list) -> None:
    model.backbone.freeze(1, norm_eval=True)
    sum(model.train().loss(images, targets).values()).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    # The blocks' last norms start at 0 and are the first of their branch to learn.
    assert model.backbone.layer2[0].bn2.weight.grad.abs().sum() > 0
    assert model.backbone.layer2[0].downsample[0].weight.grad.abs().sum() > 0


def test_an_image_without_objects_and_a_batch_without_any(model: GFL, images: Tensor, targets: list) -> None:
    one = model.loss(images, [targets[0], target()])
    assert all(v > 0 for v in one.values())
    model.zero_grad()
    none = model.loss(images, [target(), target()])
    assert none["loss_cls"] > 0 and none["loss_bbox"] == 0 and none["loss_dfl"] == 0
    sum(none.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.bbox_head.gfl_reg.weight.grad is not None


def test_detections_are_gfl_ops_of_its_maps(model: GFL, images: Tensor) -> None:
    sizes, factors = [(96, 160), (70.0, 90.0)], [[0.5, 0.5], [2.0, 1.5]]
    model.test.max_detections, model.test.score_threshold = 30, 0.3
    got = model(images, sizes, factors)
    want = gfl_ops.postprocess(
        *model.predict_maps(images), STRIDES, sizes, score_threshold=0.3, max_detections=30, scale_factors=factors
    )
    assert got.count.min() > 0
    for g, w in zip(got, want):
        assert torch.equal(g, w) and not g.requires_grad
    assert (got.boxes[1].amax(0) <= torch.tensor([45.0, 70 / 1.5, 45, 70 / 1.5])).all()


def test_gfocal_v1s_geometry_reaches_the_operators(model: GFL, images: Tensor, targets: list) -> None:
    legacy = create_model("gfl_tiny", num_classes=CLASSES, width=16, legacy=True, topk_mode="anchor").eval()
    legacy.load_state_dict(model.state_dict())
    legacy.test.nms_pre = 20
    got, maps = legacy(images), legacy.predict_maps(images)
    want = gfl_ops.postprocess(*maps, STRIDES, [(96, 160)] * 2, nms_pre=20, topk_mode="anchor", legacy=True)
    assert got.count.min() > 0 and all(torch.equal(g, w) for g, w in zip(got, want))
    plain, moved = model.loss(images, targets), legacy.loss(images, targets)
    assert all(plain[name] != moved[name] for name in plain)


def test_forward_with_targets_is_the_loss(model: GFL, images: Tensor, targets: list) -> None:
    assert model(images, targets=targets) == model.loss(images, targets)
    with pytest.raises(RuntimeError, match=r"eval\(\)"):
        model.train()(images)


def test_over_ranks_the_mean_of_the_losses_is_the_whole_batchs(
    model: GFL, images: Tensor, targets: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.loss(images, targets)
    halves = [(images[i : i + 1], targets[i : i + 1]) for i in range(2)]
    local: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda norms: local.append(norms.clone()))
    for half in halves:
        model.loss(*half)
    assert len(local) == 2 and local[0].shape == (2,)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda norms: norms.copy_(local[0] + local[1]))
    ranks = [model.loss(*half) for half in halves]
    for name, value in whole.items():
        # Sums over half as many locations, in another order.
        torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, value, rtol=1e-5, atol=1e-7)


def test_channels_last_gives_the_same(model: GFL, images: Tensor, targets: list) -> None:
    want = model.loss(images, targets)
    last = model.to(memory_format=torch.channels_last)
    x = images.contiguous(memory_format=torch.channels_last)
    assert last.predict_maps(x)[0][0].is_contiguous(memory_format=torch.channels_last)
    for name, value in last.loss(x, targets).items():
        # Sums of a few hundred products in another order.
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-6)
    assert last(x).count.tolist() == pytest.approx(last(images).count.tolist(), abs=1)


def test_under_autocast_the_maps_go_in_as_they_are(model: GFL, images: Tensor, targets: list) -> None:
    want = model.loss(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        # What is detected by is in fp32.
        assert {m.dtype for maps in model.predict_maps(images) for m in maps} == {torch.float32}
        assert model(images).count.min() > 0
        model.train()
        assert {m.dtype for maps in model.predict_maps(images) for m in maps} == {torch.bfloat16}
        losses = model.loss(images, targets)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, want[name], rtol=0.1, atol=0.02)  # of a net of 8-bit mantissas, as a whole
    sum(losses.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_it_compiles_in_one_graph(model: GFL, images: Tensor, targets: list) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    want, got = model(images), compiled(images)
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    maps = torch.compile(model.predict_maps, fullgraph=True, backend="eager")
    torch.testing.assert_close(maps(images)[0][0], model.predict_maps(images)[0][0])


def test_it_learns_a_batch(model: GFL, images: Tensor, targets: list) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    first = sum(model.loss(images, targets).values()).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss = sum(model.loss(images, targets).values())
        loss.backward()
        # Without it, some drawn weights take a first step that is too long to recover from in 15.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 35.0)
        optimizer.step()
    assert loss.item() < 0.8 * first


def test_two_models_share_nothing(model: GFL) -> None:
    other = copy.deepcopy(model)
    other.test.max_detections = 7
    other.backbone.freeze(2, norm_eval=False)
    assert model.test.max_detections == 100 and model.config.frozen_stages == -1


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "`images` must be normalised.* torch.uint8"),
        (torch.zeros(3, 32, 32), ValueError, r"`images` must have shape \[B, 3, H, W\].* \[3, 32, 32\]"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"\[1, 1, 32, 32\]"),
        (torch.zeros(1, 3, 0, 32), ValueError, r"\[1, 3, 0, 32\]"),
        (torch.zeros(0, 3, 32, 32), ValueError, r"\[0, 3, 32, 32\]"),
        ([[1.0]], TypeError, "`images` must be a tensor, got list"),
    ],
)
def test_images_are_checked(model: GFL, images: Tensor, error: type, text: str) -> None:
    for call in (model.predict_maps, model, lambda x: model.loss(x, [target()])):
        with pytest.raises(error, match=text):
            call(images)


@pytest.mark.parametrize(
    ("sizes", "error", "text"),
    [
        ([(96, 160)], ValueError, r"`image_sizes` must have shape \[B, 2\] = \[2, 2\], got \[1, 2\]"),
        (torch.full((2, 2), 200), ValueError, r"at most the batch's \(h, w\), \(96, 160\)"),
        (torch.tensor([[96, 160], [0, 5]]), ValueError, "must be > 0"),
        (torch.ones(2, 2, dtype=torch.bool), TypeError, "must hold numbers, got torch.bool"),
        ([[96, 160], [96]], TypeError, "must be a tensor or pairs of numbers"),
        ("96x160", TypeError, "must be a tensor or pairs of numbers"),
    ],
)
def test_image_sizes_are_checked(model: GFL, images: Tensor, sizes: object, error: type, text: str) -> None:
    for call in (model, lambda x, s: model.loss(x, [target(), target()], s)):
        with pytest.raises(error, match=text):
            call(images, sizes)


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (target((1.0, 2, 3, 4), label=CLASSES), ValueError, r"targets`\[1\]: `labels` must be in \[0, 6\), got \[6\]"),
        (target((1.0, 2, 3, 4), label=-1), ValueError, r"must be in \[0, 6\), got \[-1\]"),
        ({"boxes": torch.zeros(2, 5), "labels": torch.zeros(2, dtype=int)}, ValueError, r"\[2, 4\], got \[2, 5\]"),
        ({"boxes": torch.zeros(3, 4), "labels": torch.zeros(2, dtype=int)}, ValueError, r"\[2, 4\], got \[3, 4\]"),
        (
            {"boxes": torch.zeros(2, 4), "labels": torch.zeros(2, 1, dtype=int)},
            ValueError,
            r"shape \[n\], got \[2, 1\]",
        ),
        ({"boxes": torch.zeros(2, 4), "labels": torch.zeros(2)}, TypeError, "`labels` must be integers"),
        (
            {"boxes": [[1, 2, 3, 4]], "labels": torch.zeros(1, dtype=int)},
            TypeError,
            "`boxes` must be a tensor, got list",
        ),
        ({"boxes": torch.zeros(2, 4)}, ValueError, "must have `boxes` and `labels`, got boxes"),
        (torch.zeros(2, 5), TypeError, "must be a dictionary"),
    ],
)
def test_targets_are_checked(model: GFL, images: Tensor, bad: object, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        model.loss(images, [target(), bad])


def test_one_target_an_image(model: GFL, images: Tensor) -> None:
    with pytest.raises(ValueError, match="one dictionary per image, 2, got 1"):
        model.loss(images, [target()])
    with pytest.raises(TypeError, match="a list with one dictionary per image, got dict"):
        model.loss(images, target())
