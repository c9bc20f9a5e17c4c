# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every step."""

from __future__ import annotations

import pytest

from gfl.config import TrainConfig
from gfl.engine.train import learning_rate


def test_the_warm_up_rises_to_the_scaled_rate() -> None:
    train = TrainConfig(lr=0.01, batch_size=32, warmup_steps=500)
    rates = [learning_rate(step, 7330, train) for step in range(501)]
    assert rates[0] == pytest.approx(0.02e-3) and rates[500] == pytest.approx(0.02)
    assert rates == sorted(rates)


def test_it_drops_to_a_tenth_after_the_epochs_named() -> None:
    train = TrainConfig(lr=0.01, batch_size=16, warmup_steps=0, lr_drops=(8, 11))
    steps = (0, 8 * 100 - 1, 8 * 100, 11 * 100 - 1, 11 * 100, 1199)
    assert [learning_rate(s, 100, train) for s in steps] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])


def test_the_cosine_ends_at_nothing() -> None:
    train = TrainConfig(lr=0.01, batch_size=16, warmup_steps=0, schedule="cosine", epochs=4)
    rates = [learning_rate(step, 25, train) for step in (0, 50, 99)]
    assert rates[:2] == pytest.approx([0.01, 0.005]) and 0 < rates[2] < 1e-5
