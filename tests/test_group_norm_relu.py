# SPDX-License-Identifier: Apache-2.0
"""Group normalization with ReLU over levels against torch's two operators, and what is special to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gfl_ops

STEM = "group_norm_relu"
SIZES = [(13, 9), (6, 5), (3, 2), (1, 1)]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def drawn(
    generator: torch.Generator,
    device: torch.device,
    layout: str = "nchw",
    dtype: torch.dtype = torch.float64,
    channels: int = 24,
    mean: float = 0.5,
) -> tuple[list[Tensor], Tensor, Tensor]:
    maps = [torch.randn((2, channels, h, w), generator=generator, dtype=torch.float64) * 2 + mean for h, w in SIZES]
    maps = [m.to(device, dtype).contiguous(memory_format=LAYOUTS[layout]) for m in maps]
    weight = torch.randn(channels, generator=generator, dtype=torch.float64) + 1
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    return maps, weight.to(device, dtype), bias.to(device, dtype)


def theirs(maps: list[Tensor], groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> list[Tensor]:
    return [F.group_norm(m, groups, weight, bias, eps).relu() for m in maps]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 4, 12])
def test_it_is_torchs_two_operators(
    backend: str, device: torch.device, layout: str, groups: int, generator: torch.Generator
) -> None:
    maps, weight, bias = drawn(generator, device, layout)
    leaves = [t.requires_grad_() for t in (*maps, weight, bias)]
    want, got = theirs(maps, groups, weight, bias), gfl_ops.group_norm_relu(maps, groups, weight, bias)
    # fp64: nothing but the order of sums differs.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    factors = [torch.randn(m.shape, generator=generator, dtype=torch.float64).to(device) for m in maps]
    want_grads = torch.autograd.grad(sum((f * y).sum() for f, y in zip(factors, want)), leaves)
    grads = torch.autograd.grad(sum((f * y).sum() for f, y in zip(factors, got)), leaves)
    torch.testing.assert_close(grads, want_grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_results_have_the_memory_format_of_the_maps(
    backend: str, device: torch.device, layout: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    maps, weight, bias = drawn(generator, device, layout, dtype)
    leaves = [m.requires_grad_() for m in maps]
    results = gfl_ops.group_norm_relu(maps, 4, weight, bias)
    # Gradients come in the other format here: it decides nothing.
    other = LAYOUTS["nhwc" if layout == "nchw" else "nchw"]
    given = [torch.randn(y.shape, generator=generator).to(y).contiguous(memory_format=other) for y in results]
    grads = torch.autograd.grad(results, leaves, given)
    for m, y, g in zip(maps, results, grads):
        assert y.stride() == m.stride() and y.dtype == dtype
        # torch's engine may hand a reference's gradient on in the format of the results' gradient.
        assert g.stride() == m.stride() or backend == "reference"


def test_layouts_agree(backend: str, device: torch.device, generator: torch.Generator) -> None:
    maps, weight, bias = drawn(generator, device, "nchw", torch.float32)
    results, of_parameters = [], []
    for layout in LAYOUTS.values():
        leaves = [m.detach().contiguous(memory_format=layout).requires_grad_() for m in maps]
        parameters = [p.detach().requires_grad_() for p in (weight, bias)]
        found = gfl_ops.group_norm_relu(leaves, 6, *parameters)
        # Results that nothing is made of have no gradient, or one of zeros.
        grads = torch.autograd.grad((found[0] ** 2).sum() + found[2].sum(), leaves[::2] + parameters)
        results.append((*found, *grads[:-2]))
        of_parameters.append(grads[-2:])
    # fp32 sums of a few hundred terms in another order.
    torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=2e-5)
    # What the parameters' gradients sum has both signs and may leave next to nothing: it is the terms that are rounded.
    of_weight = of_bias = torch.zeros_like(weight)
    for m, arriving in ((maps[0], 2.0), (maps[2], 0.0)):
        normed = F.group_norm(m, 6).abs()
        term = 1 + arriving * (normed * weight.abs()[:, None, None] + bias.abs()[:, None, None])
        of_weight, of_bias = of_weight + (term * normed).sum((0, 2, 3)), of_bias + term.sum((0, 2, 3))
    for a, b, total in zip(*of_parameters, (of_weight, of_bias), strict=True):
        assert bool(((a - b).abs() <= 10 * torch.finfo(torch.float32).eps * total).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [1e3, -3e4])
def test_a_large_mean_does_not_hide_the_variance(
    backend: str, device: torch.device, layout: str, mean: float, generator: torch.Generator
) -> None:
    """In fp32 the difference of E[x²] and E[x]² would be off by 6 % of the variance at a mean of a thousand deviations,
    and have nothing left of it at more."""
    maps, weight, bias = drawn(generator, device, layout, torch.float32, mean=mean)
    got = gfl_ops.group_norm_relu(maps, 4, weight, bias)
    want = theirs([m.double() for m in maps], 4, weight.double(), bias.double())
    # A mean rounded to fp32 is wrong by up to half an ulp, which counts in deviations, of 2, times the weight.
    error = torch.finfo(torch.float32).eps * abs(mean) * float(weight.abs().max())
    for g, w in zip(got[:3], want):
        torch.testing.assert_close(g.double(), w, rtol=2e-5, atol=error)
    statistics = torch.ops.gfl.group_norm_relu_fwd(maps, weight, bias, 4, 1e-5, True)[1]
    for m, s in zip(maps[:3], statistics):
        deviation = m.double().reshape(2, 4, -1).var(2, correction=0).add(1e-5).sqrt()
        torch.testing.assert_close(s[..., 1].double(), 1 / deviation, rtol=2e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 24, 5, 4), (2, 1, 5, 4), (2, 24, 1, 1), (2, 24, 1, 4), (1, 1, 1, 1)], ids=str)
def test_expanded_maps(backend: str, device: torch.device, shape: tuple[int, ...], generator: torch.Generator) -> None:
    """Elements that share memory are read as any others; the results are dense."""
    _, weight, bias = drawn(generator, device)
    given = torch.randn(shape, generator=generator, dtype=torch.float64).to(device).expand(2, 24, 5, 4)
    arriving = torch.randn(2, 24, 5, 4, generator=generator, dtype=torch.float64).to(device)
    results = []
    for leaf in (given.detach().requires_grad_(), given.contiguous().requires_grad_()):
        y = gfl_ops.group_norm_relu(leaf, 4, weight, bias)
        assert y.untyped_storage().nbytes() >= y.numel() * y.element_size()  # no element twice
        with torch.no_grad():
            y32 = gfl_ops.group_norm_relu(leaf.float(), 4, weight, bias)
        # The operator itself: autograd would sum what reaches one element of an expanded leaf.
        args = ([leaf.detach()], weight, bias, 4, 1e-5, True)
        name = "gfl_triton" if backend == "triton" else "gfl"
        statistics = getattr(torch.ops, name).group_norm_relu_fwd(*args)[1]
        backward = getattr(torch.ops, name).group_norm_relu_bwd
        (grad,), *of_parameters = backward([arriving], statistics, *args, [True, True, True])
        results.append((y, y32, grad, *of_parameters))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9 if got.dtype == torch.float64 else 1e-4, atol=1e-5)


def test_one_tensor_for_one_tensor(backend: str, device: torch.device, generator: torch.Generator) -> None:
    maps, weight, bias = drawn(generator, device)
    got = gfl_ops.group_norm_relu(maps[0], 4, weight, bias, relu=False)
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got, F.group_norm(maps[0], 4, weight, bias))


def test_parameters_of_either_dtype(backend: str, device: torch.device, generator: torch.Generator) -> None:
    maps, weight, bias = drawn(generator, device, "nhwc", torch.bfloat16)
    for parameters in ((weight, bias), (weight.float(), bias.float()), (weight, bias.float())):
        leaves = [p.detach().requires_grad_() for p in parameters]
        results = gfl_ops.group_norm_relu(maps, 4, *leaves)
        want = theirs([m.float() for m in maps], 4, weight.float(), bias.float())
        for got, expected in zip(results, want):
            assert got.dtype == torch.bfloat16
            # A rounding to bfloat16; Triton's interpreter truncates.
            torch.testing.assert_close(got.float(), expected, rtol=2**-7, atol=1e-5)
        grads = torch.autograd.grad(sum(y.float().sum() for y in results), leaves)
        assert [g.dtype for g in grads] == [p.dtype for p in parameters]


def test_autocast_changes_nothing(backend: str, device: torch.device, generator: torch.Generator) -> None:
    maps, weight, bias = drawn(generator, device, dtype=torch.float32)
    want = gfl_ops.group_norm_relu(maps, 4, weight, bias)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = gfl_ops.group_norm_relu(maps, 4, weight, bias)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_backward_twice(backend: str, device: torch.device, generator: torch.Generator) -> None:
    maps, weight, bias = drawn(generator, device, dtype=torch.float32)
    leaves = [m.requires_grad_() for m in maps]
    loss = sum((y**2).sum() for y in gfl_ops.group_norm_relu(leaves, 4, weight, bias))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), first, rtol=0, atol=0)


def test_nothing_varies(backend: str, device: torch.device) -> None:
    """A group of equal values has no variance: what is left is the bias, and gradients stay finite."""
    maps = [torch.full((1, 4, h, w), 7.0, device=device, requires_grad=True) for h, w in SIZES]
    weight, bias = torch.ones(4, device=device), torch.tensor([1.0, -1.0, 2.0, 0.5], device=device)
    got = gfl_ops.group_norm_relu(maps, 2, weight, bias)
    for y in got:
        assert torch.equal(y, bias.relu().view(1, 4, 1, 1).expand_as(y))
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum((y**2).sum() for y in got), maps))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_in_its_group(backend: str, device: torch.device, layout: str, generator: torch.Generator) -> None:
    maps, weight, bias = drawn(generator, device, layout, torch.float32)
    want = gfl_ops.group_norm_relu(maps, 4, weight, bias)
    maps[0][1, 7, 2, 3] = float("nan")  # group 1 of 4, of 6 channels each
    got = gfl_ops.group_norm_relu(maps, 4, weight, bias)
    assert got[0][1, 6:12].isnan().all()
    got[0][1, 6:12] = want[0][1, 6:12]
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"inputs": []}, ValueError, "`inputs` must hold at least one level, got none"),
        ({"inputs": 3}, TypeError, "`inputs` must be a list of tensors, got int"),
        ({"inputs": [torch.ones(2, 4, 3)]}, ValueError, r"`inputs` must have shape \[B, channels, H, W\]"),
        (
            {"inputs": [torch.ones(1, 4, 2, 2), torch.ones(1, 4, 1, 1).half()]},
            TypeError,
            "`inputs` must be of one dtype",
        ),
        ({"num_groups": 3}, ValueError, "`num_groups` must divide the 4 channels, got 3"),
        ({"num_groups": 2.0}, TypeError, "`num_groups` must be an integer, got float"),
        ({"weight": torch.ones(3)}, ValueError, r"`weight` must have shape \[C\] = \[4\], got \[3\]"),
        ({"bias": None}, TypeError, "`bias` must be a tensor, got NoneType"),
        ({"eps": -1.0}, ValueError, "`eps` must be >= 0, got -1.0"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors_name_the_argument(change: dict, error: type[Exception], text: str) -> None:
    arguments = {
        "inputs": [torch.ones(1, 4, 2, 2)],
        "num_groups": 2,
        "weight": torch.ones(4),
        "bias": torch.ones(4),
    } | change
    with pytest.raises(error, match=f"gfl_ops.group_norm_relu: {text}"):
        gfl_ops.group_norm_relu(**arguments)
