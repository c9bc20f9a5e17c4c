# SPDX-License-Identifier: Apache-2.0
"""Losses of scores reduced in their kernel: every kind, reduction, dtype and layout against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from stored_gradients import Operators
from torch import Tensor

import gfl_ops
from gfl_ops import (
    matchability_aware_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    soft_target_bce,
    varifocal_loss,
)
from gfl_ops.core import backends

# (backend, device) that can run; Triton on the CPU needs its interpreter.
PLACES = [
    pytest.param((backend, device), id=f"{backend}-{device}")
    for backend in ("native", "triton")
    for device in ("cpu", "cuda")
    if (device == "cpu" or torch.cuda.is_available()) and backends.unavailable(backend, "qfl", device) is None
]
if not PLACES:
    pytest.skip("neither the compiled extension nor Triton can run here", allow_module_level=True)
Loss = Callable[..., Tensor]


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    backend, device = request.param
    with gfl_ops.set_backend(backend):
        yield torch.device(device)


def drawn(
    kind: str, generator: torch.Generator, device: torch.device, n: int = 333, c: int = 37
) -> tuple[Tensor, Loss]:
    """Scores, and a loss of them with fixed targets."""
    pred = (torch.randn(n, c, generator=generator) * 3).to(device)
    label = torch.randint(-2, c + 4, (n,), generator=generator).to(device)
    score = torch.rand(n, generator=generator).to(device)
    dense = (torch.rand(n, c, generator=generator) * (torch.rand(n, c, generator=generator) < 0.2)).to(device)
    module = gfl_ops.FocalLoss()

    def focal(x: Tensor, weight: Any = None, avg_factor: Any = None, reduction: str = "mean") -> Tensor:
        return module(x, label.clamp(min=0), weight, avg_factor, reduction)  # type: ignore[no-any-return]

    losses: dict[str, Loss] = {
        "quality": lambda x, **options: quality_focal_loss(x, (label, score), **options),
        "dense": lambda x, **options: quality_focal_loss(x, dense, **options),
        "varifocal": lambda x, **options: varifocal_loss(x, dense, **options),
        "unweighted": lambda x, **options: varifocal_loss(x, dense, iou_weighted=False, **options),
        "focal": focal,
        "matchability": lambda x, **options: matchability_aware_loss(x, (label, score), **options),
        "soft bce": lambda x, **options: soft_target_bce(x, (label, score), **options),
    }
    return pred, losses[kind]


def reference(loss: Loss, pred: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient in fp64."""
    wide = pred.detach().double().requires_grad_()
    with gfl_ops.set_backend("reference"):
        value = loss(wide, **options)
        return value.detach(), torch.autograd.grad(value, wide)[0]


REDUCTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "mean-factor": {"avg_factor": 3.3},
    "mean-tensor": {"avg_factor": torch.tensor([7.7])},
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("how", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("kind", ["quality", "dense", "varifocal", "unweighted", "focal", "matchability", "soft bce"])
def test_it_is_the_references(
    kind: str, dtype: torch.dtype, how: str, weighted: bool, device: torch.device, generator: torch.Generator
) -> None:
    pred, loss = drawn(kind, generator, device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in REDUCTIONS[how].items()}
    if weighted:
        options["weight"] = torch.rand(len(pred), generator=generator).to(device)
    pred = pred.to(dtype).requires_grad_()
    with Operators() as seen:
        got = loss(pred, **options)
        gradient = torch.autograd.grad(got, pred)[0]
        with torch.no_grad():
            assert torch.equal(loss(pred, **options), got)
    assert seen.names == ["score_loss_fwd", "score_loss_finish", "score_loss_fwd"]
    want, want_gradient = reference(loss, pred, **options)
    # Thousands of terms of one sign, and a gradient rounded once to its dtype.
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    scale, eps = float(want_gradient.abs().max()), torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=max(eps, 1e-5), atol=1e-6 * scale)


@pytest.mark.parametrize("kind", ["varifocal", "focal"])
def test_a_gradient_other_than_1_recomputes_every_kind(
    kind: str, device: torch.device, generator: torch.Generator
) -> None:
    pred, loss = drawn(kind, generator, device)
    pred.requires_grad_()
    value = loss(pred)
    want = torch.autograd.grad(value, pred, retain_graph=True)[0]
    for factor in (0.0, 2.0):  # powers of two: not a bit is lost
        arriving = torch.tensor(factor, device=device)
        for graph in (loss(pred), value):
            got = torch.autograd.grad(graph, pred, arriving, retain_graph=True)[0]
            assert torch.equal(got, factor * want)


def test_fp16_stores_no_gradient(device: torch.device, generator: torch.Generator) -> None:
    """Scaled up, as by a GradScaler, what would underflow arrives."""
    pred, loss = drawn("quality", generator, device)
    pred = (pred - 8).half().requires_grad_()
    with Operators() as seen:
        value = loss(pred, avg_factor=1000.0)
        scaled = torch.autograd.grad(value, pred, torch.tensor(65536.0, device=device))[0]
    assert seen.names == ["score_loss_fwd", "score_loss_bwd"]
    want = 65536 * reference(loss, pred, avg_factor=1000.0)[1]
    # What is left below fp16's smallest numbers is less than a thousandth of the whole.
    assert float((scaled.double() - want).abs().sum() / want.abs().sum()) < 2e-3


@pytest.mark.parametrize("layout", ["transposed", "padded", "sliced", "misaligned", "channels-first", "channels-last"])
def test_any_layout(layout: str, device: torch.device, generator: torch.Generator) -> None:
    if layout.startswith("channels"):
        pred = torch.randn(2, 8, 5, 12, generator=generator).to(device)
        target = torch.rand(2, 8, 5, 12, generator=generator).to(device)
        if layout == "channels-last":
            pred, target = (t.contiguous(memory_format=torch.channels_last) for t in (pred, target))

        def loss(x: Tensor) -> Tensor:
            return quality_focal_loss(x, target, avg_factor=3.0)
    else:
        dense, loss = drawn("quality", generator, device, 133, 24)
        n, c = dense.shape
        pred = {
            "transposed": lambda: dense.t().contiguous().t(),
            "padded": lambda: torch.cat([dense, dense], 1)[:, :c],
            "sliced": lambda: dense.repeat_interleave(2, 1)[:, ::2],
            "misaligned": lambda: torch.cat([dense.new_zeros(1), dense.flatten()])[1:].view(n, c),
        }[layout]()
    pred.requires_grad_()
    with Operators() as seen:
        got = torch.autograd.grad(loss(pred), pred)[0]
    assert seen.names == ["score_loss_fwd", "score_loss_finish"]
    torch.testing.assert_close(got.double(), reference(loss, pred)[1], rtol=1e-5, atol=1e-7)


def test_gradients_to_others_than_the_scores(device: torch.device, generator: torch.Generator) -> None:
    """They come from the ordinary operators, as do losses that are not reduced."""
    pred, loss = drawn("quality", generator, device)
    pred.requires_grad_()
    n = len(pred)
    with Operators() as seen:
        loss(pred, reduction="none")
        weight = torch.rand(n, device=device, requires_grad=True)
        assert torch.autograd.grad(loss(pred, weight=weight), weight)[0].abs().sum() > 0
        factor = torch.tensor(3.0, device=device, requires_grad=True)
        assert torch.autograd.grad(loss(pred, avg_factor=factor), factor)[0] < 0
        score = torch.rand(n, device=device, requires_grad=True)
        label = torch.zeros(n, dtype=torch.long, device=device)
        assert torch.autograd.grad(quality_focal_loss(pred, (label, score)), score)[0].abs().sum() > 0
        elements = torch.rand(pred.shape, device=device)
        varifocal_loss(pred, elements, elements)
        sigmoid_focal_loss(pred, elements, reduction="none")
    assert seen.names and not any("score_loss" in name for name in seen.names)


def test_a_compiled_gradient_is_the_same(device: torch.device, generator: torch.Generator) -> None:
    pred, loss = drawn("quality", generator, device)
    pred.requires_grad_()
    want = torch.autograd.grad(2 * loss(pred), pred)[0]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: 2 * loss(x), fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(pred), pred)[0], want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("kind", ["quality", "varifocal", "focal"])
def test_nothing_and_little(kind: str, n: int, device: torch.device, generator: torch.Generator) -> None:
    pred, loss = drawn(kind, generator, device, n=n)
    pred.requires_grad_()
    for options in ({"reduction": "sum"}, {"avg_factor": 1.0}):
        value = loss(pred, **options)
        assert (value == 0) == (n == 0)
        assert torch.autograd.grad(value, pred)[0].shape == pred.shape
    assert torch.isnan(loss(pred)) == (n == 0)


def test_opcheck(device: torch.device, generator: torch.Generator) -> None:
    operators = torch.ops.gfl if gfl_ops.get_backend() == "native" else torch.ops.gfl_triton
    pred, target = (torch.rand(33, 20, generator=generator).to(device) for _ in range(2))
    label = torch.randint(0, 21, (33,), generator=generator).to(device)
    score, norm = torch.rand(33, generator=generator).to(device), torch.tensor(3.0, device=device)
    for tensors, stem, params in (
        ((pred, label, score, score, norm), "qfl", [2.0]),
        ((pred.t().contiguous().t(), None, target, None, None), "focal", [2.0, 0.25]),
    ):
        arguments = (*tensors, 0.5, stem, params, False)
        torch.library.opcheck(operators.score_loss_fwd, (*arguments, True))
        torch.library.opcheck(operators.score_loss_bwd, (norm, *arguments))
        gradient = operators.score_loss_fwd(*arguments, True)[1]
        torch.library.opcheck(operators.score_loss_finish, (gradient.clone(), norm, *arguments))
        assert gradient.stride() == tensors[0].stride()
