# SPDX-License-Identifier: Apache-2.0
"""Losses, gradients and box coding against the real mmdet, in fp64, and what differs from it on purpose."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gfl_ops

MMDET_IS_THERE = all(importlib.util.find_spec(name) for name in ("mmdet", "mmcv", "mmengine"))
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not MMDET_IS_THERE, reason="mmdet is not installed (tests/support/peers/requirements.txt)"),
]

NAMES = (
    "QualityFocalLoss", "DistributionFocalLoss", "GIoULoss", "DIoULoss", "CIoULoss", "EIoULoss", "SIoULoss", "IoULoss",
    "VarifocalLoss", "FocalLoss",
)  # fmt: skip
BOX_LOSSES = ("GIoULoss", "DIoULoss", "CIoULoss", "EIoULoss", "SIoULoss", "IoULoss")


@pytest.fixture(scope="module")
def mmdet() -> SimpleNamespace:
    """The names of mmdet that are compared with, gathered from where they lie."""
    from peers import mmdet_stub

    mmdet_stub.install()
    from mmdet.models import losses
    from mmdet.models.dense_heads.gfl_head import Integral
    from mmdet.structures.bbox import bbox2distance, distance2bbox

    modules = {name: getattr(losses, name) for name in NAMES}
    functions: dict[str, Any] = {}
    for source in ("focal_loss", "gfocal_loss", "iou_loss", "varifocal_loss"):
        # By its full name: the package has a function iou_loss over the module.
        members = vars(importlib.import_module(f"mmdet.models.losses.{source}"))
        functions.update({k: v for k, v in members.items() if inspect.isfunction(v)})
    return SimpleNamespace(
        **{**functions, **modules}, Integral=Integral, bbox2distance=bbox2distance, distance2bbox=distance2bbox
    )


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a user gets, the compiled kernels where they are, and the reference."""
    with gfl_ops.set_backend(request.param):
        yield request.param


def normal(*shape: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def uniform(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Boxes near, far from and equal in a side to their targets."""
    corner = uniform(n, 2, generator=generator) * 40
    target = torch.cat([corner, corner + 4 + uniform(n, 2, generator=generator) * 30], 1)
    pred = target + normal(n, 4, generator=generator, scale=3)
    pred[::5] += 30
    pred[1::5, 0] = target[1::5, 0]
    pred[2::5, 2:] = target[2::5, 2:]
    return pred, target


def inputs(name: str, n: int, generator: torch.Generator) -> tuple[list[Tensor], Any]:
    """The leaves that a gradient reaches, and a function of them that gives (pred, target)."""
    if name in BOX_LOSSES:
        return list(pairs(n, generator)), lambda p, t: (p, t)
    if name == "DistributionFocalLoss":
        leaves = [normal(n, 17, generator=generator, scale=3), uniform(n, generator=generator) * 15.99]
        return leaves, lambda p, t: (p, t)
    pred = normal(n, 5, generator=generator, scale=3)
    label = torch.randint(0, 6, (n,), generator=generator)
    if name == "QualityFocalLoss":
        return [pred, uniform(n, generator=generator)], lambda p, s: (p, (label, s))
    if name == "VarifocalLoss":
        return [pred, (uniform(n, 5, generator=generator) - 0.6).clamp(min=0)], lambda p, t: (p, t)
    return [pred], lambda p: (p, label)


def evaluate(module: Any, leaves: list[Tensor], arrange: Any, scale: Tensor | None, **call: Any) -> list[Tensor]:
    """Loss and gradients, with `scale` as the gradient that comes in."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = module(*arrange(*leaves), **call)
    grads = torch.autograd.grad(loss, leaves, torch.ones_like(loss) if scale is None else scale, allow_unused=True)
    return [loss, *(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads))]


def assert_same(ours: list[Tensor], theirs: list[Tensor], atol: float = 1e-12) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol, msg=lambda m, i=i: f"result {i}: {m}")


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "QualityFocalLoss": [{}, {"beta": 1.5, "loss_weight": 0.5}],
    "DistributionFocalLoss": [{}, {"loss_weight": 0.25}],
    "GIoULoss": [{}, {"eps": 1e-3, "loss_weight": 2.0}],
    "DIoULoss": [{}, {"eps": 1e-3}],
    "CIoULoss": [{}, {"eps": 1e-3}],
    "EIoULoss": [{}, {"eps": 1e-3, "smooth_point": 0.3}],
    "SIoULoss": [{}, {"eps": 1e-8, "neg_gamma": True}],
    "IoULoss": [{}, {"mode": "linear"}, {"mode": "square"}, {"linear": True}, {"eps": 0.3}],
    "VarifocalLoss": [{}, {"alpha": 0.5, "gamma": 1.5, "iou_weighted": False}],
    "FocalLoss": [{}, {"alpha": 0.6, "gamma": 1.5, "loss_weight": 3.0}],
}


@pytest.mark.parametrize(("name", "options"), [(n, o) for n in NAMES for o in OPTIONS[n]], ids=str)
def test_losses_and_gradients(
    name: str, options: dict[str, Any], mmdet: SimpleNamespace, generator: torch.Generator
) -> None:
    n = 37
    leaves, arrange = inputs(name, n, generator)
    elements = name in ("VarifocalLoss", "FocalLoss")
    shape = (n, 5) if elements else (n,)
    weights: list[Tensor | None] = [None, uniform(*shape, generator=generator)]
    weights[1][::3] = 0  # type: ignore[index]
    if name == "FocalLoss":
        weights += [uniform(*form, generator=generator) for form in ((n,), (n, 1), (n * 5,))]
    if name in BOX_LOSSES:
        weights.append(uniform(n, 4, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = getattr(gfl_ops, name)(**options), getattr(mmdet, name)(**options)
    for weight in weights:
        for reduction in ("none", "mean", "sum", None):
            for avg_factor in (None, 3, 7.5, torch.tensor(2.5, dtype=torch.float64), 0.0):
                if reduction == "sum" and avg_factor is not None:
                    continue
                call = {"weight": weight, "avg_factor": avg_factor, "reduction_override": reduction}
                scale = normal(*shape, generator=generator) if reduction == "none" else None
                got = evaluate(ours, leaves, arrange, scale, **call)
                want = evaluate(theirs, leaves, arrange, scale, **call)
                atol = 1e-12
                if name == "SIoULoss":
                    # mmdet adds its eps of 1e-6 to widths of 4 and more too, moving a term by up to 1e-6 / 4 of it;
                    # an average factor of 0 makes the terms large.
                    atol = 3e-7 * max(1.0, *(float(result.abs().max()) for result in want))
                assert_same(got, want, atol)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name: str, mmdet: SimpleNamespace) -> None:
    def bare(function: Any) -> list[tuple[str, Any]]:
        kinds = (inspect.Parameter.VAR_KEYWORD,)
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.kind not in kinds]

    ours, theirs = getattr(gfl_ops, name), getattr(mmdet, name)
    assert bare(ours) == bare(theirs)
    assert bare(ours.forward) == bare(theirs.forward)
    public = {k for k in vars(theirs()) if not k.startswith("_") and k != "training"}
    assert public <= set(vars(ours())), "mmdet's heads read these attributes"
    theirs().load_state_dict(ours().state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_avg_factor_with_sum_is_the_same_error(name: str, mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    leaves, arrange = inputs(name, 3, generator)
    messages = []
    for cls in (getattr(gfl_ops, name), getattr(mmdet, name)):
        with pytest.raises(ValueError) as raised:
            cls()(*arrange(*leaves), avg_factor=2, reduction_override="sum")
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name: str, mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    leaves, arrange = inputs(name, 0, generator)
    for call in ({"avg_factor": 1.0}, {"reduction_override": "sum"}, {}, {"weight": torch.zeros(0)}):
        if call.get("weight") is not None and name in ("VarifocalLoss", "FocalLoss"):
            continue
        ours = getattr(gfl_ops, name)()(*arrange(*leaves), **call)
        theirs = getattr(mmdet, name)()(*arrange(*leaves), **call)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dense", [False, True])
def test_quality_focal_loss_of_probabilities(dense: bool, mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    p = uniform(21, 5, generator=generator) * 0.96 + 0.02
    label, score = torch.randint(0, 6, (21,), generator=generator), uniform(21, generator=generator)
    if dense:
        full = torch.nn.functional.one_hot(label, 6)[:, :5] * score[:, None]
        leaves, arrange = [p], lambda x: (x, full)
    else:
        leaves, arrange = [p, score], lambda x, s: (x, (label, s))
    ours = evaluate(gfl_ops.QualityFocalLoss(activated=True), leaves, arrange, None)
    assert_same(ours, evaluate(mmdet.QualityFocalLoss(activated=True), leaves, arrange, None))


@pytest.mark.parametrize("shape", [(21, 5), (2, 5, 3, 4)], ids=str)
def test_quality_focal_loss_of_a_dense_target(
    shape: tuple[int, ...], mmdet: SimpleNamespace, generator: torch.Generator
) -> None:
    pred = normal(*shape, generator=generator, scale=3)
    target = (uniform(*shape, generator=generator) - 0.5).clamp(min=0)
    rows = shape[:1] + shape[2:]
    weight = uniform(*rows, generator=generator)
    for call in ({}, {"weight": weight, "avg_factor": 3.0}, {"reduction_override": "none"}):
        scale = normal(*rows, generator=generator) if "reduction_override" in call else None
        ours = evaluate(gfl_ops.QualityFocalLoss(), [pred], lambda x: (x, target), scale, **call)
        assert_same(ours, evaluate(mmdet.QualityFocalLoss(), [pred], lambda x: (x, target), scale, **call))


@pytest.mark.parametrize("activated", [False, True])
def test_focal_loss_of_a_dense_target(activated: bool, mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    pred = normal(21, 5, generator=generator)
    pred = pred.sigmoid() if activated else pred
    target = torch.randint(0, 2, (21, 5), generator=generator)
    ours = evaluate(gfl_ops.FocalLoss(activated=activated), [pred], lambda x: (x, target), None)
    assert_same(ours, evaluate(mmdet.FocalLoss(activated=activated), [pred], lambda x: (x, target), None))


def test_functions(mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    """With their own defaults, which for boxes differ from the modules', there as here."""
    pred, target = pairs(21, generator)
    for kind in ("giou", "diou", "ciou", "eiou", "siou"):
        theirs = getattr(mmdet, f"{kind}_loss")(pred, target)
        # SIoU: eps under widths too.
        rtol = 1e-7 if kind == "siou" else 1e-12
        torch.testing.assert_close(gfl_ops.box_iou_loss(pred, target, kind=kind), theirs, rtol=rtol, atol=0)
    torch.testing.assert_close(gfl_ops.giou_loss(pred, target), mmdet.giou_loss(pred, target), rtol=1e-12, atol=0)
    linear = mmdet.iou_loss(pred, target, mode="linear", eps=0.0)
    torch.testing.assert_close(gfl_ops.box_iou_loss(pred, target, kind="iou", eps=1e-6), linear, rtol=1e-12, atol=0)

    (x, y), _ = inputs("DistributionFocalLoss", 21, generator)
    torch.testing.assert_close(gfl_ops.distribution_focal_loss(x, y), mmdet.distribution_focal_loss(x, y))
    (x, t), _ = inputs("VarifocalLoss", 21, generator)
    torch.testing.assert_close(gfl_ops.varifocal_loss(x, t), mmdet.varifocal_loss(x, t))
    (x, s), arrange = inputs("QualityFocalLoss", 21, generator)
    torch.testing.assert_close(gfl_ops.quality_focal_loss(*arrange(x, s)), mmdet.quality_focal_loss(*arrange(x, s)))
    labels = (t > 0).double()
    focal = mmdet.py_sigmoid_focal_loss(x, labels, reduction="none")
    torch.testing.assert_close(gfl_ops.sigmoid_focal_loss(x, labels), focal)


@pytest.mark.parametrize("reg_max", [16, 7])
def test_integral(reg_max: int, mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    x = normal(3, 6, 4 * (reg_max + 1), generator=generator, scale=3)
    ours, theirs = gfl_ops.Integral(reg_max), mmdet.Integral(reg_max)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.project, theirs.project)
    scale = normal(18, 4, generator=generator)
    assert_same(evaluate(ours, [x], lambda v: (v,), scale), evaluate(theirs, [x], lambda v: (v,), scale))
    function = gfl_ops.integral(x, reg_max)
    assert function.shape == (3, 6, 4)
    torch.testing.assert_close(function.reshape(-1, 4), theirs(x))
    assert ours(x[:0]).shape == theirs(x[:0]).shape == (0, 4)


def test_distance_to_box(mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    points, distance = uniform(2, 9, 2, generator=generator) * 60, normal(2, 9, 4, generator=generator, scale=30)
    for p, d, limit in (
        (points[0], distance[0], None),
        (points[0], distance[0], (40, 50)),
        (points, distance, None),
        (points, distance, (40, 50)),
        (points, distance, torch.tensor([[40.0, 50], [30, 60]], dtype=torch.float64)),
    ):
        theirs_limit = [tuple(limit)] * 2 if isinstance(limit, tuple) and p.dim() == 3 else limit
        scale = normal(*d.shape, generator=generator)
        ours = evaluate(gfl_ops.distance_to_box, [p, d], lambda a, b, m=limit: (a, b, m), scale)
        theirs = evaluate(mmdet.distance2bbox, [p, d], lambda a, b, m=theirs_limit: (a, b, m), scale)
        assert_same(ours, theirs)


def test_box_to_distance(mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    points = uniform(2, 9, 2, generator=generator) * 60
    boxes, _ = pairs(18, generator)
    boxes = boxes.reshape(2, 9, 4)
    for p, b, options in (
        (points[0], boxes[0], ()),
        (points, boxes, ()),
        (points, boxes, (16,)),
        (points[0], boxes[0], (16, 0.01)),
    ):
        scale = normal(*b.shape, generator=generator)
        ours = evaluate(gfl_ops.box_to_distance, [p, b], lambda x, y, o=options: (x, y, *o), scale)
        assert_same(ours, evaluate(mmdet.bbox2distance, [p, b], lambda x, y, o=options: (x, y, *o), scale))


# What differs on purpose. Each test shows both sides, so that it speaks up should mmdet change.


def test_a_weight_of_one_column_is_refused(mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    for name in ("QualityFocalLoss", "DistributionFocalLoss"):
        leaves, arrange = inputs(name, 6, generator)
        weight = torch.ones(6, 1, dtype=torch.float64)
        assert getattr(mmdet, name)()(*arrange(*leaves), weight, reduction_override="none").shape == (6, 6)
        with pytest.raises(ValueError, match=r"`weight` must have shape \[[NM]\] = \[6\], got \[6, 1\]"):
            getattr(gfl_ops, name)()(*arrange(*leaves), weight)


def test_a_row_weight_of_a_square_varifocal_loss_is_one_of_rows(
    mmdet: SimpleNamespace, generator: torch.Generator
) -> None:
    pred, target, weight = (uniform(*shape, generator=generator) for shape in ((5, 5), (5, 5), (5,)))
    each = gfl_ops.varifocal_loss(pred, target, reduction="none")
    theirs = mmdet.varifocal_loss(pred, target, weight, reduction="none")
    torch.testing.assert_close(theirs, each * weight[None, :])
    torch.testing.assert_close(gfl_ops.varifocal_loss(pred, target, weight, reduction="none"), each * weight[:, None])


def test_distribution_targets_out_of_range(mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    x = normal(1, 17, generator=generator)
    ours, theirs = gfl_ops.DistributionFocalLoss(), mmdet.DistributionFocalLoss()
    last, first = (-x.log_softmax(1)[0, i] for i in (16, 0))
    for y in (16.0, 16.5):
        target = torch.tensor([y], dtype=torch.float64)
        with pytest.raises(IndexError):
            theirs(x, target)
        torch.testing.assert_close(ours(x, target), last)
    below = torch.tensor([-0.5], dtype=torch.float64)
    second = -x.log_softmax(1)[0, 1]
    torch.testing.assert_close(theirs(x, below), 1.5 * first - 0.5 * second)
    torch.testing.assert_close(ours(x, below), first)
    nan = torch.tensor([float("nan")], dtype=torch.float64)
    with pytest.raises(IndexError):
        theirs(x, nan)
    assert ours(x, nan) == 0


def test_small_beta(mmdet: SimpleNamespace) -> None:
    gradients = []
    for cls in (mmdet.QualityFocalLoss, gfl_ops.QualityFocalLoss):
        pred = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        target = (torch.tensor([0]), torch.tensor([0.5], dtype=torch.float64))
        cls(beta=0.5)(pred, target).backward()
        assert pred.grad is not None
        gradients.append(pred.grad)
    assert torch.isnan(gradients[0]).all() and (gradients[1] == 0).all()


def test_mixed_dtypes(mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    leaves, arrange = inputs("QualityFocalLoss", 6, generator)
    pred, (label, score) = arrange(*leaves)
    with pytest.raises(RuntimeError):
        mmdet.QualityFocalLoss()(pred.half(), (label, score.float()))
    assert gfl_ops.QualityFocalLoss()(pred.half(), (label, score.float())).dtype == torch.float32


def test_empty_boxes_stay_attached(mmdet: SimpleNamespace) -> None:
    for cls, attached in ((mmdet.GIoULoss, False), (gfl_ops.GIoULoss, True)):
        pred = torch.zeros(0, 4, requires_grad=True)
        assert cls()(pred, torch.zeros(0, 4), avg_factor=1.0).requires_grad is attached


def test_no_weight_above_zero_keeps_the_shape(mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    pred, target = pairs(6, generator)
    call = {"weight": torch.zeros(6), "reduction_override": "none"}
    assert mmdet.GIoULoss()(pred, target, **call).shape == ()
    assert gfl_ops.GIoULoss()(pred, target, **call).tolist() == [0] * 6


def test_ciou_of_equal_boxes(mmdet: SimpleNamespace) -> None:
    box = torch.tensor([[10.0, 10, 110, 110]])
    assert torch.isnan(mmdet.CIoULoss()(box, box))
    assert gfl_ops.CIoULoss()(box, box) == 0


def test_labels_outside_the_classes(mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    pred = normal(2, 5, generator=generator)
    strange = torch.tensor([-1, 9])
    with pytest.raises(RuntimeError):
        mmdet.FocalLoss()(pred, strange)
    want = mmdet.FocalLoss()(pred, torch.tensor([5, 5]))
    torch.testing.assert_close(gfl_ops.FocalLoss()(pred, strange), want)


def test_probabilities_without_a_sigmoid(mmdet: SimpleNamespace, generator: torch.Generator) -> None:
    with pytest.raises(AssertionError):
        mmdet.QualityFocalLoss(use_sigmoid=False)
    leaves, arrange = inputs("QualityFocalLoss", 6, generator)
    pred, target = arrange(*leaves)
    want = mmdet.QualityFocalLoss(activated=True)(pred.sigmoid(), target)
    torch.testing.assert_close(gfl_ops.QualityFocalLoss(use_sigmoid=False)(pred.sigmoid(), target), want)
