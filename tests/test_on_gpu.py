# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of training: capture in a CUDA graph, streams, devices, and that the host is never asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not CUDA, reason="there is no GPU that torch can use")
BACKENDS = ("native", "triton")

STRIDES, SIZES, CLASSES, REG_MAX, IMAGES, SLOTS = [8.0, 16.0, 32.0], [(16, 24), (8, 12), (4, 6)], 80, 16, 2, 6


def needs(backend: str, *stems: str) -> None:
    for stem in stems:
        if reason := backends.unavailable(backend, stem, "cuda"):
            pytest.skip(reason)


def fresh(generator: torch.Generator, device: str = "cuda", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Maps of a small head, boxes within them, and logits with labels for the single losses."""

    def maps(channels: int) -> list[Tensor]:
        return [torch.randn((IMAGES, channels, h, w), generator=generator).to(device, dtype) for h, w in SIZES]

    corner = torch.rand((IMAGES, SLOTS, 2), generator=generator) * 100
    size = torch.rand((IMAGES, SLOTS, 2), generator=generator) * 90 + 8
    n = 700
    return {
        "cls_scores": maps(CLASSES),
        "reg_preds": maps(4 * (REG_MAX + 1)),
        "gt_boxes": torch.cat([corner, corner + size], 2).to(device),
        "gt_labels": torch.randint(-1, CLASSES, (IMAGES, SLOTS), generator=generator).to(device),
        "pred": torch.randn((n, CLASSES), generator=generator).to(device, dtype),
        "label": torch.randint(0, CLASSES + 20, (n,), generator=generator).to(device),
        "score": torch.rand(n, generator=generator).to(device),
        "factor": (torch.rand((), generator=generator) * 50 + 1).to(device),
    }


def head_step(given: dict[str, Any]) -> list[Tensor]:
    """Assignment, whole loss, backward: losses and gradients."""
    leaves = [m.detach().requires_grad_() for m in (*given["cls_scores"], *given["reg_preds"])]
    levels = len(SIZES)
    assignment = gfl_ops.atss_assign(SIZES, STRIDES, given["gt_boxes"], given["gt_labels"])
    losses = gfl_ops.gfl_loss(leaves[:levels], leaves[levels:], STRIDES, assignment, given["gt_boxes"], reg_max=REG_MAX)
    gradients = torch.autograd.grad(losses.cls + losses.box + losses.dfl, leaves)
    return [*(v.detach() for v in losses), *gradients]


def quality_step(given: dict[str, Any], times: float = 1.0) -> list[Tensor]:
    pred = given["pred"].detach().requires_grad_()
    loss = times * gfl_ops.quality_focal_loss(pred, (given["label"], given["score"]), avg_factor=given["factor"])
    return [loss.detach(), torch.autograd.grad(loss, pred)[0]]


def doubled_step(given: dict[str, Any]) -> list[Tensor]:
    """What arrives is 2, so that the gradient is computed anew, in the graph as well."""
    return quality_step(given, 2.0)


STEPS = {
    "head": (head_step, ("atss", "gfl_loss")),
    "qfl": (quality_step, ("qfl",)),
    "qfl-twice": (doubled_step, ("qfl",)),
}
Step = Callable[[dict[str, Any]], list[Tensor]]


@pytest.fixture(params=[(b, s) for b in BACKENDS for s in STEPS], ids=lambda p: f"{p[0]}-{p[1]}")
def step(request: pytest.FixtureRequest) -> Iterator[Step]:
    backend, name = request.param
    function, stems = STEPS[name]
    needs(backend, *stems)
    with gfl_ops.set_backend(backend):
        yield function


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """Bit for bit: every backend repeats itself."""
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(g, w, rtol=0, atol=0, msg=lambda m, i=i: f"result {i}: {m}")


def tensors(given: dict[str, Any]) -> list[Tensor]:
    return [t for v in given.values() for t in (v if isinstance(v, list) else [v])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_a_captured_step_is_replayed_with_new_inputs_on_cuda(
    step: Step, dtype: torch.dtype, generator: torch.Generator
) -> None:
    given = fresh(generator, dtype=dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(given)
    for _ in range(3):
        other = fresh(generator, dtype=dtype)
        for to, new in zip(tensors(given), tensors(other)):
            to.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, step(other))


def test_the_host_is_never_asked_on_cuda(step: Step, generator: torch.Generator) -> None:
    given = fresh(generator)
    step(given)  # compiles, and fills the allocator
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_side_stream_on_cuda(step: Step, generator: torch.Generator) -> None:
    """Work in front of the step on its stream is waited for: a kernel on another stream would read too early."""
    given, before = fresh(generator), fresh(generator)
    want = step(given)
    late = {k: [t.clone() for t in v] if isinstance(v, list) else v.clone() for k, v in before.items()}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for to, new in zip(tensors(late), tensors(given)):
            to.copy_(new)
        got = step(late)
    side.synchronize()
    assert_same(got, want)


def test_a_second_device_on_cuda(step: Step, generator: torch.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is no second GPU")
    given = fresh(generator)
    want = step(given)
    other = {k: [t.to("cuda:1") for t in v] if isinstance(v, list) else v.to("cuda:1") for k, v in given.items()}
    got = step(other)
    assert all(g.device == torch.device("cuda:1") for g in got) and torch.cuda.current_device() == 0
    assert_same([g.to("cuda:0") for g in got], want)


@pytest.mark.parametrize("which", ["head", "qfl"])
def test_reduce_overhead_on_cuda(which: str, generator: torch.Generator) -> None:
    """Inductor's own CUDA graphs: replayed with new inputs, forward and backward."""
    needs("native", *STEPS[which][1])

    def head(maps: list[Tensor], given: dict[str, Any]) -> Tensor:
        assignment = gfl_ops.atss_assign(SIZES, STRIDES, given["gt_boxes"], given["gt_labels"])
        levels = len(SIZES)
        losses = gfl_ops.gfl_loss(maps[:levels], maps[levels:], STRIDES, assignment, given["gt_boxes"], reg_max=REG_MAX)
        return losses.cls + losses.box + losses.dfl

    def quality(maps: list[Tensor], given: dict[str, Any]) -> Tensor:
        return gfl_ops.quality_focal_loss(maps[0], (given["label"], given["score"]), avg_factor=given["factor"])

    function = head if which == "head" else quality
    torch._dynamo.reset()
    with gfl_ops.set_backend("native"):
        compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            given = fresh(generator)
            source = [given["pred"]] if which == "qfl" else [*given["cls_scores"], *given["reg_preds"]]
            results = []
            for call in (compiled, function):
                leaves = [t.detach().clone().requires_grad_() for t in source]
                torch.compiler.cudagraph_mark_step_begin()
                loss = call(leaves, given)
                loss.backward()
                results.append([loss.detach().clone(), *(t.grad.clone() for t in leaves)])
            for got, want in zip(*results):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_stored_once_on_cuda(generator: torch.Generator) -> None:
    """Beside the logits there is one tensor of their size, the gradient: neither losses nor a copy are another."""
    needs("native", "qfl")
    rows = 1 << 16
    pred = torch.randn((rows, CLASSES), generator=generator).cuda().requires_grad_()
    label, score = torch.full((rows,), CLASSES).cuda(), torch.zeros(rows).cuda()
    with gfl_ops.set_backend("native"):
        gfl_ops.quality_focal_loss(pred, (label, score), avg_factor=9.0).backward()
        pred.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        gfl_ops.quality_focal_loss(pred, (label, score), avg_factor=9.0).backward()
        peak = torch.cuda.max_memory_allocated() - held
    one = pred.numel() * pred.element_size()
    assert one <= peak < 1.1 * one
