# SPDX-License-Identifier: Apache-2.0
"""Quality focal loss: what is special to it. The contract of every operator is in test_op_contract.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops import quality_focal_loss
from gfl_ops.core import backends

STEM = "qfl"
INF, NAN = float("inf"), float("nan")


def drawn(n: int, c: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which some are background, scores."""
    pred = torch.randn(n, c, generator=generator, dtype=torch.float64) * 3
    label = torch.randint(0, c + 1, (n,), generator=generator)
    score = torch.rand(n, generator=generator, dtype=torch.float64)
    return pred.to(device), label.to(device), score.to(device)


def written_out(pred: Tensor, label: Tensor, score: Tensor, beta: float = 2.0) -> Tensor:
    """The formula, row by row and class by class."""
    rows = []
    for x, y, s in zip(pred, label, score):
        total = x.new_zeros(())
        for k in range(len(x)):
            t = s if int(y) == k else s.new_zeros(())
            p = 1 / (1 + (-x[k]).exp())
            total = total - (t - p).abs() ** beta * (t * p.log() + (1 - t) * (1 - p).log())
        rows.append(total)
    return torch.stack(rows)


def test_it_is_the_formula(backend: str, device: torch.device, generator: torch.Generator) -> None:
    pred, label, score = drawn(9, 4, generator, device)
    pred.requires_grad_()
    score.requires_grad_()
    got = quality_focal_loss(pred, (label, score), reduction="none")
    want = written_out(pred, label, score)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    weight = torch.randn(9, generator=generator, dtype=torch.float64).to(device)
    for g, w in zip(torch.autograd.grad((got * weight).sum(), (pred, score)),
                    torch.autograd.grad((want * weight).sum(), (pred, score)), strict=True):  # fmt: skip
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def test_the_gradient_reaches_scores_of_positives_only(
    backend: str, device: torch.device, generator: torch.Generator
) -> None:
    pred, _, score = drawn(4, 3, generator, device)
    score = score.float().requires_grad_()
    label = torch.tensor([0, 3, -1, 2], device=device)
    quality_focal_loss(pred.float(), (label, score)).backward()
    assert score.grad is not None
    assert score.grad[[0, 3]].abs().min() > 0
    assert score.grad[[1, 2]].abs().max() == 0


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_small_beta_has_finite_gradients(beta: float, backend: str, device: torch.device) -> None:
    """At score = probability the power has no finite derivative; where σ is subnormal, the power itself overflows."""
    pred = torch.tensor([[0.0], [0.0], [-90.0], [-100.0], [100.0], [1e4], [-1e4], [-103.0]], device=device)
    label = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1], device=device)
    score = torch.tensor([0.5, 0.25, 0, 0, 1, 1, 0, 0], device=device).requires_grad_()
    pred.requires_grad_()
    loss = quality_focal_loss(pred, (label, score), beta=beta, reduction="none")
    loss.sum().backward()
    assert pred.grad is not None and score.grad is not None
    for value in (loss, pred.grad, score.grad):
        assert torch.isfinite(value).all()
    if beta > 0:
        # Score equals probability: neither loss nor gradient.
        assert loss[0] == 0 and pred.grad[0] == 0 and score.grad[0] == 0


def test_large_logits_are_finite_with_unit_gradient(backend: str, device: torch.device) -> None:
    pred = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [1e4, -1e4]], device=device, requires_grad=True)
    loss = quality_focal_loss(
        pred, (torch.tensor([2, 0, 0], device=device), torch.ones(3, device=device)), reduction="none"
    )
    loss.sum().backward()
    assert loss.tolist() == [1e4, 2e4, 0]
    assert pred.grad is not None
    assert pred.grad.tolist() == [[1, 0], [-1, 1], [0, 0]]


def test_infinite_logits_count_as_the_largest(backend: str, device: torch.device) -> None:
    pred = torch.tensor([[-INF], [INF], [INF], [-INF]], device=device, requires_grad=True)
    label = torch.tensor([1, 0, 1, 0], device=device)
    loss = quality_focal_loss(pred, (label, torch.ones(4, device=device)), reduction="none")
    loss.sum().backward()
    largest = torch.finfo(torch.float32).max
    assert loss.tolist() == [0, 0, largest, largest]
    assert pred.grad is not None and pred.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_of_every_integer_type(
    dtype: torch.dtype, backend: str, device: torch.device, generator: torch.Generator
) -> None:
    pred, label, score = drawn(7, 3, generator, device)
    want = quality_focal_loss(pred, (label, score))
    assert torch.equal(quality_focal_loss(pred, (label.to(dtype), score)), want)
    assert torch.equal(quality_focal_loss(pred, [label.to(dtype), score]), want), "a list serves as well"


def test_a_dense_target_of_more_dimensions(backend: str, device: torch.device, generator: torch.Generator) -> None:
    pred = torch.randn(2, 5, 3, 4, generator=generator).to(device)
    target = torch.rand(2, 5, 3, 4, generator=generator).to(device)
    weight = torch.rand(2, 3, 4, generator=generator).to(device)
    flat = [t.permute(0, 2, 3, 1).reshape(-1, 5) for t in (pred, target)]
    got = quality_focal_loss(pred, target, weight, reduction="none")
    assert got.shape == (2, 3, 4)
    want = quality_focal_loss(flat[0], flat[1], weight.reshape(-1), reduction="none")
    torch.testing.assert_close(got.reshape(-1), want, rtol=1e-6, atol=1e-6)
    mean = quality_focal_loss(pred.to(memory_format=torch.channels_last), target, weight, avg_factor=3.0)
    torch.testing.assert_close(mean, want.sum() / 3, rtol=1e-5, atol=1e-6)


def test_what_is_no_probability_gives_nan(backend: str, device: torch.device) -> None:
    pred = torch.tensor([[0.0], [1.0], [-1e-6], [1.0001], [INF], [NAN]], device=device, requires_grad=True)
    label = torch.tensor([1, 0, 0, 0, 0, 0], device=device)
    loss = quality_focal_loss(pred, (label, torch.ones(6, device=device)), reduction="none", activated=True)
    loss.sum().backward()
    assert pred.grad is not None
    for value in (loss, pred.grad[:, 0]):
        assert torch.isnan(value).tolist() == [False, False, True, True, True, True]
    assert loss[:2].tolist() == [0, 0]


@pytest.mark.parametrize("activated", [False, True])
def test_scores_outside_the_unit_interval_have_a_defined_loss(
    activated: bool, backend: str, device: torch.device
) -> None:
    """The formula is linear in them; no backend stops the program, on any device."""
    pred = torch.tensor([[0.25], [0.25]], device=device)
    score = torch.tensor([-0.5, 1.5], device=device)
    got = quality_focal_loss(pred, (torch.tensor([0, 0], device=device), score), reduction="none", activated=activated)
    p = 0.25 if activated else 1 / (1 + math.exp(-0.25))
    want = [(t - p) ** 2 * -(t * math.log(p) + (1 - t) * math.log(1 - p)) for t in (-0.5, 1.5)]
    torch.testing.assert_close(got.cpu(), torch.tensor(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pred_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("score_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_mixed_dtypes(
    pred_dtype: torch.dtype,
    score_dtype: torch.dtype,
    backend: str,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    pred, label, score = drawn(9, 4, generator, device)
    pred, score = pred.to(pred_dtype).requires_grad_(), score.to(score_dtype).requires_grad_()
    weight = torch.ones(9, dtype=torch.float64, device=device)
    loss = quality_focal_loss(pred, (label, score), weight)
    loss.backward()
    assert loss.dtype == (torch.float64 if pred_dtype == torch.float64 else torch.float32)
    assert pred.grad is not None and pred.grad.dtype == pred_dtype
    assert score.grad is not None and score.grad.dtype == score_dtype
    want = quality_focal_loss(pred.double(), (label, score.double()))
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)


def test_no_classes(backend: str, device: torch.device) -> None:
    target = (torch.zeros(3, dtype=torch.long, device=device), torch.zeros(3, device=device))
    assert quality_focal_loss(torch.zeros(3, 0, device=device), target, reduction="none").tolist() == [0, 0, 0]


def test_views(backend: str, device: torch.device, generator: torch.Generator) -> None:
    """Expanded, stepped, turned round and offset views give what their copies give."""
    pred, label, score = drawn(12, 6, generator, device)
    pred, score = pred.float(), score.float()
    for view in (pred[:1].expand(12, 6), pred[:, 1:5], pred[:, ::2], pred.flip(0)[::1], pred.t().contiguous().t()):
        want = quality_focal_loss(view.contiguous(), (label, score), reduction="none")
        got = quality_focal_loss(view, (label[::1], score.expand(2, 12)[1]), reduction="none")
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    one = pred[:1].clone().requires_grad_()
    quality_focal_loss(one.expand(12, 6), (label, score), reduction="sum").backward()
    twelve = pred[:1].expand(12, 6).clone().requires_grad_()
    quality_focal_loss(twelve, (label, score), reduction="sum").backward()
    assert one.grad is not None and twelve.grad is not None
    torch.testing.assert_close(one.grad, twelve.grad.sum(0, keepdim=True), rtol=1e-5, atol=1e-5)


def test_more_rows_than_one_pass_of_a_grid(backend: str, device: torch.device, generator: torch.Generator) -> None:
    if backend == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter would take minutes")
    pred, label, score = (t.repeat(80_000, *[1] * (t.dim() - 1)) for t in drawn(7, 1, generator, device))
    pred = pred.float().requires_grad_()
    loss = quality_focal_loss(pred, (label, score.float()), reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    for value in (loss, grad[:, 0]):
        assert torch.equal(value.reshape(80_000, 7), value[:7].expand(80_000, 7))


def test_offsets_beyond_32_bits(backend: str, device: torch.device, generator: torch.Generator) -> None:
    """Two rows 2^31 elements apart; of the memory between, no page is touched."""
    far = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=device).as_strided((2, 4), (2**31, 1))
    far.copy_(torch.randn(2, 4, generator=generator))
    target = (torch.tensor([1, 4], device=device), torch.tensor([0.5, 0.5], device=device))
    want = quality_focal_loss(far.contiguous(), target, reduction="none")
    assert torch.equal(quality_focal_loss(far, target, reduction="none"), want)


PRED = torch.zeros(7, 3)
LABEL, SCORE = torch.zeros(7, dtype=torch.long), torch.zeros(7)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("weight [N, 1]", {"weight": torch.ones(7, 1)}, ValueError, "`weight` must have shape [N] = [7], got [7, 1]"),
    ("weight of another length", {"weight": torch.ones(6)}, ValueError, "`weight` must have shape [N] = [7], got [6]"),
    ("weight no tensor", {"weight": [1.0] * 7}, TypeError, "`weight` must be a tensor, got list"),
    ("weight complex", {"weight": torch.ones(7, dtype=torch.cfloat)}, TypeError, "got torch.complex64"),
    ("pred 1-D", {"pred": torch.zeros(7)}, ValueError, "`pred` must have shape [N, C], got [7]"),
    ("pred integer", {"pred": PRED.long()}, TypeError, "`pred` must have one of the dtypes"),
    ("pred no tensor", {"pred": 1.0}, TypeError, "`pred` must be a tensor, got float"),
    ("label float", {"target": (SCORE, SCORE)}, TypeError, "`target[0]` must have one of the dtypes int64"),
    ("score integer", {"target": (LABEL, LABEL)}, TypeError, "`target[1]` must have one of the dtypes float32"),
    ("label short", {"target": (LABEL[:6], SCORE)}, ValueError, "`target[0]` must have shape [N] = [7], got [6]"),
    ("score [N, 1]", {"target": (LABEL, SCORE[:, None])}, ValueError, "`target[1]` must have shape [N] = [7]"),
    ("three targets", {"target": (LABEL, SCORE, SCORE)}, ValueError, "`target` must be (label, score) or one tensor"),
    ("dense target narrow", {"target": torch.zeros(7, 2)}, ValueError, "`target` must have shape [N, C] = [7, 3]"),
    ("dense target integer", {"target": torch.zeros(7, 3).long()}, TypeError, "`target` must have one of the dtypes"),
    ("reduction", {"reduction": "average"}, ValueError, "`reduction` must be one of 'none', 'mean', 'sum'"),
    ("beta negative", {"beta": -1.0}, ValueError, "`beta` must be >= 0, got -1.0"),
    ("beta NaN", {"beta": NAN}, ValueError, "`beta` must not be NaN"),
    ("beta text", {"beta": "2"}, TypeError, "`beta` must be a number, got str"),
    ("avg_factor text", {"avg_factor": "7"}, TypeError, "`avg_factor` must be a number, got str"),
    ("avg_factor of two", {"avg_factor": torch.ones(2)}, ValueError, "`avg_factor` must hold one number, got [2]"),
    ("device", {"target": (LABEL.to("meta"), SCORE)}, ValueError, "`target[0]` must be on the device of `pred`"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_said(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"pred": PRED, "target": (LABEL, SCORE), **change}
    with pytest.raises(error) as raised:
        quality_focal_loss(**arguments)
    assert str(raised.value).startswith("gfl_ops.quality_focal_loss: ")
    assert text in str(raised.value)


def test_the_operator_itself_is_safe_to_call_wrongly() -> None:
    """A direct call has shorter messages, and never reads out of bounds. (The reference is memory-safe by nature.)"""
    reason = backends.unavailable("native", STEM, "cpu")
    if reason is not None:
        pytest.skip(reason)
    operator = torch.ops.gfl.qfl_fwd
    good = (PRED, LABEL, SCORE, 2.0, False)
    for position, value in ((0, PRED[0]), (1, LABEL[:3]), (2, SCORE[:3]), (2, SCORE.double()), (1, LABEL.int())):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            operator(*good[:position], value, *good[position + 1 :])


def test_a_loss_compiles_into_one_graph_with_any_number_of_rows(backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(quality_focal_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9, 33):
        generator = torch.Generator().manual_seed(n)
        pred, label, score = drawn(n, 4, generator, device)
        pred.requires_grad_()
        got = compiled(pred, (label, score), avg_factor=torch.tensor(3.0, device=device))
        want = gfl_ops.quality_focal_loss(pred, (label, score), avg_factor=torch.tensor(3.0, device=device))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        first, second = torch.autograd.grad(got, pred)[0], torch.autograd.grad(want, pred)[0]
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)
