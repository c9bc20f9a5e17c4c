# SPDX-License-Identifier: Apache-2.0
"""Forward-mode derivatives, torch.func and vmap, for operators whose kernels know a gradient and nothing else.

Where one of them is active an operator is computed by its reference, which torch can transform: the kernels would drop
a tangent without a word.

- The autograd kernel of every operator asks `active` before it asks whether an input requires a gradient.
- A backward pass over a graph that was recorded before, with a batch of gradients or with tangents in them, is
  `pull_back` of the reference.
- ``torch.vmap`` calls an operator item by item: `each_item`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_in_functorch = torch._C._are_functorch_transforms_active
_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")  # not that of torch.vmap


def active() -> bool:
    """Whether tangents are propagated here, or a transform of `torch.func` is running."""
    return forward_ad._current_level >= 0 or _in_functorch()


def active_in_backward() -> bool:
    """The same for a backward pass, to which ``torch.autograd.grad(…, is_grads_batched=True)`` is a transform too."""
    return active() or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)


def pull_back(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients at `inputs` of a `function` in plain torch, `grads` being those of its results.

    They can be differentiated again wherever autograd records.
    """
    if _in_functorch():
        back = torch.func.vjp(lambda *x: tuple(function(*x)), *inputs)[1]
        return back(tuple(grads))
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = list(inputs) if again else [x.detach().requires_grad_() for x in inputs]
        pairs = [(r, g) for r, g in zip(function(*leaves), grads) if r.requires_grad]
        results, arriving = [r for r, _ in pairs], [g for _, g in pairs]
        return torch.autograd.grad(results, leaves, arriving, create_graph=again, materialize_grads=True)


def without_derivatives(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in plain torch whose results have no derivative of any kind, as those of a kernel without one."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            return function(*arguments)

    return call


def each_item(operator: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """The rule of ``torch.vmap`` for an operator: its results for each item of the batch, stacked."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        items = [operator(*_item(arguments, in_dims, i)) for i in range(info.batch_size)]
        results = _stacked(operator, items)
        return results, _zeros(results)

    return rule


def _item(value: Any, dim: Any, index: int) -> Any:
    """What `value` is for one item of the batch along `dim`, which is nested as the value is."""
    if isinstance(value, (list, tuple)):
        return type(value)(_item(v, d, index) for v, d in zip(value, dim))
    return value if dim is None else value.select(dim, index)


def _stacked(operator: object, items: Sequence[Any]) -> Any:
    if not isinstance(items[0], Tensor):
        return type(items[0])(_stacked(operator, part) for part in zip(*items))
    if any(x.shape != items[0].shape for x in items):
        raise NotImplementedError(
            f"{operator} under torch.vmap: the size of a result depends on the data and differs between the items;"
            " call it in a loop"
        )
    return torch.stack(list(items))


def _zeros(results: Any) -> Any:
    return 0 if isinstance(results, Tensor) else type(results)(_zeros(r) for r in results)
