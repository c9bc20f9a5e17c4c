# SPDX-License-Identifier: Apache-2.0
"""Tests whose tensors lie on the CPU, with the package's kernels running on another device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

NAMESPACES = ("gfl", "gfl_triton")


class OnDevice(TorchDispatchMode):
    """While it is entered, the package's operators run on copies of their arguments on the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in NAMESPACES:
            return func(*args, **kwargs)
        sent = tree_map_only(Tensor, self.send, args)
        result = func(*sent, **tree_map_only(Tensor, self.send, kwargs))
        for argument, mine, given in zip(func._schema.arguments, sent, args):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Tensor):
                given.copy_(mine)
        return tree_map_only(Tensor, lambda tensor: tensor.cpu(), result)
