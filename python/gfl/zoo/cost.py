# SPDX-License-Identifier: Apache-2.0
"""What a network costs: parameters, arithmetic and bytes, counted without weights or images."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config import Config
from ..models import build
from ..models.deform import DeformConv2d


class Cost(NamedTuple):
    """Of one image at the test size."""

    parameters: int
    multiply_adds: int  # of convolutions
    bytes: int  # of all weights and buffers
    size: tuple[int, int]  # (height, width) of the padded input


class Memory(NamedTuple):
    """Of one image at the test size in fp32, without the weights, in bytes."""

    detect: int  # the most that is alive at one time
    train: int  # what autograd keeps for the backward pass


class _Rigid(nn.Module):
    """A deformable convolution as two plain ones, which need no torchvision."""

    def __init__(self, deformable: DeformConv2d) -> None:
        super().__init__()
        self.offset, self.weight, self.stride = deformable.conv_offset, deformable.weight, deformable.stride

    def forward(self, x: Tensor) -> Tensor:
        self.offset(x)
        return functional.conv2d(x, self.weight, None, self.stride, 1, groups=x.shape[1] // self.weight.shape[1])


class _Alive(TorchDispatchMode):
    """Follows the storages that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._there: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._there[StorageWeakRef(storage)] = storage.nbytes()
        self._there = {storage: size for storage, size in self._there.items() if not storage.expired()}
        self.most = max(self.most, sum(self._there.values()))
        return result


def _padded(config: Config) -> tuple[int, int]:
    test = config.test
    height, width = (-(-side // test.size_divisor) * test.size_divisor for side in (test.short_side, test.long_side))
    return height, width


def _network(config: Config) -> nn.Module:
    model = build(config.model, config.test)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DeformConv2d):
                setattr(module, name, _Rigid(child))
    return model


def memory(config: Config) -> Memory:
    """The memory that a configuration's detector takes, by its tensors; an allocator takes more."""
    with FakeTensorMode():
        model: Any = _network(config)
        images = torch.empty(1, 3, *_padded(config))
        with torch.no_grad(), _Alive() as alive:
            model.eval().predict_maps(images)
        weights = {StorageWeakRef(value.untyped_storage()) for value in model.state_dict().values()}
        kept: dict[StorageWeakRef, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[StorageWeakRef(storage)] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            maps = model.train().predict_maps(images)
        gradients = sum(x.untyped_storage().nbytes() for level in maps for x in level)
    return Memory(alive.most, sum(size for storage, size in kept.items() if storage not in weights) + gradients)


def cost(config: Config) -> Cost:
    """The cost of a configuration's detector."""
    height, width = _padded(config)
    with FakeTensorMode():
        model: Any = _network(config).eval()
        parameters = sum(p.numel() for p in model.parameters())
        size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        counted = 0

        def count(module: nn.Module, _: object, output: Tensor) -> None:
            nonlocal counted
            weight = module.get_parameter("weight")
            counted += output.numel() * math.prod(weight.shape[1:])

        for module in model.modules():
            if isinstance(module, (nn.Conv2d, _Rigid)):
                module.register_forward_hook(count)
        with torch.no_grad():
            model.predict_maps(torch.empty(1, 3, height, width))
    return Cost(parameters, counted, size, (height, width))
