# SPDX-License-Identifier: Apache-2.0
"""What holds for every operator of the registry, on every backend, device and dtype that can run it."""

from __future__ import annotations

import functools
import importlib
import inspect
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import contract
import pytest
import torch
from contract import Rung, outputs, tensors
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends, conformance
from gfl_ops.core.random_inputs import normal
from gfl_ops.core.registry import SPECS, OpSpec, Sample

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def rung(spec: OpSpec, backend: str, device: str) -> Rung:
    if backend != "reference":
        return Rung(spec, backend, device, contract.NAMESPACES[backend])
    # What `gfl::` computes by where no kernel is compiled, which here one may be.
    return replace(_by_reference(spec.stem), device=device)


@functools.cache
def _by_reference(stem: str) -> Rung:
    return contract.by_reference(SPECS[stem], "cpu", "gfl_contract")


# An operator, a backend and a device that can run it; why others can't, the doctor says.
RUNGS = [
    rung(spec, backend, device)
    for spec in SPECS.values()
    for backend in ("native", "triton", "reference")
    for device in DEVICES
    if backends.unavailable(backend, spec.stem, device) is None
]
every_rung = pytest.mark.parametrize("rung", RUNGS, ids=str)
differentiable_rungs = pytest.mark.parametrize("rung", [r for r in RUNGS if r.spec.differentiable], ids=str)


def with_dtypes(rungs: list[Rung]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("rung", "dtype"),
        [pytest.param(r, dtype, id=f"{r}-{DTYPE_NAMES[dtype]}") for r in rungs for dtype in r.spec.dtypes],
    )


@with_dtypes(RUNGS)
def test_forward_agrees_with_the_oracle(rung: Rung, dtype: torch.dtype, seed: int) -> None:
    for sample in rung.samples(dtype, seed):
        conformance.check_forward(rung.spec, rung.forward, sample)


@with_dtypes([r for r in RUNGS if r.spec.differentiable])
def test_gradient_agrees_with_the_oracle(rung: Rung, dtype: torch.dtype, seed: int) -> None:
    for sample in rung.samples(dtype, seed):
        conformance.check_gradient(rung.spec, rung.forward, sample, seed)


@with_dtypes(RUNGS)
def test_the_fake_foresees_the_results(rung: Rung, dtype: torch.dtype, seed: int) -> None:
    for sample in rung.samples(dtype, seed):
        contract.check_fake(rung, sample)


@every_rung
def test_it_changes_and_returns_no_argument(rung: Rung, seed: int) -> None:
    for sample in rung.samples(rung.spec.dtypes[0], seed):
        contract.check_functional(rung, sample)


@every_rung
def test_opcheck(rung: Rung, seed: int) -> None:
    contract.check_opcheck(rung, seed)


@differentiable_rungs
def test_gradcheck(rung: Rung, seed: int) -> None:
    if torch.float64 not in rung.spec.dtypes:
        pytest.skip(f"{rung.spec.stem} does not take fp64")
    contract.check_gradcheck(rung, seed)


@differentiable_rungs
def test_a_second_derivative_is_refused(rung: Rung, seed: int) -> None:
    args, leaves = contract.leaves_of(rung.spec, rung.full_samples(seed)[0].args)
    result = contract.differentiated(rung.spec, rung.forward(*args))[0]
    first = torch.autograd.grad(result.sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Memory that nobody has written is NaN, so that none can pass for a result."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)


@every_rung
def test_strides_are_of_no_account(rung: Rung, seed: int, uninitialised_is_nan: None) -> None:
    samples = rung.full_samples(seed)
    # A norm over one channel that is expanded over its map has no variance: its gradient is rounding, times 316.
    varied = [s for s in samples if not s.id.startswith("a-channel-a-group")]
    for i, layout in enumerate(contract.LAYOUTS):
        fit = varied if layout.startswith("expanded") else samples
        contract.check_layouts(rung, fit[(seed + 7 * i) % len(fit)], layout, seed)


@differentiable_rungs
def test_transforms_of_functions(rung: Rung, seed: int) -> None:
    """jvp, forward_ad, vjp, grad, jacrev, vmap, and batches of gradients over a recorded graph."""
    for sample in contract.small_samples(rung, seed):
        contract.check_transforms(rung, sample, seed)


@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.differentiable], ids=lambda s: s.stem)
def test_the_reference_has_second_derivatives(spec: OpSpec, seed: int) -> None:
    """As the message of the refusal promises; against numerical differences of the first ones."""
    samples = contract.smooth_samples(rung(spec, "reference", "cpu"), seed)
    for sample in samples[:3]:
        call, leaves = contract.of_leaves(spec, spec.reference, sample.args)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True, check_batched_grad=False), sample.id
    assert samples or torch.float64 not in spec.dtypes


@every_rung
def test_it_repeats_itself_bit_for_bit(rung: Rung, seed: int) -> None:
    for sample in rung.samples(torch.float32, seed):
        contract.check_repeats(rung, sample)


@every_rung
def test_it_compiles_into_one_graph(rung: Rung, seed: int) -> None:
    """The operator, and the call by the backend that is set."""
    samples = rung.full_samples(seed)
    contract.check_compiles(lambda *args: rung.forward(*args), samples)
    with gfl_ops.set_backend(rung.backend):
        contract.check_compiles(lambda *args: rung.spec(rung.device, *args), samples)


@differentiable_rungs
def test_gradients_that_are_not_wanted_are_not_computed(rung: Rung, seed: int) -> None:
    contract.check_needs(rung, rung.full_samples(seed)[0])


@pytest.mark.parametrize("rung", [r for r in RUNGS if r.backend == "native"], ids=str)
def test_the_compiled_entry_point_is_the_operator(rung: Rung, seed: int) -> None:
    module, spec = importlib.import_module("gfl_ops._C"), rung.spec
    for sample in rung.samples(torch.float32, seed):
        pairs = [(f"{spec.stem}_forward", rung.forward, sample.args)]
        if spec.differentiable:
            given = contract.backward_arguments(spec, sample.args, lambda t: torch.full_like(t, 0.5))
            needs = [True] * len(spec.differentiable)
            pairs.append((f"{spec.stem}_backward", rung.backward, (*given, needs)))
        for name, operator, args in pairs:
            got, want = tensors(outputs(getattr(module, name)(*args))), tensors(outputs(operator(*args)))
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda s: s.stem)
def test_the_spec_is_complete(spec: OpSpec) -> None:
    assert spec.summary and not spec.summary.endswith(".")
    for name in spec.public:
        function = getattr(gfl_ops, name)
        assert name in gfl_ops.__all__
        for heading in ("Args:", "Returns:", "Raises:"):
            assert heading in (function.__doc__ or ""), f"{name} has no {heading!r} in its docstring"


@pytest.mark.parametrize("name", sorted({name for spec in SPECS.values() for name in spec.public}))
def test_an_error_names_function_and_argument(name: str) -> None:
    function = getattr(gfl_ops, name)
    parameters = inspect.signature(function).parameters.values()
    wrong = {p.name: object() for p in parameters if p.default is p.empty}
    with pytest.raises((TypeError, ValueError), match=r"^gfl_ops\.\w+: `\w+` must .*, got "):
        function(**wrong)


@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.triton is not None], ids=lambda s: s.stem)
def test_its_triton_functions_exist(spec: OpSpec) -> None:
    pytest.importorskip("triton")
    module = importlib.import_module(f"gfl_ops.triton.{spec.triton}")
    for direction in ("forward", "backward") if spec.differentiable else ("forward",):
        assert callable(getattr(module, f"{spec.stem}_{direction}", None)), direction


def test_samples_are_fresh_but_repeatable() -> None:
    def fingerprint(seed: int) -> int:
        sample = rung(SPECS["qfl"], "reference", "cpu").samples(torch.float32, seed)[-2]
        return zlib.crc32(sample.args[0].numpy().tobytes())

    assert fingerprint(1) == fingerprint(1) != fingerprint(2)


# --- The checks themselves: planted faults ---------------------------------------------------------------------


def test_a_wrong_kernel_is_caught(seed: int) -> None:
    """A relative error of 1e-4 in one element of loss or gradient does not pass."""
    spec = SPECS["qfl"]
    samples = rung(spec, "reference", "cpu").samples(torch.float32, seed)
    sample = next(s for s in samples if s.id == "sparse-n129-c80")

    def wrong_value(*args: Any) -> Tensor:
        factor = torch.ones(args[0].shape[0])
        factor[17] += 1e-4
        return spec.reference(*args) * factor  # type: ignore[no-any-return]

    def wrong_gradient(*args: Any) -> Tensor:
        pred = args[0]
        return spec.reference(*args) + 1e-3 * (pred - pred.detach())[:, 3]  # type: ignore[no-any-return]

    with pytest.raises(AssertionError, match="1 of 129 wrong"):
        conformance.check_forward(spec, wrong_value, sample)
    conformance.check_forward(spec, wrong_gradient, sample)
    with pytest.raises(AssertionError, match="gradient 0"):
        conformance.check_gradient(spec, wrong_gradient, sample, seed)


def _toy_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for n in (1, 7):
        yield Sample(f"n{n}", (normal((n, 3), device, dtype, generator), normal((n, 3), device, dtype, generator), 2.0))


def _toy_reference(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return (x * x * y * factor).t().contiguous()


TOY = OpSpec(
    stem="toy",
    schema="(Tensor x, Tensor y, float factor) -> Tensor",
    reference=_toy_reference,
    fake=lambda x, y, factor: x.new_empty((3, x.shape[0])),
    samples=_toy_samples,
    summary="A product, for the tests of the tests",
    public=(),
    differentiable=("x", "y"),
)


def check_all(rung: Rung, seed: int) -> None:
    """What an operator in plain PyTorch must hold."""
    for dtype in rung.spec.dtypes:
        for sample in rung.samples(dtype, seed):
            conformance.check_forward(rung.spec, rung.forward, sample)
            conformance.check_gradient(rung.spec, rung.forward, sample, seed)
            contract.check_fake(rung, sample)
            contract.check_functional(rung, sample)
            contract.check_repeats(rung, sample)
    contract.check_needs(rung, rung.full_samples(seed)[0])
    contract.check_gradcheck(rung, seed)
    contract.check_opcheck(rung, seed)
    contract.check_compiles(lambda *args: rung.forward(*args), rung.full_samples(seed))


def _wrong_gradient(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return _toy_reference(x + 0.01 * (x - x.detach()), y, factor)


def _one_gradient(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return _toy_reference(x, y.detach(), factor)


def _own_dtype(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return _toy_reference(x, y, factor).float()


def _in_place(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return _toy_reference(x.detach().mul_(1.5), y, factor) * 0 + _toy_reference(x, y, factor)


def _unrepeatable(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return _toy_reference(x, y, factor) + 1e-7 * torch.rand(3, len(x), dtype=x.dtype, device=x.device)


FAULTS: dict[str, tuple[dict[str, Callable[..., Any]], str]] = {
    "fake shape": ({"fake": lambda x, y, factor: x.new_empty((x.shape[0], 3))}, "fake result 0"),
    "fake rank": ({"fake": lambda x, y, factor: x.new_empty((3,))}, "fake result 0"),
    "fake dtype": ({"fake": lambda x, y, factor: x.new_empty((3, x.shape[0])).float()}, "fake result 0"),
    "fake strides": ({"fake": lambda x, y, factor: torch.empty_like(x).t()}, "fake result 0"),
    "fake device": ({"fake": lambda x, y, factor: x.new_empty((3, x.shape[0]), device="meta")}, "fake result 0"),
    "gradient": ({"reference": _wrong_gradient}, "Jacobian mismatch"),
    "gradient of one input": ({"reference": _one_gradient}, "Jacobian mismatch"),
    "dtype": ({"reference": _own_dtype}, "fake result 0"),
    "a view of its input": (
        {"reference": lambda x, y, factor: x.t(), "fake": lambda x, y, factor: x.t()},
        "a result is an argument",
    ),
    "in place": ({"reference": _in_place}, "is changed|mutate|modified by an inplace"),
    "repeatability": ({"reference": _unrepeatable}, "^n[17]"),
}


def test_a_right_operator_passes(seed: int) -> None:
    check_all(contract.by_reference(TOY, "cpu", "gfl_toy"), seed)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, seed: int) -> None:
    changes, message = FAULTS[fault]
    planted = contract.by_reference(replace(TOY, **changes), "cpu", f"gfl_toy_{fault.replace(' ', '_')}")  # type: ignore[arg-type]
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_all(planted, seed)


def test_a_kernel_of_another_dtype_is_caught(seed: int) -> None:
    sample = next(_toy_samples(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(seed)))
    with pytest.raises(AssertionError, match=r"torch\.float64, expected torch\.float32"):
        conformance.check_forward(TOY, lambda *args: _toy_reference(*args).double(), sample)
