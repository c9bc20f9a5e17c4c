# SPDX-License-Identifier: Apache-2.0
"""Losses of scores down to one number, with the gradient written beside them: what every gradient that arrives does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops import quality_focal_loss, sigmoid_focal_loss, varifocal_loss
from gfl_ops.core import backends
from gfl_ops.ops.score import score_loss

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
def device(request: pytest.FixtureRequest):
    backend, device = request.param
    with gfl_ops.set_backend(backend):
        yield torch.device(device)


@pytest.fixture(params=["python", "cpp"])
def node(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two autograd nodes records the loss."""
    if request.param == "python":
        monkeypatch.setattr(score_loss, "_NATIVE", score_loss._NATIVE._replace(recorded=None), raising=False)
    elif gfl_ops.get_backend() != "native":
        pytest.skip("the other node is the extension's")
    return str(request.param)


class Told(list[str]):
    """The operators that are called, in turn; the node in C++ calls them unseen."""

    def are(self, *names: str) -> bool:
        return self == ["recorded"] * names.count("forward") or self == list(names)


@pytest.fixture
def told(node: str, monkeypatch: pytest.MonkeyPatch) -> Told:
    names = Told()
    chosen = score_loss._operators

    class Watched:
        def __init__(self, operators: Any) -> None:
            self.operators = operators

        def __getattr__(self, name: str) -> Any:
            function = getattr(self.operators, name)

            def call(*arguments: Any) -> Any:
                names.append(name)
                return function(*arguments)

            return function and call

    def watched(*arguments: Any) -> Any:
        operators = chosen(*arguments)
        return None if operators is None else Watched(operators)

    monkeypatch.setattr(score_loss, "_operators", watched)
    return names


def quality(generator: torch.Generator, device: torch.device, n: int = 333, c: int = 37) -> tuple[Tensor, Loss]:
    pred = torch.randn(n, c, generator=generator) * 3
    label = torch.randint(-2, c + 4, (n,), generator=generator).to(device)
    score = torch.rand(n, generator=generator).to(device)
    return pred.to(device), lambda x, **options: quality_focal_loss(x, (label, score), **options)


def dense(generator: torch.Generator, device: torch.device, n: int = 333, c: int = 37) -> tuple[Tensor, Loss]:
    target = (torch.rand(n, c, generator=generator) * (torch.rand(n, c, generator=generator) < 0.2)).to(device)
    pred = (torch.randn(n, c, generator=generator) * 3).to(device)
    return pred, lambda x, **options: quality_focal_loss(x, target, **options)


def varifocal(generator: torch.Generator, device: torch.device, n: int = 333, c: int = 37) -> tuple[Tensor, Loss]:
    target = (torch.rand(n, c, generator=generator) * (torch.rand(n, c, generator=generator) < 0.2)).to(device)
    pred = (torch.randn(n, c, generator=generator) * 3).to(device)
    return pred, lambda x, **options: varifocal_loss(x, target, **options)


def unweighted(generator: torch.Generator, device: torch.device) -> tuple[Tensor, Loss]:
    pred, loss = varifocal(generator, device)
    return pred, lambda x, **options: loss(x, iou_weighted=False, **options)


def focal(generator: torch.Generator, device: torch.device, n: int = 333, c: int = 37) -> tuple[Tensor, Loss]:
    label = torch.randint(0, c + 4, (n,), generator=generator).to(device)
    pred, module = (torch.randn(n, c, generator=generator) * 3).to(device), gfl_ops.FocalLoss()

    def loss(x: Tensor, weight: Tensor | None = None, avg_factor: Any = None, reduction: str = "mean") -> Tensor:
        return module(x, label, weight, avg_factor, reduction)

    return pred, loss


LOSSES = [quality, dense, varifocal, unweighted, focal]
REDUCTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "mean-factor": {"avg_factor": 3.3},
    "mean-tensor": {"avg_factor": torch.tensor([7.7])},
}


def placed(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("how", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("make", LOSSES)
def test_it_is_the_references(
    make: Any,
    dtype: torch.dtype,
    how: str,
    weighted: bool,
    device: torch.device,
    told: Told,
    generator: torch.Generator,
) -> None:
    pred, loss = make(generator, device)
    options = placed(REDUCTIONS[how], device)
    if weighted:
        options["weight"] = torch.rand(len(pred), generator=generator).to(device)
    pred = pred.to(dtype).requires_grad_()
    got = loss(pred, **options)
    gradient = torch.autograd.grad(got, pred)[0]
    assert told.are("forward", "finish")
    with torch.no_grad():
        assert torch.equal(loss(pred, **options), got)
    wide = pred.detach().double().requires_grad_()
    with gfl_ops.set_backend("reference"):
        want = loss(wide, **options)
        want_gradient = torch.autograd.grad(want, wide)[0]
    # Thousands of terms of one sign, and a gradient rounded once to its dtype.
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    eps = torch.finfo(dtype).eps
    scale = float(want_gradient.abs().max())
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=max(eps, 1e-5), atol=1e-6 * scale)


@pytest.mark.parametrize("make", [quality, varifocal, focal])
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
def test_every_gradient_that_arrives_is_served(
    make: Any, leaf: bool, device: torch.device, told: Told, generator: torch.Generator
) -> None:
    """1, 0, 2 and NaN to the first backward pass, and each to a second one after each."""
    start, loss = make(generator, device)
    start.requires_grad_()
    pred = start if leaf else start * 1.0
    want = torch.autograd.grad(loss(pred), start, retain_graph=True)[0]
    factors = (1.0, 0.0, 2.0, float("nan"))
    told.clear()
    for first in factors:
        for second in factors:
            value = loss(pred)
            for factor in (first, second):
                arriving = torch.tensor(factor, device=device)
                got = torch.autograd.grad(value, start, arriving, retain_graph=True)[0]
                if factor in (0.0, 1.0, 2.0):  # powers of two: not a bit is lost
                    assert torch.equal(got, factor * want), (first, second)
                else:
                    assert got.isnan().all(), (first, second)
    assert told.are(*["forward", "finish", "backward"] * 16)


def test_a_gradient_that_was_handed_out_is_its_owners(
    node: str, device: torch.device, generator: torch.Generator
) -> None:
    """Written over, it does not show in a second backward pass, and no later pass writes over it."""
    pred, loss = quality(generator, device)
    pred.requires_grad_()
    value = loss(pred)
    first = torch.autograd.grad(value, pred, retain_graph=True)[0]
    want = first.clone()
    first.fill_(7.0)
    second = torch.autograd.grad(value, pred, retain_graph=True)[0]
    assert torch.equal(second, want)
    torch.autograd.grad(value, pred, torch.tensor(3.0, device=device))
    assert torch.equal(first, torch.full_like(first, 7.0)) and torch.equal(second, want)


def test_a_leaf_takes_the_gradient_without_a_copy(node: str, device: torch.device, generator: torch.Generator) -> None:
    pred, loss = quality(generator, device)
    pred.requires_grad_()
    value = loss(pred)
    given: list[int] = []

    def note(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor, ...]) -> None:
        given.extend(g.data_ptr() for g in grad_inputs if g is not None)

    stored = [value.grad_fn.gradient.data_ptr()] if node == "python" else given
    value.grad_fn.register_hook(note)
    value.backward()
    assert pred.grad is not None and [pred.grad.data_ptr()] == stored == given


def test_accumulation_over_two_passes_adds_up(node: str, device: torch.device, generator: torch.Generator) -> None:
    pred, loss = quality(generator, device)
    pred.requires_grad_()
    value = loss(pred)
    value.backward(retain_graph=True)
    first = pred.grad.clone()
    value.backward()
    assert torch.equal(pred.grad, first + first)


def test_fp16_stores_no_gradient(device: torch.device, told: Told, generator: torch.Generator) -> None:
    """Scaled up, as by a GradScaler, what would underflow arrives."""
    pred, loss = quality(generator, device)
    pred = (pred - 8).half().requires_grad_()
    value = loss(pred, avg_factor=1000.0)
    scaled = torch.autograd.grad(value, pred, torch.tensor(65536.0, device=device))[0]
    assert told.are("forward", "backward")
    wide = pred.detach().double().requires_grad_()
    with gfl_ops.set_backend("reference"):
        want = torch.autograd.grad(65536 * loss(wide, avg_factor=1000.0), wide)[0]
    # What is left below fp16's smallest numbers is less than a thousandth of the whole.
    assert float((scaled.double() - want).abs().sum() / want.abs().sum()) < 2e-3


@pytest.mark.parametrize("layout", ["transposed", "padded", "sliced", "misaligned", "channels-first", "channels-last"])
def test_any_layout(layout: str, device: torch.device, told: Told, generator: torch.Generator) -> None:
    if layout.startswith("channels"):
        pred = torch.randn(2, 8, 5, 12, generator=generator).to(device)
        target = torch.rand(2, 8, 5, 12, generator=generator).to(device)
        if layout == "channels-last":
            pred, target = (t.contiguous(memory_format=torch.channels_last) for t in (pred, target))

        def loss(x: Tensor) -> Tensor:
            return quality_focal_loss(x, target, avg_factor=3.0)
    else:
        dense, loss = quality(generator, device, 133, 24)
        n, c = dense.shape
        pred = {
            "transposed": lambda: dense.t().contiguous().t(),
            "padded": lambda: torch.cat([dense, dense], 1)[:, :c],
            "sliced": lambda: dense.repeat_interleave(2, 1)[:, ::2],
            "misaligned": lambda: torch.cat([dense.new_zeros(1), dense.flatten()])[1:].view(n, c),
        }[layout]()
    pred.requires_grad_()
    got = torch.autograd.grad(loss(pred), pred)[0]
    assert told.are("forward", "finish")
    wide = pred.detach().double().requires_grad_()
    with gfl_ops.set_backend("reference"):
        want = torch.autograd.grad(loss(wide), wide)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def test_where_it_is_not_used(device: torch.device, told: Told, generator: torch.Generator) -> None:
    """Single losses, gradients to others than the scores, transforms of functions, and what is compiled."""
    pred, loss = quality(generator, device)
    n = len(pred)
    wanted = pred.clone().requires_grad_()
    loss(wanted, reduction="none")
    weight = torch.rand(n, device=device, requires_grad=True)
    assert torch.autograd.grad(loss(wanted, weight=weight), weight)[0].abs().sum() > 0
    factor = torch.tensor(3.0, device=device, requires_grad=True)
    assert torch.autograd.grad(loss(wanted, avg_factor=factor), factor)[0] < 0
    score = torch.rand(n, device=device, requires_grad=True)
    label = torch.zeros(n, dtype=torch.long, device=device)
    assert torch.autograd.grad(quality_focal_loss(wanted, (label, score)), score)[0].abs().sum() > 0
    elements = torch.rand(pred.shape, device=device)
    varifocal_loss(wanted, elements, elements)
    sigmoid_focal_loss(wanted, elements, reduction="none")
    with gfl_ops.set_backend("reference"):
        loss(wanted)
    torch.compile(loss, fullgraph=True, backend="aot_eager")(wanted).backward()
    assert told == [] and wanted.grad is not None


def test_a_compiled_gradient_is_the_same(device: torch.device, generator: torch.Generator) -> None:
    pred, loss = quality(generator, device)
    pred.requires_grad_()
    want = torch.autograd.grad(2 * loss(pred), pred)[0]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: 2 * loss(x), fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(pred), pred)[0], want, rtol=1e-5, atol=1e-9)


def test_a_second_derivative_is_refused(node: str, device: torch.device, generator: torch.Generator) -> None:
    pred, loss = quality(generator, device)
    pred.requires_grad_()
    gradient = torch.autograd.grad(loss(pred), pred, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("n", [0, 1, 5])
def test_nothing_and_little(n: int, node: str, device: torch.device, generator: torch.Generator) -> None:
    for make in (quality, varifocal, focal):
        pred, loss = make(generator, device, n=n)
        pred.requires_grad_()
        for options in ({"reduction": "sum"}, {"avg_factor": 1.0}):
            value = loss(pred, **options)
            assert (value == 0) == (n == 0)
            assert torch.autograd.grad(value, pred)[0].shape == pred.shape
        assert torch.isnan(loss(pred)) == (n == 0)


def test_the_operators_keep_torchs_rules(device: torch.device, generator: torch.Generator) -> None:
    operators = torch.ops.gfl if gfl_ops.get_backend() == "native" else torch.ops.gfl_triton
    pred = torch.randn(33, 20, generator=generator).to(device)
    label = torch.randint(0, 21, (33,), generator=generator).to(device)
    score, norm = torch.rand(33, generator=generator).to(device), torch.tensor(3.0, device=device)
    target = torch.rand(33, 20, generator=generator).to(device)
    for tensors, kind in (
        ((pred, label, score, score, norm), 0),
        ((pred.t().contiguous().t(), None, target, None, None), 1),
    ):
        arguments = (*tensors, 0.5, kind, 0.25, 2.0, False)
        torch.library.opcheck(operators.score_loss_fwd, (*arguments, True))
        torch.library.opcheck(operators.score_loss_bwd, (norm, *arguments))
        gradient = operators.score_loss_fwd(*arguments, True)[1]
        torch.library.opcheck(operators.score_loss_finish, (gradient.clone(), norm, *arguments))
        assert gradient.stride() == tensors[0].stride()
