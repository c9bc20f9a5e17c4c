# SPDX-License-Identifier: Apache-2.0
"""What the losses of class scores share: their operators, the reduction in the kernel, and the public call.

A loss is a file beside this one. It gives `score_spec` its term in plain PyTorch, element by element against a dense
target, and calls `row_loss` or `element_loss` from its public function. The operators `gfl::score_loss_*` compute any
of them down to one number, with the gradient from the same pass; see core/grad_in_forward.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import backends, checks, extension
from ...core.dtypes import accumulator, as_dtype, device_type
from ...core.grad_in_forward import GradInForward, Grads, Inputs, Kernels, is_plain, wants_grad
from ...core.random_inputs import normal, uniform
from ...core.reduction import AVG_FACTOR_EPS, check_reduction, factor_and_norm, reduce_loss
from ...core.registry import SPECS, OnePass, OpSpec, Sample, Samples, define, register, triton_kernel

Target = Tensor | tuple[Tensor, Tensor] | list[Tensor]

# Whether each loss, by its stem, is summed over the classes; else it is one of elements.
SUMMED: dict[str, bool] = {}

# --- operators -------------------------------------------------------------------------------------------


def score_spec(
    stem: str,
    term: Callable[..., Tensor],
    samples: Samples,
    summary: str,
    public: str,
    *,
    summed: bool,
) -> OpSpec:
    """Register a loss.

    Args:
        stem: its name in every folder.
        term: (pred, dense target, *params, activated) -> the loss of each element, in plain PyTorch with gradients;
            pred and target come in the accumulator's dtype.
        samples, summary: as `OpSpec` has them; `row_samples` and `element_samples` draw tensors for the first.
        public: name of the public function.
        summed: the loss is summed over the classes, and may have its targets as labels and scores.
    """

    def reference(
        pred: Tensor, label: Tensor | None, target: Tensor, params: Sequence[float], activated: bool
    ) -> Tensor:
        if label is not None:
            classes = torch.arange(pred.shape[1], device=pred.device)
            target = torch.where(label[:, None] == classes, target[:, None], 0.0)
        loss = term(pred.to(accumulator(pred.dtype)), target, *params, activated)
        return loss.sum(1) if summed else loss.contiguous()

    def fake(pred: Tensor, *others: Any) -> Tensor:
        return pred.new_empty(pred.shape[:1] if summed else pred.shape, dtype=accumulator(pred.dtype))

    def large(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
        # More tiles than there are blocks where a stored gradient is finished; rows of 16 bytes.
        n, c = 131_077, 4
        pred, score = normal((n, c), device, dtype, generator, 3.0), uniform((n, c), device, torch.float32, generator)
        params = next(samples(device, dtype, generator)).args[3]
        label = torch.randint(-1, c, (n,), generator=generator).to(device)
        target = score[:, 0] if summed else score * (score < 0.2)
        yield Sample(f"n{n}-c{c}", (pred, label if summed else None, target.to(accumulator(dtype)), params, False))

    def one_pass(*arguments: Any) -> Tensor:
        return _reduce(SPECS[stem], arguments, None, "sum", None)

    SUMMED[stem] = summed
    return register(
        OpSpec(
            stem=stem,
            schema="(Tensor pred, Tensor? label, Tensor target, float[] params, bool activated) -> Tensor",
            reference=reference,
            fake=fake,
            samples=samples,
            large=large,
            one_pass=OnePass(one_pass, ("pred",), summed=True),
            summary=summary,
            public=(public,),
            differentiable=("pred", "target"),
            triton="score",
        )
    )


_INPUT = (
    "Tensor pred, Tensor? label, Tensor target, Tensor? weight, Tensor? norm, float factor, str loss, float[] params,"
    " bool activated"
)


def _fake_forward(pred: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    loss = pred.new_empty((), dtype=accumulator(pred.dtype))
    return loss, torch.empty_like(pred) if others[-1] else pred.new_empty((0,))


def _fake_backward(grad_loss: Tensor, pred: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(pred)


def _second(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "the loss has no second derivative in this backend; gfl_ops.set_backend('reference') has one"
    )


def _define(namespace: str, kernel: Callable[[str], Any] | None) -> Kernels:
    """Define the three operators. `kernel` gives the function for a direction; by default the extension has it."""
    for direction, suffix, schema, fake in (
        ("forward", "fwd", f"({_INPUT}, bool store) -> (Tensor loss, Tensor grad)", _fake_forward),
        ("backward", "bwd", f"(Tensor grad_loss, {_INPUT}) -> Tensor", _fake_backward),
        ("finish", "finish", f"(Tensor(a!) grad, Tensor grad_loss, {_INPUT}) -> ()", lambda *arguments: None),
    ):
        define(f"score_loss_{suffix}", schema, fake, namespace, kernel(direction) if kernel else None)
    torch.library.register_autograd(f"{namespace}::score_loss_bwd", _second)
    operators = getattr(torch.ops, namespace)

    def forward(inputs: Inputs, constants: Any, store: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        loss, grad = operators.score_loss_fwd(*inputs, *constants, store)
        return (loss,), grad

    def finish(grad: Tensor, grads: Grads, inputs: Inputs, constants: Any) -> tuple[Tensor]:
        operators.score_loss_finish(grad, *grads, *inputs, *constants)
        return (grad,)

    def backward(grads: Grads, inputs: Inputs, constants: Any) -> tuple[Tensor]:
        return (operators.score_loss_bwd(*grads, *inputs, *constants),)

    return Kernels(forward, finish, backward, _reduced_reference)


def _reduced_reference(inputs: Inputs, constants: Any) -> tuple[Tensor]:
    """What the kernels of the reduced form compute, in plain torch."""
    pred, label, target, weight, norm = inputs
    factor, stem, params, activated = constants
    assert pred is not None and target is not None
    if pred.dim() == 3:
        pred, target = (t.transpose(1, 2).flatten(0, 1) for t in (pred, target))
    loss = SPECS[stem].reference(pred, label, target, params, activated)
    if weight is not None:
        loss = loss * weight.reshape(-1, *[1] * (loss.dim() - 1))
    total = loss.sum() * factor
    return (total if norm is None else total / (norm + AVG_FACTOR_EPS),)


_DEVICES = tuple(device for device in ("cpu", "cuda") if extension.serves("score_loss_fwd", device))
_TRITON = _define("gfl_triton", lambda direction: triton_kernel("score", f"score_loss_{direction}"))
_NATIVE = _define("gfl", None) if _DEVICES else None


# --- calls -----------------------------------------------------------------------------------------------


def row_loss(
    op: str,
    spec: OpSpec,
    params: Sequence[float],
    pred: Tensor,
    target: Target,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
    activated: bool,
) -> Tensor:
    """The loss of a public function `op` that is summed over the classes, with all checks but those of its params."""
    acc = accumulator(pred.dtype)
    activated = checks.flag(op, "activated", activated)
    if isinstance(target, (tuple, list)):
        checks.shape(op, "pred", pred, "[N, C]", (None, None))
        if len(target) != 2:
            rule = "must be (label, score) or one tensor"
            raise ValueError(checks.message(op, "target", rule, f"{len(target)} items"))
        label, score = target
        checks.tensor(op, "target[0]", label, checks.INTEGER)
        checks.tensor(op, "target[1]", score)
        rows = pred.shape[:1]
        for name, value in (("target[0]", label), ("target[1]", score)):
            checks.shape(op, name, value, "[N]", rows)
            checks.same_device(op, name, value, "pred", pred)
        avg_factor = check_reduction(op, rows, "[N]", pred, weight, reduction, avg_factor)
        arguments = (pred, as_dtype(label, torch.int64), as_dtype(score, acc), params, activated)
        return _reduce(spec, arguments, weight, reduction, avg_factor)

    if pred.dim() < 2:
        raise ValueError(checks.message(op, "pred", "must have shape [N, C, …]", list(pred.shape)))
    checks.tensor(op, "target", target)
    checks.shape(op, "target", target, "[N, C]" if pred.dim() == 2 else "[N, C, …]", tuple(pred.shape))
    checks.same_device(op, "target", target, "pred", pred)
    rows = pred.shape[:1] + pred.shape[2:]
    names = "[N]" if pred.dim() == 2 else "[N, …]"
    avg_factor = check_reduction(op, rows, names, pred, weight, reduction, avg_factor)
    if pred.numel() > 0:
        planes, targets = (pred, target) if pred.dim() == 2 else (pred.flatten(2), target.flatten(2))
        flat_weight = weight if weight is None or pred.dim() == 2 else weight.flatten(1)
        reduced = _reduced(
            spec, planes, None, as_dtype(targets, acc), params, activated, flat_weight, reduction, avg_factor
        )
        if reduced is not None:
            return reduced
    flat_pred, flat_target = (t.movedim(1, -1).reshape(rows.numel(), t.shape[1]) for t in (pred, target.to(acc)))
    loss = spec(device_type(pred), flat_pred, None, flat_target, params, activated).reshape(rows)
    return reduce_loss(loss, weight, reduction, avg_factor)


def check_element_target(op: str, names: tuple[str, str], pred: Tensor, target: Tensor) -> None:
    """Score and target of a loss of elements; `names` are what the caller calls them."""
    checks.tensor(op, names[0], pred)
    checks.tensor(op, names[1], target, checks.REAL)
    if target.shape != pred.shape:
        rule = f"must have the shape of `{names[0]}`, {list(pred.shape)}"
        raise ValueError(checks.message(op, names[1], rule, list(target.shape)))
    checks.same_device(op, names[1], target, names[0], pred)


def element_loss(
    op: str,
    spec: OpSpec,
    params: Sequence[float],
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
    activated: bool,
) -> Tensor:
    """A loss of elements after its checks; `weight` broadcasts to pred's shape."""
    activated = checks.flag(op, "activated", activated)
    arguments = (pred, None, as_dtype(target, accumulator(pred.dtype)), params, activated)
    return _reduce(spec, arguments, weight, reduction, avg_factor)


def _reduce(
    spec: OpSpec,
    arguments: tuple[Tensor, Tensor | None, Tensor, Sequence[float], bool],
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
) -> Tensor:
    reduced = _reduced(spec, *arguments, weight, reduction, avg_factor)
    if reduced is not None:
        return reduced
    return reduce_loss(spec(device_type(arguments[0]), *arguments), weight, reduction, avg_factor)


def _reduced(
    spec: OpSpec,
    pred: Tensor,
    label: Tensor | None,
    target: Tensor,
    params: Sequence[float],
    activated: bool,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
) -> Tensor | None:
    """The loss reduced by its kernel, or None where the caller has to compute the single losses and reduce them.

    Args:
        spec: of the operator that computes the single losses; its backend runs this too.
        pred: ``[N, C]`` or ``[B, C, P]``.
        label: ``[N]`` int64, of a loss summed over the classes, or None.
        target: in the accumulator's dtype; ``[N]`` with labels, else of pred's shape.
        params: those of the loss in its own order.
        weight: ``[N]``, ``[N, 1]`` or ``[B, P]``, or None.
    """
    kernels = _kernels(spec.stem, pred, target, weight, reduction, avg_factor)
    if kernels is None:
        return None
    acc = target.dtype
    count = 0  # read for a plain mean alone
    if avg_factor is None:
        count = pred.shape[:1].numel() * pred.shape[2:].numel() if SUMMED[spec.stem] else pred.numel()
    factor, norm = factor_and_norm(reduction, avg_factor, count, pred, acc)
    if weight is not None:
        weight = as_dtype(weight, acc).reshape(pred.shape[:1] + pred.shape[2:])
    inputs, constants = (pred, label, target, weight, norm), (factor, spec.stem, params, activated)
    if wants_grad([pred]):
        return GradInForward.apply(kernels, constants, *inputs)[0]
    return kernels.forward(inputs, constants, False)[0][0]


def _kernels(
    stem: str,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
) -> Kernels | None:
    """The kernels that can run the call, or None."""
    factor = avg_factor if isinstance(avg_factor, Tensor) else None
    if reduction == "none" or pred.dim() not in (2, 3) or not is_plain([pred], [target, weight, factor]):
        return None
    if weight is not None:
        rows = pred.shape[:1] + pred.shape[2:]
        if weight.shape not in (rows, (*rows, 1)):
            return None
    if factor is not None and factor.device.type not in ("cpu", pred.device.type):
        return None
    device = device_type(pred)
    backend = backends.serving(stem, device)
    if backend == "native" and device in _DEVICES:
        return _NATIVE
    return _TRITON if backend == "triton" else None


# --- samples ---------------------------------------------------------------------------------------------


def row_samples(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Tensor, Tensor | None, Tensor, bool]]:
    """(id, pred, label, target, activated) of a loss that is summed over the classes."""
    acc = accumulator(dtype)
    for n, c in ((0, 80), (1, 1), (7, 3), (129, 80), (1025, 20)):
        pred = normal((n, c), device, dtype, generator, scale=3.0)
        # Background comes as C, as −1 and as anything else outside [0, C).
        label = torch.randint(-2, c + 3, (n,), generator=generator).to(device)
        score = uniform((n,), device, acc, generator)
        yield f"sparse-n{n}-c{c}", pred, label, score, False
        if n in (7, 129):
            yield f"strided-n{n}", normal((c, n), device, dtype, generator).t(), label, score, False
            yield f"all-background-n{n}", pred, torch.full_like(label, c), score, False
            yield f"activated-n{n}", pred.sigmoid(), label, score, True
            yield f"dense-n{n}", pred, None, uniform((n, c), device, acc, generator), False
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -0.0]], device=device).to(dtype)
    label = torch.tensor([0, 2], device=device)
    yield "extreme", extreme, label, uniform((2,), device, acc, generator), False


def element_samples(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Tensor, Tensor, bool]]:
    """(id, pred, soft target, activated) of a loss that looks at each element by itself."""
    acc = accumulator(dtype)
    for shape in ((0, 80), (1, 1), (7, 3), (129, 4), (1025, 20), (2, 5, 3, 7)):
        name = "x".join(map(str, shape))
        pred = normal(shape, device, dtype, generator, scale=3.0)
        positive = uniform(shape, device, acc, generator) < 0.2
        target = uniform(shape, device, acc, generator, 0.05) * positive
        yield f"soft-{name}", pred, target, False
        if shape[0] not in (7, 129):
            continue
        yield f"one-hot-{name}", pred, positive.to(acc), False
        yield f"all-negative-{name}", pred, torch.zeros_like(target), False
        yield f"all-positive-{name}", pred, torch.ones_like(target), False
        yield f"strided-{name}", normal(shape[::-1], device, dtype, generator).t(), target, False
        # Away from 0 and 1, where logarithms and denominators of probabilities have their floors.
        yield f"activated-{name}", uniform(shape, device, dtype, generator, 0.02, 0.98), target, True
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -0.0]], device=device).to(dtype)
    yield "extreme", extreme, torch.tensor([[1, 0, 1], [1, 0.5, 0]], device=device, dtype=acc), False
