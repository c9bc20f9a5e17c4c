# SPDX-License-Identifier: Apache-2.0
"""Another system's loss against ours: values, gradients, and how far each may be from the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Evaluated = list[Tensor]


def evaluate(call: Callable[..., Any], leaves: Sequence[Tensor]) -> Evaluated:
    """The results of `call` on `leaves`, and the gradients of their sum, weighted unevenly, at each floating leaf."""
    leaves = [leaf.detach().clone().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
    results = call(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    total = sum((0.3 + i) * r.double().sum() for i, r in enumerate(results))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return [*results, *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads))]


def assert_as_exact(ours: Evaluated, theirs: Evaluated, truth: Evaluated, share: float = 1.0) -> None:
    """Ours no further from the truth, theirs in fp64 from the same rounded inputs, than twice what theirs is.

    Beside that, half a unit in the last place of the dtype, `share` of the largest number: a result of theirs may hit
    the truth by luck.
    """
    for i, (a, b, t) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert a.shape == b.shape, (i, a.shape, b.shape)
        if not t.numel():
            continue
        scale = t.double().abs().max().clamp(min=1e-30)
        # A gradient has its leaf's dtype, a loss of ours at least fp32.
        eps = torch.finfo(b.dtype).eps
        error, allowed = ((x.double() - t.double()).abs().max() for x in (a, b))
        bound = 2 * allowed + share * eps * scale
        assert error <= bound, f"result {i}: error {error:.3g}, theirs {allowed:.3g}, scale {scale:.3g}"
