# SPDX-License-Identifier: Apache-2.0
"""Deformable convolutions against a loop over the taps that samples by hand."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gfl.models import create_model
from gfl.models.deform import DeformConv2d

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
needs_torchvision = pytest.mark.skipif(not HAS_TORCHVISION, reason="torchvision is not installed")


def sampled(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """``x [C, H, W]`` at fractional places ``[h, w]``, 0 outside."""
    top, left = row.floor(), column.floor()
    total = torch.zeros(x.shape[0], *row.shape, dtype=x.dtype)
    for y, wy in ((top, 1 - (row - top)), (top + 1, row - top)):
        for z, wz in ((left, 1 - (column - left)), (left + 1, column - left)):
            there = (y >= 0) & (y < x.shape[1]) & (z >= 0) & (z < x.shape[2])
            cell = x[:, y.clamp(0, x.shape[1] - 1).long(), z.clamp(0, x.shape[2] - 1).long()]
            total = total + cell * torch.where(there, wy * wz, 0.0)
    return total


def oracle(layer: DeformConv2d, x: Tensor) -> Tensor:
    learned = layer.conv_offset(x)
    batch, _, height, width = learned.shape
    outputs, inputs = layer.weight.shape[0], x.shape[1]
    rows = torch.arange(height, dtype=x.dtype)[:, None] * layer.stride
    columns = torch.arange(width, dtype=x.dtype) * layer.stride
    images = []
    for b in range(batch):
        total = torch.zeros(outputs, height, width, dtype=x.dtype)
        for tap in range(9):
            row = rows + tap // 3 - 1 + learned[b, 2 * tap]
            column = columns + tap % 3 - 1 + learned[b, 2 * tap + 1]
            value = sampled(x[b], row, column)
            if layer.modulated:
                value = value * learned[b, 18 + tap].sigmoid()
            for g in range(layer.groups):
                i = slice(g * inputs // layer.groups, (g + 1) * inputs // layer.groups)
                o = slice(g * outputs // layer.groups, (g + 1) * outputs // layer.groups)
                total[o] += torch.einsum("oi,ihw->ohw", layer.weight[o, :, tap // 3, tap % 3], value[i])
        images.append(total)
    return torch.stack(images)


@needs_torchvision
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 4)])
def test_it_samples_where_the_offsets_say(version: str, stride: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = DeformConv2d(8, 12, stride, groups, modulated=version == "v2").double()
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.3)
    torch.nn.init.normal_(layer.conv_offset.bias, std=1.0)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64, requires_grad=True)
    got, want = layer(x), oracle(layer, x)
    torch.testing.assert_close(got, want)
    leaves = [x, *layer.parameters()]
    direction = torch.randn_like(got)
    for g, w in zip(torch.autograd.grad(got, leaves, direction), torch.autograd.grad(want, leaves, direction)):
        torch.testing.assert_close(g, w)


@needs_torchvision
def test_without_a_deformation_it_is_a_convolution(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 8, 6, 5)
    v1, v2 = DeformConv2d(8, 4, 2), DeformConv2d(8, 4, 2, modulated=True)
    # Version 2's weights start at sigmoid(0).
    for layer, factor in ((v1, 1.0), (v2, 0.5)):
        want = functional.conv2d(x, layer.weight, stride=2, padding=1) * factor
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


@needs_torchvision
def test_in_half_precision_positions_are_fp32(seed: int) -> None:
    torch.manual_seed(seed)
    layer = DeformConv2d(8, 8)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.1)
    x = torch.randn(1, 8, 12, 12)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    # Offsets of 8 bits, of about 1 cell, and a result of 8 bits.
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.1)


@needs_torchvision
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_detector_with_it_learns_its_offsets(version: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = create_model("gfl_tiny", num_classes=3, backbone="resnet50", width=16, dcn=version, dcn_stages=(4, 5))
    targets = [{"boxes": torch.tensor([[20.0, 10, 90, 80]]), "labels": torch.tensor([1])}]
    for name, parameter in model.backbone.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.ones_(parameter)
    sum(model.loss(torch.randn(1, 3, 96, 96), targets).values()).backward()
    assert model.backbone.layer3[0].conv2.conv_offset.weight.grad.abs().sum() > 0
    assert not hasattr(model.backbone.layer2[0].conv2, "conv_offset")
    assert model.eval()(torch.randn(1, 3, 96, 96)).boxes.shape == (1, 100, 4)


@pytest.mark.skipif(HAS_TORCHVISION, reason="torchvision is installed")
def test_without_torchvision_it_says_what_to_install() -> None:
    with pytest.raises(RuntimeError, match="pip install torchvision"):
        DeformConv2d(4, 4)(torch.zeros(1, 4, 5, 5))
