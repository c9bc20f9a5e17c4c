# SPDX-License-Identifier: Apache-2.0
"""What is special to the Triton kernels; what they share with the other backends is in test_op_contract.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends
from gfl_ops.core.random_inputs import boxes as draw_boxes
from gfl_ops.core.random_inputs import normal, uniform
from gfl_ops.core.registry import SPECS

triton = pytest.importorskip("triton", reason="the package triton is not installed")
if not backends.TRITON_INTERPRETS:
    pytest.skip("Triton runs on the CPU in its interpreter alone: needs TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402

from gfl_ops.ops.score.score_loss import SUMMED  # noqa: E402
from gfl_ops.triton import bins, launch, nms, score  # noqa: E402
from gfl_ops.triton.terms import log1p_unit, log_complement  # noqa: E402

CPU = torch.device("cpu")


@triton.jit
def _logarithms_kernel(e, first, second, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(e + at, mask=at < n, other=0.0)
    tl.store(first + at, log1p_unit(x), mask=at < n)
    tl.store(second + at, log_complement(x), mask=at < n)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
def test_logarithms_near_one_keep_their_digits(dtype: torch.dtype, allowed: float, generator: torch.Generator) -> None:
    tiny = 10.0 ** -uniform((500,), CPU, torch.float64, generator, 0.0, 30.0)
    e = torch.cat([tiny, uniform((500,), CPU, torch.float64, generator), torch.tensor([0.0, 1.0])]).to(dtype)
    first, second = torch.empty_like(e), torch.empty_like(e)
    _logarithms_kernel[(1,)](e, first, second, e.numel(), BLOCK=1024)
    x = e.to(torch.float64)
    torch.testing.assert_close(first.double(), torch.log1p(x), rtol=allowed, atol=0)
    torch.testing.assert_close(second.double(), torch.log1p(-x), rtol=allowed, atol=0)


@pytest.mark.parametrize("classes", [1, 63, 65, 600])
def test_rows_and_classes_span_several_tiles(classes: int, generator: torch.Generator) -> None:
    """One class, a tile less one and plus one, and more tiles than are unrolled; more rows than one program has."""
    n = 1100
    pred = normal((n, classes), CPU, torch.float32, generator, 3.0)
    label = torch.randint(-1, classes + 1, (n,), generator=generator)
    args = (pred, label, uniform((n,), CPU, torch.float32, generator), [2.0], False)
    torch.testing.assert_close(score.qfl_forward(*args), SPECS["qfl"].reference(*args), rtol=1e-5, atol=1e-5)
    grad = uniform((n,), CPU, torch.float32, generator)
    leaves = [pred.clone().requires_grad_(), args[2].clone().requires_grad_()]
    loss = SPECS["qfl"].reference(leaves[0], label, leaves[1], [2.0], False)
    want = torch.autograd.grad(loss, leaves, grad)
    for got, expected in zip(score.qfl_backward(grad, *args, [True, True]), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_label_beyond_32_bits_is_background() -> None:
    """Labels are compared in 32 bits: 2^32 must not become class 0."""
    pred, quality = torch.zeros(4, 3), torch.full((4,), 0.75)
    label = torch.tensor([2**32, -(2**32), 2**32 + 1, 3])
    background = score.qfl_forward(pred, torch.full((4,), -1), quality, [2.0], False)
    assert torch.equal(score.qfl_forward(pred, label, quality, [2.0], False), background)
    grad_pred, grad_score = score.qfl_backward(torch.ones(4), pred, label, quality, [2.0], False, [True, True])
    assert torch.equal(grad_score, torch.zeros(4))
    assert torch.equal(grad_pred, grad_pred[:1, :1].expand(4, 3))


@pytest.mark.parametrize("stem", SUMMED)
def test_an_infinite_logit_has_no_gradient(stem: str) -> None:
    """Nor does it spoil the gradients beside it: 0 · ∞ never appears."""
    pred = torch.tensor([[float("inf"), -float("inf"), 0.5], [-float("inf"), float("inf"), -0.5]])
    target = torch.tensor([[0.0, 0.5, 1.0], [0.0, 1.0, 0.25]])
    params = next(SPECS[stem].samples(CPU, torch.float32, torch.Generator())).args[3]
    grad = torch.ones(2) if SUMMED[stem] else torch.ones(2, 3)
    grad_pred, _ = getattr(score, f"{stem}_backward")(grad, pred, None, target, params, False, [True, True])
    assert torch.equal(grad_pred[:, :2], torch.zeros(2, 2))
    assert torch.isfinite(grad_pred).all() and (grad_pred[:, 2] != 0).all()


def test_labels_of_several_images(generator: torch.Generator) -> None:
    """Of [B, C, P] with labels [B, P]: each image by its own scores."""
    pred = normal((3, 5, 7), CPU, torch.float32, generator)
    label = torch.randint(-1, 6, (3, 7), generator=generator)
    quality, weight = (uniform((3, 7), CPU, torch.float32, generator) for _ in range(2))
    rows = pred.transpose(1, 2).reshape(-1, 5)
    constants = (None, 1.0, "qfl", [2.0], False, True)
    got, gradient = score.score_loss_forward(pred, label, quality, weight, *constants)
    flat = (t.flatten() for t in (label, quality, weight))
    want, want_gradient = score.score_loss_forward(rows, *flat, *constants)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient.transpose(1, 2).reshape(-1, 5), want_gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_rounded_once(dtype: torch.dtype, generator: torch.Generator) -> None:
    """To nearest, as torch does; the interpreter's own cast to bfloat16 truncates."""
    pred = normal((33, 17), CPU, dtype, generator, 2.0)
    target = uniform((33,), CPU, torch.float32, generator, 0.0, 16.0)
    grad = uniform((33,), CPU, torch.float32, generator)
    rounded = bins.dfl_backward(grad, pred, target, False, [True, False])[0]
    exact = bins.dfl_backward(grad, pred.float(), target, False, [True, False])[0]
    assert rounded.dtype == dtype
    assert torch.equal(rounded, exact.to(dtype))


def test_targets_out_of_range() -> None:
    """At the ends, just beyond them, far beyond them, and NaN; with and without logits that are NaN themselves."""
    inf, nan = float("inf"), float("nan")
    target = torch.tensor([0.0, 16.0, -1e-3, 16.001, -inf, inf, nan, 3e9, nan])
    pred = torch.linspace(-3, 3, 9 * 17).reshape(9, 17).sin() * 4
    pred[-1] = nan
    grad = torch.linspace(0.5, 2, 9)
    for ignore in (False, True):
        leaves = [pred.clone().requires_grad_(), target.clone().requires_grad_()]
        loss = SPECS["dfl"].reference(*leaves, ignore)
        want = torch.autograd.grad(loss, leaves, grad)
        torch.testing.assert_close(bins.dfl_forward(pred, target, ignore), loss.detach(), rtol=1e-5, atol=1e-5)
        for got, expected in zip(bins.dfl_backward(grad, pred, target, ignore, [True, True]), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(got[-1], torch.zeros_like(got[-1]))
        both = bins.dfl_integral_forward(pred, target, ignore)
        assert torch.equal(both[0], bins.dfl_forward(pred, target, ignore))
        assert both[1][-1].isnan() and torch.isfinite(both[1][:-1]).all()


def test_the_ends_of_the_integers_are_bins_too() -> None:
    """A given bin of 2^63 − 1 does not run over when 1 is added."""
    left = torch.tensor([2**63 - 1, -(2**63), -1, 16, 15])
    pred = torch.linspace(-2, 2, 5 * 17).reshape(5, 17).cos() * 3
    weights = torch.linspace(0.1, 1, 5), torch.linspace(1, 0.2, 5)
    want = SPECS["dfl_two_bin"].reference(pred, left, *weights)
    torch.testing.assert_close(bins.dfl_two_bin_forward(pred, left, *weights), want, rtol=1e-5, atol=1e-5)


def test_locations_fold_where_their_strides_admit_it() -> None:
    maps = torch.zeros(2, 68, 3, 5)
    assert launch.fold(maps) == [(maps.numel(), 1)]
    assert launch.locations(maps.permute(0, 2, 3, 1)[..., 0]) == (2, 15, (68 * 15, 1))
    assert launch.locations(torch.zeros(7, 3, 68)[..., 0]) == (1, 21, (0, 68))
    assert launch.locations(torch.zeros(())) == (1, 1, (0, 0))
    assert launch.locations(torch.zeros(4, 6, 8)[::2, ::2, 0]) == (2, 3, (96, 16))
    assert launch.locations(torch.zeros(4, 6, 8, 10)[::2, ::2, ::2, 0]) is None
    # Two tensors fold together only where both do.
    grid, image = torch.zeros(15, 2)[:, 0], torch.zeros(2, 15, 68)[..., 0]
    assert launch.locations(image, grid.expand(2, 15)) == (2, 15, (15 * 68, 68, 0, 2))


def test_more_images_than_the_second_axis_of_a_grid_has(generator: torch.Generator) -> None:
    """65 535 programs at most: beyond that the locations are copied and walked as rows."""
    pred = normal((65536, 2, 16), CPU, torch.float32, generator)[:, :, :8].transpose(0, 1).transpose(0, 1)
    assert launch.locations(pred[:, ::2, 0]) is not None
    spread = pred.as_strided((65536, 2, 8), (32, 9, 1))
    assert launch.locations(spread[..., 0]) is None
    torch.testing.assert_close(
        bins.integral_forward(spread, 1), SPECS["integral"].reference(spread, 1), rtol=1e-5, atol=1e-5
    )


def test_a_limit_below_zero_wins() -> None:
    """Clipping is to [0, limit], the limit last; a clipped coordinate passes no gradient, one at the limit does."""
    pred = torch.zeros(3, 8)  # distances of half a bin, times the stride
    points = torch.tensor([[1.0, 1.0], [4.0, 4.0], [9.0, 9.0]])
    limit = torch.tensor([[10.0, -2.0], [6.0, 5.0], [9.0, 8.0]])  # height, width
    stride = torch.full((3,), 2.0)
    boxes = bins.decode_forward(pred, points, stride, 1, limit)
    assert boxes.tolist() == [[-2.0, 0.0, -2.0, 2.0], [3.0, 3.0, 5.0, 5.0], [8.0, 8.0, 8.0, 9.0]]
    _, grad_points = bins.decode_backward(torch.ones(3, 4), pred, points, stride, 1, limit, [True, True])
    assert grad_points.tolist() == [[0.0, 2.0], [2.0, 2.0], [1.0, 1.0]]


def by_loop(boxes: Tensor, scores: Tensor, idxs: Tensor | None, threshold: float) -> list[int]:
    """Greedy suppression as it is usually written down, in Python floats rounded to fp32 by torch."""
    order = torch.sort(scores, descending=True, stable=True).indices.tolist()
    kept: list[int] = []
    for i in order:
        rivals = torch.tensor([k for k in kept if idxs is None or idxs[k] == idxs[i]], dtype=torch.int64)
        low = torch.maximum(boxes[rivals, :2], boxes[i, :2])
        size = (torch.minimum(boxes[rivals, 2:], boxes[i, 2:]) - low).clamp(min=0)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        overlap = size[:, 0] * size[:, 1]
        if not bool((overlap / (area[rivals] + area[i] - overlap) > threshold).any()):
            kept.append(i)
    return kept


@pytest.mark.parametrize("n", [63, 64, 65, 200])
def test_a_chain_of_suppressions(n: int) -> None:
    """Each box overlaps the next alone, so every second one is kept: the longest way to a fixed point within a tile."""
    x = torch.arange(n, dtype=torch.float32)[:, None]
    boxes = torch.cat([x, torch.zeros_like(x), x + 1.8, torch.ones_like(x)], 1)
    scores = torch.linspace(1, 0, n)
    assert nms.nms_forward(boxes, scores, None, 0.2, False).tolist() == list(range(0, n, 2))


def test_crowded_boxes_of_few_and_of_many_classes(generator: torch.Generator) -> None:
    """Kept lists of several tiles; more classes than programs; classes of one box and of a hundred."""
    n = 180
    boxes = draw_boxes(n, CPU, torch.float32, generator, extent=150.0)
    scores = (uniform((n,), CPU, torch.float32, generator) * 50).floor()  # many ties
    for classes in (1, 20, 10**6):
        idxs = torch.randint(-classes, classes, (n,), generator=generator)
        got = nms.nms_forward(boxes, scores, idxs, 0.5, False).tolist()
        assert got == by_loop(boxes, scores, idxs, 0.5), f"{classes} classes"
    assert nms.nms_forward(boxes, scores, None, 0.7, False).tolist() == by_loop(boxes, scores, None, 0.7)


def test_a_large_class_is_walked_in_panels(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """One class alone, and one among others: panels of 64, the last of them not whole."""
    monkeypatch.setattr(nms, "CHAIN", 100)
    monkeypatch.setattr(nms, "PANEL", 64)
    n = 230
    boxes = draw_boxes(n, CPU, torch.float32, generator, extent=120.0)
    scores = (uniform((n,), CPU, torch.float32, generator) * 80).floor()
    assert nms.nms_forward(boxes, scores, None, 0.4, False).tolist() == by_loop(boxes, scores, None, 0.4)
    idxs = torch.where(torch.arange(n) % 3 == 0, torch.randint(-9, 9, (n,), generator=generator), 4)
    assert 100 < int((idxs == 4).sum()) < 200
    assert nms.nms_forward(boxes, scores, idxs, 0.6, False).tolist() == by_loop(boxes, scores, idxs, 0.6)
    with launch.record() as launches:
        nms.nms_forward(boxes, scores, idxs, 0.6, False)
        nms.nms_forward(boxes, scores, None, 0.6, False)
    # All classes but the large one, and 3 or 4 panels: each is decided, and all but the last clear what follows.
    names = [launch.kernel.__name__ for launch in launches]
    pair = ["nms_kernel", "nms_clear_kernel"]
    assert names == ["nms_kernel", *(pair * 2), "nms_kernel", *(pair * 3), "nms_kernel"]


def test_an_iou_of_exactly_the_threshold_does_not_suppress() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    scores = torch.tensor([1.0, 0.5])
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)).item()
    assert nms.nms_forward(boxes, scores, None, 0.5, False).tolist() == [0, 1]
    assert nms.nms_forward(boxes, scores, None, below, False).tolist() == [0]
    # The threshold is rounded to the type of the arithmetic first: in fp64 the same number lies below.
    assert nms.nms_forward(boxes, scores, None, 0.5 - 1e-9, False).tolist() == [0, 1]
    assert nms.nms_forward(boxes.double(), scores, None, 0.5 - 1e-9, False).tolist() == [0]


def test_a_recorded_launch_is_not_made() -> None:
    loss = torch.full((5,), 7.0)
    with launch.record() as launches:
        score.qfl_forward(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64), loss, [2.0], False)
        score.qfl_forward(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), loss[:0], [2.0], False)
    assert [launch.kernel for launch in launches] == [score.score_kernel]
    assert launches[0].constants["SPARSE"] is True


def test_the_public_functions_run_by_triton(generator: torch.Generator) -> None:
    boxes = draw_boxes(20, CPU, torch.float32, generator)
    scores = uniform((20,), CPU, torch.float32, generator)
    pred = normal((20, 5), CPU, torch.float32, generator).requires_grad_()
    label = torch.randint(0, 6, (20,), generator=generator)
    results = []
    for backend in ("triton", "reference"):
        with gfl_ops.set_backend(backend):
            loss = gfl_ops.quality_focal_loss(pred, (label, scores), avg_factor=7)
            (grad,) = torch.autograd.grad(loss, pred)
            results.append((loss.detach(), grad, gfl_ops.batched_nms(boxes, scores, label, 0.5)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_group_norm_of_more_images_than_an_axis_of_a_grid_has() -> None:
    """The second and third axis of a grid end at 65 535 programs; the first does not."""
    from gfl_ops.triton import group_norm, launch

    maps = [torch.zeros(1, 2, 1, 1).expand(65536, 2, 1, 1)]
    affine = torch.ones(2), torch.zeros(2)
    with launch.record() as launches:
        _, statistics = group_norm.group_norm_relu_forward(maps, *affine, 2, 1e-5, True)
        group_norm.group_norm_relu_backward(maps, statistics, maps, *affine, 2, 1e-5, True, [True, True, True])
    assert len(launches) == 4
    assert all(programs <= 65535 for made in launches for programs in made.grid[1:])


def test_group_norm_keeps_a_small_eps_in_fp64(generator: torch.Generator) -> None:
    """fp32 would round 1e-5 by 2.5e-8 of its value, which shows where eps is all of the variance."""
    x = normal((1, 4, 3, 3), CPU, torch.float64, generator) * 1e-9
    args = ([x], torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 2, 1e-5, False)
    got, want = torch.ops.gfl_triton.group_norm_relu_fwd(*args)[0][0], SPECS["group_norm_relu"].reference(*args)[0][0]
    # Where x meets the mean, the difference keeps the rounding of its terms and not of itself.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())
