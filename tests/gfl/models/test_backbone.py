# SPDX-License-Identifier: Apache-2.0
"""Norms that keep their statistics, folded into convolutions while training: the same results and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gfl.models import create_model
from gfl.models.layers import conv_norm


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnext101_32x4d"])
def test_folded_norms_give_the_same_maps_and_gradients(backbone: str, seed: int) -> None:
    torch.manual_seed(seed)
    network = create_model("gfl_tiny", backbone=backbone, width=16, frozen_stages=1, norm_eval=True).backbone
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.8)
    # In fp64, so that what differs is a formula and not a rounding.
    network.double().train()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    found = []
    for fold in (False, True):
        network.fold_norms(fold)
        network.zero_grad()
        maps = network(images)
        sum(x.square().mean() for x in maps).backward()
        found.append((maps, {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}))
    (plain, gradients), (folded, others) = found
    for a, b in zip(plain, folded, strict=True):
        torch.testing.assert_close(a, b)
    assert (
        gradients.keys() == others.keys()
        and "layer2.0.bn1.weight" in gradients
        and "layer1.0.conv1.weight" not in others
    )
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-6, atol=1e-9, msg=name)


def test_a_norm_that_learns_its_statistics_is_not_folded(generator: torch.Generator) -> None:
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    norm.folded = True
    x = torch.randn(2, 3, 8, 8, generator=generator)
    before = norm.running_mean.clone()
    y = conv_norm(conv, norm, x, relu=False)
    assert not torch.equal(norm.running_mean, before)
    # Statistics of this batch: mean 0, deviation 1, up to the eps of 1e-5 in the variance.
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bias", "tracks"), [(True, True), (False, False)])
def test_what_can_not_be_folded_is_computed_as_ever(generator: torch.Generator, bias: bool, tracks: bool) -> None:
    conv, norm = nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, track_running_stats=tracks).eval()
    norm.folded = True
    x = torch.randn(2, 3, 8, 8, generator=generator)
    assert torch.equal(conv_norm(conv, norm, x, relu=False), norm(conv(x)))
