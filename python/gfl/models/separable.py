# SPDX-License-Identifier: Apache-2.0
"""Sequences of convolution, batch norm and LeakyReLU, that NanoDet-Plus's networks are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from torch import nn

SLOPE = 0.1


def layer(
    inputs: int, outputs: int, size: int = 1, stride: int = 1, *, depthwise: bool = False, act: bool = True
) -> list[nn.Module]:
    """A convolution without bias, its batch norm and LeakyReLU; padded so that stride 1 keeps the size."""
    groups = inputs if depthwise else 1
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([nn.LeakyReLU(SLOPE, inplace=True)] if act else [])]


def named(names: str, modules: Iterable[nn.Module]) -> nn.Sequential:
    """A sequence of modules with names for the keys of the state dict."""
    return nn.Sequential(OrderedDict(zip(names.split(), modules, strict=True)))


def separable(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A depthwise convolution and a pointwise one, each with norm and activation, named as in NanoDet."""
    depthwise, pointwise = layer(inputs, inputs, size, stride, depthwise=True), layer(inputs, outputs)
    return named("depthwise dwnorm dwact pointwise pwnorm pwact", [*depthwise, *pointwise])
