# SPDX-License-Identifier: Apache-2.0
"""Annotation files, sound and broken."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_data
import torch
from PIL import Image, ImageOps

from gfl.data.coco import CocoDataset, read_annotations
from gfl.engine.evaluate import class_metrics, coco_metrics

Write = Callable[..., Path]
IMAGE = {"id": 5, "file_name": "0.png", "height": 40, "width": 60}


def box(bbox: Any, category: int = 3, image: int = 5, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": bbox, **more}


@pytest.fixture
def one_image(tmp_path: Path) -> Path:
    (tmp_path / "0.png").touch()
    return tmp_path


@pytest.mark.skipif(real_data.missing() is not None, reason=str(real_data.missing()))
def test_real_annotations() -> None:
    data = CocoDataset(real_data.annotations(), real_data.COCO / "images")
    content = json.loads(real_data.annotations().read_text())
    assert (
        data.category_ids == real_data.category_ids()
        and data.classes[0] == "person"
        and data.classes[79] == "toothbrush"
    )
    assert data.image_ids == [i["id"] for i in content["images"]]
    assert data.problems == {"crowd boxes, no targets": 7}
    assert len(data) == 47
    seen = 0
    for index in range(0, 47, 9):
        sample = data[index]
        own = [a for a in content["annotations"] if a["image_id"] == sample.image_id and not a["iscrowd"]]
        assert sample.size == tuple(sample.image.shape[1:]) and sample.image.dtype == torch.uint8
        assert [data.category_ids[label] for label in sample.labels] == [a["category_id"] for a in own]
        corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]).reshape(-1, 4)
        torch.testing.assert_close(sample.boxes, corners, rtol=0, atol=0.01)  # COCO's boxes have two decimals
        seen += len(own)
    assert seen > 0


def test_boxes_that_are_no_targets(write: Write, one_image: Path) -> None:
    annotations = [
        box([10, 10, 20, 20]),
        box([-4, 30, 20, 20]),  # clipped to 16×10
        box([50, 30, 10.6, 10]),  # clipped, but by less than a pixel
        box([10, 10, 0, 20]),
        box([10, 10, 20, -5]),
        box([60, 10, 20, 20]),
        box([10, -30, 20, 20]),
        box([10, 10, 0.5, 20]),
        box([0, 0, 60, 40], iscrowd=1),
        box([0, 0, 50, 40], ignore=1),
        box([10, 10, 20, 20], category=4),
        box([10, 10, 20, 20], image=6),
        box([10, 10, float("nan"), 20]),
        box([10, float("inf"), 20, 20]),
        box([10, 10, 20]),
        box([10, 10, 20, "20"]),
        box([10, 10, 20, 10**400]),
    ]
    data = CocoDataset(write(images=[IMAGE], annotations=annotations), one_image)
    start, end = data._first[0], data._last[0]
    assert data._boxes[start:end].tolist() == [[10, 10, 30, 30], [0, 30, 16, 40], [50, 30, 60, 40]]
    assert data.problems == Counter(
        {
            "boxes more than a pixel over their image's edge, clipped": 1,
            "boxes without width or height, left out": 2,
            "boxes outside their image, left out": 2,
            "boxes less than a pixel wide or high, left out": 1,
            "crowd boxes, no targets": 1,
            "boxes marked `ignore`, no targets": 1,
            "boxes of unknown categories, left out": 1,
            "boxes of unknown images, left out": 1,
            "boxes that are not four finite numbers, left out": 5,
        }
    )


def test_labels_follow_ascending_category_ids(dataset: Callable[[int], CocoDataset]) -> None:
    data = dataset(3)
    assert data.category_ids == [3, 7, 90] and data.classes == ["ball", "cup", "kite"]
    # The fixture's categories come as 7, 3, 90.
    assert [data[i].labels.tolist() for i in range(3)] == [[1], [0, 0], [2]]
    torch.testing.assert_close(data[1].boxes, torch.tensor([[2, 3, 12.5, 11], [3, 3, 13.5, 11]]))


def test_images_without_objects(write: Write, photos: Callable[[int], list[dict[str, Any]]], tmp_path: Path) -> None:
    images = photos(3)
    annotations = [box([3, 4, 10, 10], image=images[1]["id"]), box([3, 4, 10, 10], image=images[2]["id"], iscrowd=1)]
    file = write(images=images, annotations=annotations)
    kept = CocoDataset(file, tmp_path / "images")
    assert len(kept) == 3 and kept.problems["images without objects, kept"] == 2
    assert kept[0].boxes.shape == (0, 4) and kept[0].labels.shape == (0,) and len(kept[1].boxes) == 1
    left = CocoDataset(file, tmp_path / "images", keep_empty=False)
    assert left.image_ids == [images[1]["id"]] and left.problems["images without objects, left out"] == 2
    assert torch.equal(left[0].image, kept[1].image) and len(left.annotations.image_ids) == 3


def test_nothing_to_train_on(write: Write, one_image: Path) -> None:
    with pytest.raises(ValueError, match=r"annotations\.json lists no image"):
        CocoDataset(write(), one_image)
    file = write(images=[IMAGE], annotations=[box([1, 1, 9, 9], category=4)])
    message = r"annotations\.json has no image with an object to train on: 1 boxes of unknown categories"
    with pytest.raises(ValueError, match=message):
        CocoDataset(file, one_image, keep_empty=False)


def test_missing_images(write: Write, tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "0.png").touch()
    names = ["a/0.png", "a/1.png", "b/2.png"]
    images = [{**IMAGE, "id": n, "file_name": name} for n, name in enumerate(names)]
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images of .*annotations\.json are not in .*photos, a/1\.png"):
        CocoDataset(write(images=images), tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match=r"3 of 3 images .*nowhere"):
        CocoDataset(write(images=images), tmp_path / "nowhere")
    assert len(CocoDataset(write(images=images[:1]), tmp_path / "photos")) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ({"images": [IMAGE, IMAGE]}, r"images\[1\]: `id` 5 comes twice"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, r"categories\[1\]: `id` 1 comes twice"),
        ({"images": [{**IMAGE, "width": 0}]}, r"images\[0\]: `height` and `width` must be positive"),
        ({"images": [{**IMAGE, "id": None}]}, r"images\[0\]: `id` must be a whole number or a text, got None"),
        ({"images": [{k: v for k, v in IMAGE.items() if k != "height"}]}, r"images\[0\] has no `height`"),
        ({"images": [{k: v for k, v in IMAGE.items() if k != "file_name"}]}, r"images\[0\] has no `file_name`"),
        ({"images": [17]}, r"images\[0\] has no `id`"),
        ({"images": [IMAGE, {**IMAGE, "id": "5"}]}, r"ids of its images are numbers and texts"),
        ({"images": [{**IMAGE, "width": 2**31}]}, r"images\[0\]: `height` and `width` must be positive, at most"),
        ({"images": [{**IMAGE, "id": 10**30}]}, r"images\[0\]: `id` must be a whole number"),
        ({"categories": [{"id": True, "name": "a"}]}, r"categories\[0\]: `id` must be a whole number of at most 64"),
        ({"categories": [{"id": 1, "name": 5}]}, r"categories\[0\]: `name` must be a text, got 5"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] has no `name`"),
        ({"annotations": None}, r"a list `annotations` is needed"),
        ({"images": {}}, r"a list `images` is needed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_annotations(content: dict[str, Any], message: str, write: Write) -> None:
    with pytest.raises(ValueError, match=r"annotations\.json.*" + message):
        read_annotations(write(**content))


def test_whole_numbers_may_be_written_as_floats(write: Write) -> None:
    a = read_annotations(write(images=[{**IMAGE, "height": 40.0}], annotations=[box([1, 2, 3, 4], category=7.0)]))
    assert a.sizes.tolist() == [[40, 60]] and a.labels.tolist() == [1]


@pytest.mark.parametrize(
    "content", [b"", b"not json", b'{"images": [{"id": 1, "file_na', b"\xff\xfe\x00", b"[" * 100000], ids=repr
)
def test_not_json(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content[:100000])
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        read_annotations(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="is not a COCO annotation file"):
        read_annotations(file)
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        read_annotations(tmp_path / "absent.json")


def test_to_coco_keeps_what_an_evaluation_needs(write: Write) -> None:
    annotations = [
        box([1, 2, 3, 4], id=0, area=5.5),
        box([-1, 2, 300, 4], id=0, iscrowd=1),
        box([1, 2, 0, 4], category=90),
        box([1, 2, 3, 4], category=4),
    ]
    coco = read_annotations(write(images=[IMAGE], annotations=annotations)).to_coco()
    assert coco["categories"] == [{"id": 3, "name": "ball"}, {"id": 7, "name": "cup"}, {"id": 90, "name": "kite"}]
    assert coco["images"] == [IMAGE]
    assert coco["annotations"] == [
        {"id": 1, "image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 5.5, "iscrowd": 0},
        {"id": 2, "image_id": 5, "category_id": 3, "bbox": [-1, 2, 300, 4], "area": 1200, "iscrowd": 1},
        {"id": 3, "image_id": 5, "category_id": 90, "bbox": [1, 2, 0, 4], "area": 0, "iscrowd": 0},
    ]


@pytest.mark.parametrize("upright", [True, False], ids=["upright", "stored"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_of_a_set_are_read_by_the_rule_that_their_boxes_were_drawn_in(
    orientation: int, upright: bool, write: Write, tmp_path: Path, generator: torch.Generator
) -> None:
    """One photo, not square and lying, tells for all others, whose sizes are the same either way."""
    pixels = torch.randint(256, (8, 12, 3), generator=generator, dtype=torch.uint8).numpy()
    images = []
    for number, (photo, turn) in enumerate(((pixels[:8, :8], orientation), (pixels, 6), (pixels, 3))):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(photo).save(tmp_path / f"{number}.png", exif=exif)
        shown = ImageOps.exif_transpose(Image.open(tmp_path / f"{number}.png")) if upright else Image.fromarray(photo)
        images.append({"id": number, "file_name": f"{number}.png", "height": shown.height, "width": shown.width})
        np.save(tmp_path / f"{number}.npy", np.asarray(shown))
    data = CocoDataset(write(images=images), tmp_path)
    for number in range(3):
        want = torch.from_numpy(np.load(tmp_path / f"{number}.npy"))
        assert torch.equal(data[number].image.permute(1, 2, 0), want)


def test_photos_of_two_rules_are_refused(write: Write, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    images = []
    for number, (height, width) in enumerate(((8, 12), (12, 8), (8, 8))):
        side = (12, 8) if number < 2 else (8, 8)
        Image.new("RGB", side).save(tmp_path / f"{number}.png", exif=exif)
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
    data = CocoDataset(write(images=images), tmp_path)
    assert data[0].size == (8, 12) and data[1].size == (12, 8)
    with pytest.raises(ValueError, match=r"1\.png are on the upright photo, those of .*0\.png on the stored pixels"):
        data[2]


def test_ids_of_images_may_be_texts(write: Write, one_image: Path) -> None:
    file = write(images=[{**IMAGE, "id": "a"}], annotations=[box([1, 2, 30, 30], image="a")])
    data = CocoDataset(file, one_image)
    assert data.image_ids == ["a"]
    found = [{"image_id": "a", "category_id": 3, "bbox": [1, 2, 30, 30], "score": 0.5}]
    assert coco_metrics(data.annotations, found, data.image_ids)["AP"] == pytest.approx(1)


def test_categories_of_one_name_are_told_apart(write: Write, one_image: Path) -> None:
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]
    annotations = [box([1, 2, 30, 30], category=c) for c in (1, 2)]
    read = read_annotations(write(images=[IMAGE], annotations=annotations, categories=categories))
    found = [{"image_id": 5, "category_id": 1, "bbox": [1, 2, 30, 30], "score": 0.5}]
    assert class_metrics(read, found) == {"a (category 1)": pytest.approx(1), "a (category 2)": 0}
