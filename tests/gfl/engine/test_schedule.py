# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every step, and the lengths of short trainings and of the paper's."""

from __future__ import annotations

import pytest

from gfl.config import PRESETS, TrainConfig
from gfl.engine.schedule import learning_rate, schedule_warnings, total_steps, warmup_steps

# Steps of 16 images in an epoch of COCO's 117 266 images with objects.
COCO = 7330


def test_the_warm_up_rises_to_the_scaled_rate() -> None:
    train = TrainConfig(lr=0.01, batch_size=32, warmup_steps=500)
    rates = [learning_rate(step, COCO, train) for step in range(501)]
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


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("gfl")])
def test_on_coco_the_presets_train_as_in_the_paper(name: str) -> None:
    train = PRESETS[name]().train
    assert train.steps == 0 and train.lr == 0.01 and train.optimizer == "sgd" and train.schedule == "step"
    assert warmup_steps(COCO, train) == 500 and schedule_warnings(COCO, train) == []
    assert total_steps(COCO, train) == train.epochs * COCO
    off = TrainConfig()
    for option in ("ema", "accumulate", "patience", "class_weights", "repeat_threshold", "layer_decay", "norm_decay"):
        assert getattr(train, option) == getattr(off, option)
    assert (off.ema, off.accumulate, off.patience, off.class_weights) == (0, 1, 0, "")
    assert (off.repeat_threshold, off.layer_decay, off.norm_decay) == (0, 1, True)
    for step in (0, 250, 499, 500, 8 * COCO - 1):
        expected = 0.01 * min(1, 1e-3 + (1 - 1e-3) * step / 500)
        assert learning_rate(step, COCO, train) == pytest.approx(expected if step < train.lr_drops[0] * COCO else 1e-3)


@pytest.mark.parametrize("images", [25, 100, 200])
def test_a_small_data_set_reaches_the_rate(images: int) -> None:
    per_epoch = -(-images // 16)
    train = TrainConfig()
    reached = max(learning_rate(step, per_epoch, train) for step in range(12 * per_epoch))
    assert reached == pytest.approx(train.lr) and schedule_warnings(per_epoch, train) == []


def test_a_rate_that_is_never_reached_is_told() -> None:
    (line,) = schedule_warnings(2, TrainConfig(warmup_steps=500, lr_drops=()))
    assert "never exceeds 5% of what `lr` asks for: 24 steps with a warm-up of 500" in line
    (line,) = schedule_warnings(100, TrainConfig(epochs=9))
    assert "ends after 9 epochs, before the drop of the learning rate after epoch 11" in line
    assert schedule_warnings(100, TrainConfig(epochs=9, schedule="cosine")) == []


def test_a_length_in_steps() -> None:
    train = TrainConfig(steps=150, schedule="cosine")
    assert total_steps(100, train) == 150 and warmup_steps(100, train) == 15
    assert learning_rate(75, 100, train) == pytest.approx(0.005)
