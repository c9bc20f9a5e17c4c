# SPDX-License-Identifier: Apache-2.0
"""The modules: constructors, attributes, state dicts, and what they add to the functions that they call."""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gfl_ops

EPS = torch.finfo(torch.float32).eps
SIGNATURES = {
    "QualityFocalLoss": "(use_sigmoid=True, beta=2.0, reduction='mean', loss_weight=1.0, activated=False)",
    "DistributionFocalLoss": "(reduction='mean', loss_weight=1.0)",
    "GIoULoss": "(eps=1e-06, reduction='mean', loss_weight=1.0)",
    "DIoULoss": "(eps=1e-06, reduction='mean', loss_weight=1.0)",
    "CIoULoss": "(eps=1e-06, reduction='mean', loss_weight=1.0)",
    "EIoULoss": "(eps=1e-06, reduction='mean', loss_weight=1.0, smooth_point=0.1)",
    "SIoULoss": "(eps=1e-06, reduction='mean', loss_weight=1.0, neg_gamma=False)",
    "IoULoss": "(linear=False, eps=1e-06, reduction='mean', loss_weight=1.0, mode='log')",
    "VarifocalLoss": "(use_sigmoid=True, alpha=0.75, gamma=2.0, iou_weighted=True, reduction='mean', loss_weight=1.0)",
    "FocalLoss": "(use_sigmoid=True, gamma=2.0, alpha=0.25, reduction='mean', loss_weight=1.0, activated=False)",
    "KnowledgeDistillationKLDivLoss": "(reduction='mean', loss_weight=1.0, T=10)",
    "Integral": "(reg_max=16)",
}
LOSSES = [name for name in SIGNATURES if name != "Integral"]
BOX_LOSSES = ["GIoULoss", "DIoULoss", "CIoULoss", "EIoULoss", "SIoULoss", "IoULoss"]


def arguments(name: str, generator: torch.Generator, n: int = 7) -> tuple[Tensor, Any]:
    """(pred, target) for a loss, in fp64."""
    if name in BOX_LOSSES:
        corner = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 20
        target = torch.cat([corner, corner + 20], 1)
        return target + torch.randn(n, 4, generator=generator, dtype=torch.float64), target
    if name == "DistributionFocalLoss":
        pred = torch.randn(n, 17, generator=generator, dtype=torch.float64)
        return pred, torch.rand(n, generator=generator, dtype=torch.float64) * 16
    pred = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    if name == "KnowledgeDistillationKLDivLoss":
        return pred, torch.randn(n, 3, generator=generator, dtype=torch.float64)
    if name == "VarifocalLoss":
        return pred, (torch.rand(n, 3, generator=generator, dtype=torch.float64) - 0.5).clamp(min=0)
    label = torch.randint(0, 4, (n,), generator=generator)
    return pred, label if name == "FocalLoss" else (label, torch.rand(n, generator=generator, dtype=torch.float64))


def without_annotations(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    return str(signature.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    ))  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_and_attributes(name: str) -> None:
    cls = getattr(gfl_ops, name)
    assert name in gfl_ops.__all__
    assert without_annotations(cls) == SIGNATURES[name]
    module = cls()
    assert isinstance(module, nn.Module)
    for parameter, value in inspect.signature(cls).parameters.items():
        assert getattr(module, parameter) == value.default
        assert f"{parameter}={value.default!r}" in repr(module) or parameter == "linear"
    if name != "Integral":
        call = "(pred, target, weight=None, avg_factor=None, reduction_override=None)"
        assert without_annotations(module.forward).replace("soft_label", "target") == call
        assert not module.state_dict()
    assert repr(pickle.loads(pickle.dumps(module))) == repr(module)


@pytest.mark.parametrize("name", LOSSES)
def test_reductions_and_their_override(name: str, generator: torch.Generator) -> None:
    pred, target = arguments(name, generator)
    cls = getattr(gfl_ops, name)
    each = cls(reduction="none")(pred, target)
    weight = torch.rand(each.shape, generator=generator, dtype=torch.float64)
    for reduction in ("none", "mean", "sum"):
        for other in ("none", "mean", "sum", None):
            module = cls(reduction=reduction, loss_weight=0.5)
            want = each * weight * 0.5
            applied = other or reduction
            want = want if applied == "none" else getattr(want, applied)()
            got = module(pred, target, weight, reduction_override=other)
            torch.testing.assert_close(got, want)
            assert module.reduction == reduction, "an override lasts for one call"


@pytest.mark.parametrize("name", LOSSES)
def test_avg_factor(name: str, generator: torch.Generator) -> None:
    pred, target = arguments(name, generator)
    module = getattr(gfl_ops, name)(loss_weight=2.0)
    each = module(pred, target, reduction_override="none")
    for factor in (5, 5.0, torch.tensor(5.0), torch.tensor([5])):
        got = module(pred, target, avg_factor=factor)
        assert got.shape == ()
        torch.testing.assert_close(got, each.sum() / (5 + EPS), rtol=1e-12, atol=0)
    assert torch.equal(module(pred, target, avg_factor=5, reduction_override="none"), each)
    with pytest.raises(ValueError, match=r'^avg_factor can not be used with reduction="sum"$'):
        module(pred, target, avg_factor=5, reduction_override="sum")


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows(name: str, generator: torch.Generator) -> None:
    pred, target = arguments(name, generator, 0)
    pred.requires_grad_()
    module = getattr(gfl_ops, name)()
    loss = module(pred, target, avg_factor=1.0)
    assert loss == 0 and loss.requires_grad
    loss.backward()
    assert pred.grad is not None and pred.grad.shape == pred.shape
    assert torch.isnan(module(pred, target))
    assert module(pred, target, reduction_override="none").shape[0] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_bad_choices_are_said(name: str, generator: torch.Generator) -> None:
    pred, target = arguments(name, generator)
    cls = getattr(gfl_ops, name)
    with pytest.raises(ValueError, match=f"^gfl_ops.{name}: `reduction` must be one of"):
        cls(reduction="average")
    with pytest.raises(ValueError, match=f"^gfl_ops.{name}: `reduction_override` must be one of"):
        cls()(pred, target, reduction_override="average")
    rows = pred.shape[0]
    for weight in (torch.ones(rows - 1), torch.ones(rows, 2), [1.0] * rows):
        with pytest.raises((ValueError, TypeError), match="`weight` must"):
            cls()(pred, target, weight)
    if name not in ("FocalLoss", "VarifocalLoss"):
        with pytest.raises(ValueError, match=r"`weight` must have shape \[[NM]\] = \[7\]"):
            cls()(pred, target, torch.ones(rows, 1))


@pytest.mark.parametrize("name", LOSSES)
def test_mixed_dtypes_and_autocast(name: str, generator: torch.Generator) -> None:
    pred, target = arguments(name, generator)
    module = getattr(gfl_ops, name)()
    half = pred.bfloat16().requires_grad_()
    want = module(half.detach().double(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(half, target)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    got.backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["QualityFocalLoss", "VarifocalLoss", "FocalLoss"])
def test_without_a_sigmoid_the_input_is_a_probability(name: str, generator: torch.Generator) -> None:
    pred, target = arguments(name, generator)
    cls = getattr(gfl_ops, name)
    want = cls()(pred, target)
    torch.testing.assert_close(cls(use_sigmoid=False)(pred.sigmoid(), target), want)
    if "activated" in SIGNATURES[name]:
        torch.testing.assert_close(cls(activated=True)(pred.sigmoid(), target), want)


def test_the_quality_target_may_be_a_list_or_dense(generator: torch.Generator) -> None:
    pred, (label, score) = arguments("QualityFocalLoss", generator)
    module = gfl_ops.QualityFocalLoss(beta=1.5)
    want = module(pred, (label, score))
    assert torch.equal(module(pred, [label, score]), want)
    dense = nn.functional.one_hot(label, 4)[:, :3] * score[:, None]
    torch.testing.assert_close(module(pred, dense), want)


@pytest.mark.parametrize("value", [-3.0, -0.5, 0.0, 15.9999, 16.0, 16.5, 1e9, float("nan")])
def test_distribution_targets_out_of_range_are_defined(value: float, generator: torch.Generator) -> None:
    pred = torch.randn(1, 17, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([value], dtype=torch.float64)
    loss = gfl_ops.DistributionFocalLoss()(pred, target)
    (grad,) = torch.autograd.grad(loss, pred)
    assert torch.isfinite(grad).all()
    if math.isnan(value):
        assert loss == 0 and grad.abs().max() == 0
        return
    y = min(max(value, 0.0), 16.0)
    left = min(int(y), 15)
    logs = pred.log_softmax(1)[0]
    torch.testing.assert_close(loss, -(logs[left] * (left + 1 - y) + logs[left + 1] * (y - left)))


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_a_weight_a_coordinate_is_averaged(name: str, generator: torch.Generator) -> None:
    pred, target = arguments(name, generator)
    module = getattr(gfl_ops, name)()
    weight = torch.rand(7, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(module(pred, target, weight), module(pred, target, weight.mean(1)))
    torch.testing.assert_close(module(pred, target, torch.ones(7, 4, dtype=torch.long)), module(pred, target))


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_no_pairs_and_no_weight_above_zero(name: str, generator: torch.Generator) -> None:
    pred, target = arguments(name, generator)
    module = getattr(gfl_ops, name)()
    pred.requires_grad_()
    loss = module(pred, target, torch.zeros(7))
    assert loss == 0 and torch.autograd.grad(loss, pred)[0].abs().max() == 0
    assert module(pred, target, torch.zeros(7), reduction_override="none").shape == (7,)
    empty = module(pred[:0], target[:0], torch.zeros(0))
    assert empty == 0 and empty.requires_grad


def test_iou_loss_modes(generator: torch.Generator) -> None:
    pred, target = arguments("IoULoss", generator)
    iou = 1 - gfl_ops.box_iou_loss(pred, target, kind="iou", reduction="none")
    for mode, want in (("log", -iou.log()), ("linear", 1 - iou), ("square", 1 - iou**2)):
        got = gfl_ops.IoULoss(mode=mode)(pred, target, reduction_override="none")
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with pytest.warns(DeprecationWarning, match="linear"):
        linear = gfl_ops.IoULoss(linear=True)
    torch.testing.assert_close(linear(pred, target), (1 - iou).mean(), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="`mode` must be one of 'linear', 'square', 'log', got 'cubic'"):
        gfl_ops.IoULoss(mode="cubic")


def test_iou_loss_is_bounded_apart_and_exact_where_the_overlap_is_small() -> None:
    target = torch.tensor([[0.0, 0, 1000, 1000]])
    apart = torch.tensor([[2000.0, 0, 3000, 1000]], requires_grad=True)
    loss = gfl_ops.IoULoss(eps=1e-3)(apart, target)
    assert loss.item() == pytest.approx(math.log(1e3), rel=1e-6)
    assert torch.autograd.grad(loss, apart)[0].abs().max() == 0
    # An IoU of 1e-6: through 1 − (1 − IoU) in fp32 it would be 5 % off.
    small = torch.tensor([[0.0, 0, 1, 1]])
    assert gfl_ops.IoULoss(eps=1e-9)(small, target).item() == pytest.approx(math.log(1e6), rel=1e-6)


def test_focal_labels_weights_and_dense_targets(generator: torch.Generator) -> None:
    pred, label = arguments("FocalLoss", generator)
    module = gfl_ops.FocalLoss(reduction="none")
    each = module(pred, label)
    assert each.shape == (7, 3)
    dense = nn.functional.one_hot(label, 4)[:, :3]
    for target in (dense, dense.double(), dense.bool(), dense.float()):
        assert torch.equal(module(pred, target), each)
    assert torch.equal(module(pred, label.int()), each)
    background = module(pred, torch.full((7,), 3))
    assert torch.equal(module(pred, torch.tensor([-1, 3, 4, 99, -100, 3, 3])), background)

    weight = torch.rand(7, 3, generator=generator, dtype=torch.float64)
    for form, want in (
        (weight, weight),
        (weight.reshape(-1), weight),
        (weight[:, 0], weight[:, :1]),
        (weight[:, :1], weight[:, :1]),
    ):
        torch.testing.assert_close(module(pred, label, form), each * want)
    with pytest.raises(TypeError, match="`target` must have one of the dtypes int64"):
        module(pred, label.float())
    with pytest.raises(ValueError, match=r"`target` must have shape \[N\] = \[7\], got \[6\]"):
        module(pred, label[:6])


def test_integral(generator: torch.Generator) -> None:
    module = gfl_ops.Integral(16)
    assert list(module.state_dict()) == ["project"]
    assert torch.equal(module.project, torch.arange(17.0))
    other = gfl_ops.Integral(7)
    other.load_state_dict({"project": torch.linspace(0, 7, 8)})
    x = torch.randn(2, 5, 68, generator=generator, dtype=torch.float64, requires_grad=True)
    got = module(x)
    want = (x.reshape(-1, 17).softmax(1) * torch.arange(17.0, dtype=torch.float64)).sum(1).reshape(-1, 4)
    assert got.shape == (10, 4)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(module(x.reshape(10, 4, 17)), want)
    weight = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    first, second = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want))
    torch.testing.assert_close(first, second)
    assert module(x[:0]).shape == (0, 4)
    assert module(x.half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"`x` must hold a multiple of 4\(R\+1\) = 68 logits, got \[2, 5, 67\]"):
        module(x[..., 1:])
    with pytest.raises(ValueError, match="`reg_max` must be >= 1, got 0"):
        gfl_ops.Integral(0)


@pytest.mark.parametrize("name", LOSSES)
def test_modules_compile_into_one_graph(name: str, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    pred, target = arguments(name, generator)
    module = getattr(gfl_ops, name)(loss_weight=2.0)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    factor = torch.tensor(3.0)
    torch.testing.assert_close(compiled(pred, target, avg_factor=factor), module(pred, target, avg_factor=factor))


def test_no_state_is_kept_between_calls(generator: torch.Generator) -> None:
    for name in LOSSES:
        module = getattr(gfl_ops, name)()
        before = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        module(*arguments(name, generator))
        assert {k: v for k, v in vars(module).items() if not k.startswith("_")} == before
