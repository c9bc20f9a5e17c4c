# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as compiled PTX: the samples of every operator, and what an interpreter can't show."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

on_ptx = pytest.importorskip("on_ptx", reason="needs the plugin and the engine: see tests/ptx/on_ptx.py")

import triton  # noqa: E402

from gfl_ops.core import backends, conformance  # noqa: E402
from gfl_ops.core.dtypes import accumulator  # noqa: E402
from gfl_ops.core.random_inputs import normal, uniform  # noqa: E402
from gfl_ops.core.registry import SPECS, OpSpec, Sample  # noqa: E402
from gfl_ops.ops.score.score_loss import SUMMED  # noqa: E402
from gfl_ops.triton import bins, group_norm, launch, nms, score  # noqa: E402

CPU = torch.device("cpu")
STEMS = [stem for stem in SPECS if backends.kernels(stem).triton]
MODULES = (bins, group_norm, nms, score)
every_operator = pytest.mark.parametrize("spec", [SPECS[stem] for stem in STEMS], ids=lambda s: s.stem)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)


def drawn(spec: OpSpec, dtype: torch.dtype, seed: int) -> list[Sample]:
    return list(spec.samples(CPU, dtype, torch.Generator().manual_seed(seed))) if dtype in spec.dtypes else []


def agrees(spec: OpSpec, sample: Sample, seed: int) -> None:
    function = conformance.operator(spec, "triton")
    conformance.check_forward(spec, function, sample)
    if spec.differentiable:
        conformance.check_gradient(spec, function, sample, seed)


def elements(sample: Sample) -> int:
    return sum(t.numel() for t in conformance.tensors(list(sample.args)))


def share(things: Sequence[Any], turn: int = 0, parts: int = 2) -> Sequence[Any]:
    """Every second one, or one of `parts`: compiling takes the time, so each generation of GPUs takes other ones."""
    return things[(on_ptx.STATE.arch // 10 + turn) % parts :: parts] or things[:1]


def launched(spec: OpSpec, sample: Sample) -> list[launch.Launch]:
    """What forward and backward of a sample would launch."""
    function = conformance.operator(spec, "triton")
    with launch.record() as launches:
        result = function(*sample.args)
        if spec.differentiable:
            # What a recorded launch leaves is garbage, but backward asks for its shapes alone.
            grads = tuple(torch.ones_like(t) for t in conformance.differentiated(spec, result))
            conformance.gradients(spec, function, sample.args, grads)
    return launches


@every_operator
def test_every_kernel_agrees_with_the_oracle(spec: OpSpec, seed: int) -> None:
    """On as few samples as reach all kernels of an operator, small ones first."""
    on_ptx.STATE.lib.poh_set_seed(seed)
    (dtype,) = share([torch.float32, torch.bfloat16])
    reached: set[str] = set()
    for sample in sorted(drawn(spec, dtype, seed), key=elements):
        kernels = {made.kernel.__name__ for made in launched(spec, sample)}
        if kernels - reached:
            agrees(spec, sample, seed)
            reached |= kernels
    assert reached


def test_nms_in_panels(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As beyond 4096 boxes of a class, with panels of two tiles."""
    monkeypatch.setattr(nms, "CHAIN", 100)
    monkeypatch.setattr(nms, "PANEL", 128)
    for sample in drawn(SPECS["nms"], torch.float32, seed):
        if sample.id in ("one-class-n500", "classes-n500"):
            agrees(SPECS["nms"], sample, seed)


@pytest.mark.slow
@every_dtype
@every_operator
def test_the_samples_agree_with_the_oracle(spec: OpSpec, dtype: torch.dtype, seed: int) -> None:
    on_ptx.STATE.lib.poh_set_seed(seed)
    # A quarter of the samples, from a drawn one on: several runs take all of them.
    for sample in share(drawn(spec, dtype, seed), list(DTYPES).index(dtype) + seed, 4):
        agrees(spec, sample, seed)


# --- addresses -------------------------------------------------------------------------------------------------------


def one_element_on(t: Any) -> Any:
    """The same tensor, one element into its storage: aligned to an element alone."""
    if not isinstance(t, Tensor) or t.numel() == 0:
        return t
    # All that the elements span, since those of an expanded tensor lie at one place.
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
    room = torch.cat([t.new_empty(1), t.as_strided((span,), (1,))])
    return room.as_strided(t.shape, t.stride(), 1)


@every_operator
def test_tensors_at_odd_addresses(spec: OpSpec, seed: int) -> None:
    (dtype,) = share([torch.float32, torch.bfloat16])
    sample = max(drawn(spec, dtype, seed), key=elements)
    agrees(spec, Sample(sample.id, tree_map(one_element_on, sample.args)), seed)


@every_operator
def test_rows_beyond_32_bits(spec: OpSpec, seed: int) -> None:
    """Offsets into a tensor of which most is never touched, and so takes no memory."""
    samples = [s for s in drawn(spec, torch.bfloat16, seed) if isinstance(s.args[0], Tensor) and s.args[0].dim() == 2]
    samples = [s for s in samples if 4 <= len(s.args[0]) <= 16 and s.args[0].shape[1] > 1]
    if not samples:
        pytest.skip(f"{spec.stem} has no sample of a few rows")
    pred, *others = samples[0].args
    step = 2**31 // (len(pred) - 1) + 8
    far = torch.empty(len(pred) * step, dtype=pred.dtype).as_strided(pred.shape, (step, 1)).copy_(pred)
    got = conformance.operator(spec, "triton")(far, *others)
    want = conformance.operator(spec, "triton")(pred.contiguous(), *others)
    for g, w in zip(conformance.tensors(got), conformance.tensors(want), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)  # wider loads add up in another order


# --- losses of class scores down to one number ------------------------------------------------------------------------


@pytest.mark.parametrize("stem", SUMMED)
def test_a_stored_gradient_has_the_bits_of_one_computed_again(stem: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    (dtype,) = share([torch.bfloat16, torch.float32])
    acc = accumulator(dtype)
    samples = [s for s in drawn(SPECS[stem], dtype, seed) if s.args[0].dim() == 2 and s.args[0].numel()]
    for sample in sorted(samples, key=lambda s: zlib.crc32(f"{seed}{s.id}".encode()))[:2]:
        pred, label, target, params, activated = sample.args
        weight = uniform((len(pred),), CPU, acc, draw)
        arguments = (label, target, weight, torch.tensor(3.7, dtype=acc), 0.1, stem, params, activated)
        loss, stored = score.score_loss_forward(pred, *arguments, True)
        assert torch.equal(loss, score.score_loss_forward(pred, *arguments, False)[0])
        for arriving in (torch.tensor(1.0, dtype=acc), torch.tensor(2.5, dtype=acc)):
            finished = stored.clone(memory_format=torch.preserve_format)
            score.score_loss_finish(finished, arriving, pred, *arguments)
            again = score.score_loss_backward(arriving, pred, *arguments)
            assert torch.equal(finished.nan_to_num(), again.nan_to_num()), f"{sample.id}, {arriving} arrives"


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "dense"])
def test_scores_of_several_images(labelled: bool, seed: int) -> None:
    """Of [B, C, P]: each image by its own labels and scores."""
    draw = torch.Generator().manual_seed(seed)
    pred = normal((3, 5, 7), CPU, torch.float32, draw)
    label = torch.randint(-1, 6, (3, 7), generator=draw) if labelled else None
    target, weight = (uniform(shape, CPU, torch.float32, draw) for shape in ((3, 7) if labelled else (3, 5, 7), (3, 7)))
    constants = (None, 1.0, "qfl", [2.0], False, True)
    got, gradient = score.score_loss_forward(pred, label, target, weight, *constants)

    def rows(t: Tensor) -> Tensor:
        return t.transpose(1, 2).reshape(-1, 5)

    flat = (label.flatten(), target.flatten()) if label is not None else (None, rows(target))
    want, want_gradient = score.score_loss_forward(rows(pred), *flat, weight.flatten(), *constants)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(rows(gradient), want_gradient)


# --- arguments that Triton treats apart -------------------------------------------------------------------------------


def launches_of(spec: OpSpec, dtype: torch.dtype, seed: int) -> list[launch.Launch]:
    """One launch for each kernel and set of flags that the samples need."""
    found: dict[Any, launch.Launch] = {}
    for sample in drawn(spec, dtype, seed):
        for made in launched(spec, sample):
            flags = tuple((name, value) for name, value in made.constants.items() if isinstance(value, bool))
            found.setdefault((made.kernel.__name__, flags), made)
    return list(found.values())


@every_operator
def test_kernels_compile_where_every_size_is_one(spec: OpSpec, seed: int) -> None:
    """Triton makes a Python int of an integer argument that is 1, and a number has no `.to`."""
    for made in launches_of(spec, torch.float32, seed):
        args = [1 if isinstance(value, int) else value for value in made.args]
        made.kernel.warmup(*args, grid=(1,), **made.constants)


@every_operator
def test_no_argument_is_a_float(spec: OpSpec, seed: int) -> None:
    """It would be fp32 in fp64 too. The factor of a reduced loss comes as two that add up to it."""
    for made in launches_of(spec, torch.float64, seed):
        for name, value in zip(made.kernel.arg_names, made.args):
            assert not isinstance(value, float) or name in ("factor_high", "factor_low"), f"{made.kernel}: {name}"


def test_a_sum_of_products_is_not_fused(seed: int) -> None:
    """Lanes that add up a row by exchanging what they hold would each fuse their own product, to different bits."""
    state, before = on_ptx.STATE, set(on_ptx.STATE.functions)
    pred = normal((70, 4 * 23), CPU, torch.float32, torch.Generator().manual_seed(seed))
    conformance.operator(SPECS["integral"], "triton")(pred, 22)
    (key,) = set(state.functions) - before
    assert b"fma" not in state.functions[key].text


def test_group_norm_in_fp64_keeps_a_small_eps(seed: int) -> None:
    """A float argument would be fp32: 1e-5 would be off by 2.5e-8 of its value, where eps is all of the variance."""
    x = normal((1, 4, 3, 3), CPU, torch.float64, torch.Generator().manual_seed(seed)) * 1e-9
    args = ([x], torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 2, 1e-5, False)
    got, want = torch.ops.gfl_triton.group_norm_relu_fwd(*args)[0][0], SPECS["group_norm_relu"].reference(*args)[0][0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


# --- the whole --------------------------------------------------------------------------------------------------------


def test_every_kernel_of_the_package_ran(request: pytest.FixtureRequest) -> None:
    if request.config.option.keyword or request.config.option.ptx_half or "::" in "".join(request.config.args):
        pytest.skip("part of the tests runs")
    kernels = {
        name for m in MODULES for name, k in vars(m).items() if isinstance(k, triton.JITFunction) and "_kernel" in name
    }
    assert kernels == {key.split("#")[0] for key in on_ptx.STATE.launches} & kernels


# --- planted faults ---------------------------------------------------------------------------------------------------


def faults(text: str) -> list[tuple[int, str]]:
    """(line, what stands there instead): a barrier left out, a 16-byte access moved by 4 bytes."""
    found = []
    for i, line in enumerate(text.splitlines()):
        if re.match(r"\s*bar\.sync", line):
            found.append((i, ""))
        elif re.search(r"\b(ld|st)\.global\S*\.v(4\.b32|2\.b64)\b", line):
            moved = re.sub(r"\[ (%\w+) \+ (\d+) \]", lambda m: f"[ {m[1]} + {int(m[2]) + 4} ]", line)
            found.append((i, moved))
    return found


def planted(seed: int) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    pred, label = normal((70, 80), CPU, torch.bfloat16, draw, 3.0), torch.randint(-1, 81, (70,), generator=draw)
    quality, rows = uniform((70,), CPU, torch.float32, draw), normal((70, 17), CPU, torch.float32, draw)
    position, sides = uniform((70,), CPU, torch.float32, draw, 0, 16), normal((9, 68), CPU, torch.float32, draw)
    calls = {
        "qfl": (pred, label, quality, [2.0], False),
        "dfl": (rows, position, False),
        "decode": (sides, uniform((9, 2), CPU, torch.float32, draw), torch.ones(9), 16, None),
    }
    return {
        stem: (functools.partial(conformance.operator(SPECS[stem], "triton"), *args), SPECS[stem].reference(*args))
        for stem, args in calls.items()
    }


@pytest.mark.parametrize("stem", ["qfl", "dfl", "decode"])
def test_a_planted_fault_is_noticed(stem: str, seed: int) -> None:
    state = on_ptx.STATE
    call, want = planted(seed)[stem]

    def outcome() -> str:
        before = len(state.warnings)
        try:
            got = call()
        except RuntimeError as error:
            return str(error)
        said = state.warnings[before:]
        del state.warnings[before:]
        if said:
            return said[0]
        return "" if torch.allclose(got, want, rtol=1e-4, atol=1e-4) else "a wrong result"

    launches = dict(state.launches)
    assert outcome() == ""
    (function,) = [state.functions[key] for key in state.launches if state.launches[key] != launches.get(key)]
    lines, sound = function.text.decode().splitlines(), function.module
    noticed: dict[bool, list[bool]] = {True: [], False: []}  # by whether a barrier is left out
    try:
        for i, instead in faults(function.text.decode()):
            text = "\n".join([*lines[:i], instead, *lines[i + 1 :]])
            function.module = state.lib.poh_load(text.encode())
            state.lib.poh_set_seed(i)
            noticed[not instead].append(bool(outcome()))
    finally:
        function.module = sound
    assert all(noticed[False]) and noticed[False] + noticed[True]
    # Triton's last barriers order nothing that follows.
    assert sum(noticed[True]) * 2 >= len(noticed[True])
