# SPDX-License-Identifier: Apache-2.0
"""The drawn data set: fixed by its seed, its boxes exact, its hard cases there."""

import json

import numpy as np
import pytest
from PIL import Image

from gfl.demo import scenes as module
from gfl.demo.scenes import CLASSES, SMALLEST, VISIBLE, draw_scene, write_dataset


def scenes(seed: int, count: int, size: int = 192) -> list:
    return [draw_scene(size, np.random.default_rng([seed, i])) for i in range(count)]


def test_boxes_are_the_exact_extent_of_the_masks(seed):
    for scene in scenes(seed, 20):
        assert scene.boxes.shape == (len(scene.labels), 4)
        for box, mask in zip(scene.boxes.astype(int), scene.masks):
            x1, y1, x2, y2 = box
            inside = np.zeros_like(mask)
            inside[y1:y2, x1:x2] = True
            assert not (mask & ~inside).any()
            assert mask[y1].any() and mask[y2 - 1].any() and mask[:, x1].any() and mask[:, x2 - 1].any()


def test_a_mask_is_where_an_object_covers_at_least_half_of_a_pixel(monkeypatch, seed):
    monkeypatch.setattr(module, "pattern", lambda shape, *_, **__: np.full((*shape, 3), 255.0))
    found = 0
    for i in range(30):
        pile = module._Pile(128, np.random.default_rng([seed, i]))
        pile.image[:] = 0
        pile.add(int(pile.rng.integers(len(CLASSES))))
        for mask in pile.masks:
            found += 1
            assert np.array_equal(pile.image[..., 0] >= 127.5, mask)
    assert found > 15


def test_hard_cases_are_there_and_none_is_hopeless(seed):
    drawn = scenes(seed, 60)
    longest = np.concatenate([(s.boxes[:, 2:] - s.boxes[:, :2]).max(1) for s in drawn])
    visible = np.concatenate([s.visible for s in drawn])
    labels = np.concatenate([s.labels for s in drawn])
    assert longest.min() < SMALLEST + 5 and longest.max() > 80 and longest.max() <= 192 / 2 + 1
    assert visible.min() < 0.6 and visible.min() >= VISIBLE - 1e-6 and np.median(visible) > 0.9
    assert set(labels.tolist()) == set(range(len(CLASSES)))


def test_a_data_set_is_fixed_by_its_seed_and_fewer_scenes_are_the_first_of_more(tmp_path, seed):
    write_dataset(tmp_path / "a", train=3, val=2, size=96, seed=seed)
    write_dataset(tmp_path / "b", train=5, val=1, size=96, seed=seed)
    write_dataset(tmp_path / "c", train=1, val=1, size=96, seed=seed + 1)
    for name in ("train/00000.jpg", "train/00002.jpg", "val/00000.jpg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    first = np.asarray(Image.open(tmp_path / "a/train/00000.jpg"))
    assert first.shape == (96, 96, 3)
    assert not np.array_equal(first, np.asarray(Image.open(tmp_path / "a/val/00000.jpg")))
    assert not np.array_equal(first, np.asarray(Image.open(tmp_path / "c/train/00000.jpg")))


def test_annotations_are_cocos(tmp_path, seed):
    write_dataset(tmp_path, train=4, val=3, size=128, seed=seed)
    coco = json.loads((tmp_path / "annotations/val.json").read_text())
    assert [c["name"] for c in coco["categories"]] == list(CLASSES)
    assert [(tmp_path / "val" / image["file_name"]).is_file() for image in coco["images"]] == [True] * 3
    for index, image in enumerate(coco["images"]):
        scene = draw_scene(128, np.random.default_rng([seed, 1, index]))
        found = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        corners = [
            [a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]] for a in found
        ]
        assert corners == scene.boxes.tolist()
        assert [a["category_id"] - 1 for a in found] == scene.labels.tolist()
        assert [a["area"] for a in found] == scene.masks.sum((1, 2)).tolist()
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])


def test_too_small_a_scene_is_refused():
    with pytest.raises(ValueError, match="`size` must be at least 64"):
        draw_scene(32, np.random.default_rng(0))
