# SPDX-License-Identifier: Apache-2.0
"""The memory that a network takes, counted without images."""

from __future__ import annotations

import torch

from gfl.config import Config, preset
from gfl.models import build
from gfl.zoo import cost


def small(**fields: object) -> Config:
    return preset("gfl_tiny").replace(width=8, neck_channels=8, head_channels=8, head_groups=2, **fields)


def test_what_is_alive_at_one_time() -> None:
    x = torch.zeros(1000)
    with cost._Alive() as alive:
        y = x + 1
        z = y * 2
        del y
        z.view(10, 100).relu_()
        del z
        x + 1
    assert alive.most == 2 * 4000


def test_the_count_is_that_of_real_tensors() -> None:
    config = small()
    torch.manual_seed(0)
    model = build(config.model, config.test).eval()
    images = torch.zeros(1, 3, 192, 192)
    with torch.no_grad(), cost._Alive() as alive:
        model.predict_maps(images)
    assert cost.memory(config).detect == alive.most


def test_frozen_layers_keep_nothing_for_the_backward_pass() -> None:
    trained, frozen = cost.memory(small(frozen_stages=-1)), cost.memory(small(frozen_stages=4, norm_eval=True))
    assert frozen.detect == trained.detect < frozen.train < trained.train
