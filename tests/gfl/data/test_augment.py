# SPDX-License-Identifier: Apache-2.0
"""Augmentation: boxes stay on their objects, draws follow from image and epoch, wrong settings are named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gfl.config import Config
from gfl.data import augment, loader
from gfl.data.coco import CocoDataset, Sample

Make = Callable[[int], CocoDataset]


def drawn(height: int, width: int, boxes: list[list[int]], level: int = 255) -> Sample:
    """White boxes on black: where a box is, is in the pixels."""
    image = torch.zeros((height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
    for x1, y1, x2, y2 in boxes:
        image[:, y1:y2, x1:x2] = level
    labels = torch.arange(len(boxes))
    return Sample(image, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels, 1, (height, width))


def found_box(image: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """The bounds of the white pixels in a box's neighbourhood."""
    x1, y1, x2, y2 = box.round().int().tolist()
    part = image[0, max(0, y1 - 6) : y2 + 6, max(0, x1 - 6) : x2 + 6] > 140
    ys, xs = part.nonzero().unbind(1)
    offset = torch.tensor([max(0, x1 - 6), max(0, y1 - 6)])
    return torch.cat([torch.stack([xs.min(), ys.min()]) + offset, torch.stack([xs.max(), ys.max()]) + offset + 1])


@pytest.mark.parametrize("name", ["crop", "jitter", "mosaic", "color", "copypaste"])
def test_boxes_stay_on_their_objects(name: str) -> None:
    function, _ = augment.STEPS[name]
    changed = 0
    for number in range(60):
        sample = drawn(90, 120, [[20, 16, 62, 70]])
        second = drawn(80, 80, [[24, 20, 60, 56]])
        new = augment.checked(function(sample, augment.Draw(f"{name} {number}"), lambda s=second: s), name)
        assert new.size == tuple(new.image.shape[1:]) and new.image.dtype == torch.uint8
        changed += not torch.equal(new.image, sample.image) if new.size == sample.size else True
        boxes = new.boxes
        limits = torch.tensor([new.size[1], new.size[0]]).repeat(2)
        assert bool((boxes >= 0).all()) and bool((boxes <= limits).all()) and len(boxes) == len(new.labels)
        for box in boxes:
            if name in ("mosaic", "copypaste"):  # objects may touch
                x1, y1, x2, y2 = box.round().int().tolist()
                assert bool((new.image[0, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] > 140).all())
                continue
            # Resizing moves an edge by less than a pixel, and rounds it.
            assert (found_box(new.image, box) - box).abs().max() <= 2, (number, box, new.size)
    assert changed > 30


def test_mixup_has_the_objects_of_both() -> None:
    sample, second = drawn(60, 80, [[10, 10, 30, 30]]), drawn(120, 160, [[80, 60, 120, 100]])
    new = augment.mixup(sample, augment.Draw("0"), lambda: second)
    assert new.boxes.tolist() == [[10, 10, 30, 30], [40, 30, 60, 50]]
    shares = new.image[0, 15, 15].item() / 255, new.image[0, 40, 50].item() / 255
    assert sum(shares) == pytest.approx(1, abs=0.01) and 0.39 < shares[0] < 0.61
    assert torch.equal(sample.image, drawn(60, 80, [[10, 10, 30, 30]]).image), "the data set's image was changed"


def test_colors_of_grey_stay_grey_and_others_change() -> None:
    image = torch.full((40, 50, 3), 100, dtype=torch.uint8).permute(2, 0, 1)
    grey = Sample(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 1, (40, 50))
    levels = set()
    for number in range(20):
        new = augment.color(grey, augment.Draw(str(number)), lambda: grey).image
        assert (new.amax(0).int() - new.amin(0).int()).max() <= 2
        levels.add(int(new[0, 0, 0]))
    assert len(levels) > 8 and min(levels) < 90 and max(levels) > 110


def settings(**values: Any) -> Config:
    few = {"batch_size": 4, "workers": 0, "train_short_side": (32, 64), "train_long_side": 80}
    return Config().replace(**{**few, **values})


ALL = ",".join(f"{name}=0.6" for name in augment.STEPS)


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.boxes, b.boxes) and torch.equal(a.labels, b.labels)


def test_draws_follow_from_image_and_epoch(dataset: Make) -> None:
    """The same by workers, after a stop, and on another rank; another epoch differs; no generator moves."""
    data, config = dataset(11), settings(augment=ALL)
    before = torch.get_rng_state()
    whole = list(loader.training_loader(data, config, epoch=4))
    assert_same(whole, loader.training_loader(data, config, epoch=4))
    assert_same(whole, loader.training_loader(data, config.replace(workers=2), epoch=4))
    assert_same(whole[1:], loader.training_loader(data, config, epoch=4, start_batch=1))
    assert torch.equal(torch.get_rng_state(), before)
    share = next(iter(loader.training_loader(data, config, epoch=4, rank=1, world=2)))
    assert torch.equal(share.boxes, torch.cat([t["boxes"] for t in whole[0].targets[2:]]))
    other = loader.BatchReader(data, config, True).read(5, [0, 1, 2, 3])
    assert not torch.equal(other.boxes, loader.BatchReader(data, config, True).read(4, [0, 1, 2, 3]).boxes)


def test_off_by_default_and_nothing_else_changes(dataset: Make) -> None:
    data = dataset(5)
    assert not loader.BatchReader(data, Config(), True)._steps
    assert not loader.BatchReader(data, settings(augment=ALL), False)._steps
    assert_same(loader.training_loader(data, settings()), loader.training_loader(data, settings(augment="none")))
    assert loader.BatchReader(data, settings(augment="finetune"), True)._steps


def test_an_image_of_a_mosaic_that_can_not_be_decoded(dataset: Make) -> None:
    data = dataset(5)
    for index in range(1, 5):
        data.path(index).write_bytes(b"no image")
    batch = loader.BatchReader(data, settings(augment="mosaic=1,mixup=1,copypaste=1"), True).read(0, [0])
    assert batch.images.shape[0] == 1 and bool(batch.boxes.isfinite().all())


OWN = """
import random, numpy, torch
def invert(image, boxes, labels):
    return 255 - image, boxes, labels
def noise(image, boxes, labels):
    levels = torch.randint(3, image.shape).to(torch.uint8) + random.randrange(2) + numpy.random.randint(2)
    return image // 2 + levels.to(torch.uint8), boxes, labels
def wrong(image, boxes, labels):
    return image, boxes[:, :3], labels
"""


def test_a_function_of_ones_own(dataset: Make, tmp_path: Path) -> None:
    data, file = dataset(4), tmp_path / "own.py"
    file.write_text(OWN)
    steps = augment.parse(f"{file}:invert")
    sample = data[0]
    new = augment.apply(steps, sample, "0", data.__getitem__, 4)
    assert torch.equal(new.image, 255 - sample.image) and torch.equal(new.boxes, sample.boxes)
    assert pickle.loads(pickle.dumps(steps))[0].apply.function(0, 1, 2) == (255, 1, 2)  # for spawned workers
    noisy = settings(augment=f"color,{file}:noise=0.9", workers=2)
    assert_same(loader.training_loader(data, noisy), loader.training_loader(data, noisy.replace(workers=0)))
    with pytest.raises(ValueError, match=r"`augment`: .*own\.py:wrong did not give finite boxes \[n, 4\]"):
        next(iter(loader.training_loader(data, settings(augment=f"{file}:wrong"))))


def test_a_transform_of_torchvision(dataset: Make, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    data, file = dataset(4), tmp_path / "own.py"
    file.write_text(
        "from torchvision.transforms import v2\n"
        "flip = v2.RandomHorizontalFlip(1.0)\n"
        "crop = v2.Compose([v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes()])\n"
    )
    sample = data[0]
    new = augment.apply(augment.parse(f"{file}:flip"), sample, "0", data.__getitem__, 4)
    assert torch.equal(new.image, sample.image.flip(2)) and type(new.image) is type(new.boxes) is torch.Tensor
    config = settings(augment=f"{file}:crop", workers=2)
    assert_same(loader.training_loader(data, config), loader.training_loader(data, config.replace(workers=0)))


@pytest.mark.parametrize(
    "text, message",
    [
        ("colour", "no step 'colour'; did you mean `color`"),
        ("color=2", "the probability of color must be in 0 to 1, got '2'"),
        ("mosaic=x", "the probability of mosaic must be in 0 to 1, got 'x'"),
        ("absent.py:f", r"absent\.py:f is not there"),
        ("json:absent", "json:absent is not there"),
    ],
)
def test_wrong_settings(text: str, message: str, dataset: Make) -> None:
    with pytest.raises(ValueError, match=f"`augment`: .*{message}|`augment`: {message}"):
        loader.training_loader(dataset(2), settings(augment=text))
