# SPDX-License-Identifier: Apache-2.0
"""Data sets as labelling tools and other trainers write them: all give the same boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layout_writers as written
import pytest
from PIL import Image

from gfl.config import Config
from gfl.data import layouts, sets
from gfl.data.coco import Annotations, CocoDataset

# Formats that do not say which images are for validation.
ONE_PART = {"label_studio_min", "label_studio", "label_studio_coco", "label_studio_yolo"}


def boxes(annotations: Annotations) -> dict[str, list[tuple[str, list[float]]]]:
    """The boxes of each image by the letter of its name."""
    found: dict[str, list[tuple[str, list[float]]]] = {}
    for name in annotations.file_names:
        found[Path(name).stem.removeprefix("0a1b2c3d-")[0]] = []
    for row, label, box in zip(annotations.rows.tolist(), annotations.labels.tolist(), annotations.boxes.tolist()):
        letter = Path(annotations.file_names[row]).stem.removeprefix("0a1b2c3d-")[0]
        found[letter].append((annotations.classes[label], [round(side, 4) for side in box]))
    return found


def truth(part: str | None) -> dict[str, list[tuple[str, list[float]]]]:
    return {
        name: [(written.CLASSES[c], [x1, y1, x2 - x1, y2 - y1]) for c, x1, y1, x2, y2 in objects]
        for name, (of, _, objects) in written.TRUTH.items()
        if part in (None, of)
    }


@pytest.mark.parametrize("format", written.WRITERS)
def test_every_format_gives_the_same_boxes(format: str, tmp_path: Path) -> None:
    if "yolo" in format:
        pytest.importorskip("yaml")
    (tmp_path / "set").mkdir()
    source = written.WRITERS[format](tmp_path / "set")
    parts, root, kind = layouts.read(source)
    expected = [None] if format in ONE_PART else ["train", "val"]
    assert [boxes(parts[part or "train"]) for part in expected] == [truth(part) for part in expected], kind
    assert len(parts) == len(expected)
    for a in parts.values():
        names = [name for name in a.classes if name != "things"]
        assert names == list(written.CLASSES)
        assert all((root / name).is_file() for name in a.file_names)
        assert not a.problems, a.problems


@pytest.mark.parametrize("format", written.WRITERS)
def test_a_configuration_takes_every_format(format: str, tmp_path: Path) -> None:
    if "yolo" in format:
        pytest.importorskip("yaml")
    (tmp_path / "set").mkdir()
    data = Config().replace(data=written.WRITERS[format](tmp_path / "set")).data
    train, val = (sets.dataset(data, part) for part in ("train", "val"))
    assert train is not None and val is not None
    assert train.classes == val.classes == list(written.CLASSES)
    names = [{Path(name).stem for name in one.annotations.file_names} for one in (train, val)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 5
    assert len(names[1]) == (1 if format in ONE_PART else 2)
    for one in (train, val):
        for index in range(len(one)):
            sample = one[index]
            assert sample.size == tuple(sample.image.shape[1:]) and len(sample.labels)
    # Read again, as for a resumed training, it is the same to the bit.
    again = sets.dataset(data, "train")
    assert again is not None and again.digest() == train.digest()


def test_typed_names_and_cocos_own_go_first(tmp_path: Path) -> None:
    written.coco_cvat(tmp_path)
    names = {"train_annotations": "annotations/instances_val.json", "train_images": "images/val"}
    data = Config().replace(data=tmp_path, **names).data
    train = sets.dataset(data, "train")
    assert train is not None and boxes(train.annotations) == truth("val") and train.images == tmp_path / "images/val"
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        sets.dataset(Config().replace(data=tmp_path, train_annotations="absent.json").data, "train")
    assert sets.dataset(Config().replace(data=tmp_path, val_annotations="").data, "val") is None
    (tmp_path / "annotations" / "instances_train.json").rename(tmp_path / "annotations" / "instances_train2017.json")
    (tmp_path / "images" / "train").rename(tmp_path / "train2017")
    train = sets.dataset(Config().replace(data=tmp_path).data, "train")
    assert train is not None and train.images == tmp_path / "train2017" and boxes(train.annotations) == truth("train")


def test_images_are_held_out_by_their_names(tmp_path: Path) -> None:
    written.label_studio_coco(tmp_path)
    for share, expected in ((0.2, 1), (0.5, 2), (0.0, 0)):
        data = Config().replace(data=tmp_path, val_share=share).data
        train, val = sets.dataset(data, "train"), sets.dataset(data, "val")
        assert train is not None and len(train) == 5 - expected
        assert len(val) == expected if val is not None else expected == 0
    with pytest.raises(ValueError, match=r"`val_share` must be at least 0 and below 1, got 1\.0"):
        sets.dataset(Config().replace(data=tmp_path, val_share=1).data, "train")


def test_a_typed_file_is_not_held_out_of(tmp_path: Path) -> None:
    """All images of a typed training file are trained on, so none of them can be validation data."""
    written.coco_cvat(tmp_path)
    (tmp_path / "annotations/instances_val.json").unlink()
    file, images = "annotations/instances_train.json", "images/train"
    data = Config().replace(data=tmp_path, train_annotations=file, train_images=images).data
    train = sets.dataset(data, "train")
    assert train is not None and sets.dataset(data, "val") is None
    typed = Config().replace(data=tmp_path, val_annotations=file, val_images=images).data
    again, val = sets.dataset(typed, "train"), sets.dataset(typed, "val")
    assert again is not None and val is not None and len(again) == len(val) == len(train)


def test_ghost_classes_go_and_empty_classes_are_named(tmp_path: Path) -> None:
    written.coco_roboflow(tmp_path)
    for part in ("train", "valid"):
        file = tmp_path / part / "_annotations.coco.json"
        content = json.loads(file.read_text())
        content["categories"].append({"id": 3, "name": "kite", "supercategory": "things"})
        file.write_text(json.dumps(content))
    train = sets.dataset(Config().replace(data=tmp_path).data, "train")
    assert train is not None and train.classes == ["ball", "cup", "kite"]
    assert train.problems["classes that are supercategories without a box, left out: things"] == 1
    assert train.problems["classes without a box: kite"] == 1
    # A model that has the class keeps it.
    kept = sets.dataset(Config().replace(data=tmp_path).data, "val", ["things", "ball", "cup", "kite"])
    assert kept is not None and kept.classes == ["things", "ball", "cup", "kite"]


def test_categories_of_one_name_stay_apart(tmp_path: Path) -> None:
    written.coco_cvat(tmp_path)
    for part in ("train", "val"):
        file = tmp_path / "annotations" / f"instances_{part}.json"
        file.write_text(file.read_text().replace("cup", "ball"))
    train = sets.dataset(Config().replace(data=tmp_path).data, "train")
    assert train is not None and train.classes == ["ball", "ball"] and set(train.annotations.labels.tolist()) == {0, 1}


def coco_of(tmp_path: Path, change: Any) -> CocoDataset:
    """The set as Label Studio's COCO file, changed."""
    written.label_studio_coco(tmp_path)
    content = json.loads((tmp_path / "result.json").read_text())
    change(content)
    (tmp_path / "result.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    found = sets.dataset(Config().replace(data=tmp_path, val_share=0, keep_empty=True).data, "train")
    assert found is not None
    return found


@pytest.mark.parametrize(
    "place, change, problem, images",
    [
        ("annotations", {"bbox": [1, 2, float("nan"), 4]}, "boxes that are not four finite numbers, left out", 5),
        ("annotations", {"bbox": "1 2 3 4"}, "boxes that are not four finite numbers, left out", 5),
        ("annotations", {"image_id": 99}, "boxes of unknown images, left out", 5),
        ("annotations", {"image_id": None}, "boxes of unknown images, left out", 5),
        ("annotations", {"category_id": 99}, "boxes of unknown categories, left out", 5),
        ("annotations", {"iscrowd": "yes"}, "boxes with `iscrowd` or `ignore` neither true nor false, left out", 5),
        ("annotations", None, "boxes of unknown images, left out", 5),
        ("images", {"file_name": "gone.jpg"}, "images that are not there, left out", 4),
        ("images", {"file_name": None}, "images without an id or a file name, left out", 4),
        ("images", {"id": 2}, "images whose id comes twice, the second left out", 4),
        ("images", {"width": 63}, "images of another size than their annotations say, left out", 4),
        ("images", {"width": None}, "", 5),
        ("images", {"height": "?"}, "", 5),
        ("images", None, "images without an id or a file name, left out", 4),
        ("categories", {"id": None}, "categories without an id or a name, left out", 5),
    ],
)
def test_one_wrong_entry_costs_no_more_than_itself(
    place: str, change: Any, problem: str, images: int, tmp_path: Path
) -> None:
    def wrong(content: dict[str, Any]) -> None:
        content[place][0] = None if change is None else content[place][0] | change

    found = coco_of(tmp_path, wrong)
    assert len(found.annotations.image_ids) == images
    if problem:
        assert found.problems[problem] >= 1
        (line,) = (line for line in found.problems.lines() if problem in line)
        assert "(first: " in line
    else:
        assert set(found.problems) == {"images in the format COCO JSON"}


def test_iscrowd_as_text(tmp_path: Path) -> None:
    def texts(content: dict[str, Any]) -> None:
        for number, entry in enumerate(content["annotations"]):
            entry["iscrowd"] = "1" if number == 0 else "0"

    assert coco_of(tmp_path, texts).annotations.crowd.tolist() == [True] + [False] * 6


def test_boxes_in_another_unit_are_said_so(tmp_path: Path) -> None:
    def shares(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            entry["bbox"] = [side / 100 for side in entry["bbox"]]

    def corners(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            x, y, width, height = entry["bbox"]
            entry["bbox"] = [x, y, x + width, y + height]

    (tmp_path / "s").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "ok").mkdir()
    found = coco_of(tmp_path / "s", shares)
    assert any("look like shares of the image" in line for line in found.problems.lines())
    assert any("look like two corners" in line for line in coco_of(tmp_path / "c", corners).problems.lines())
    assert not any("look like" in line for line in coco_of(tmp_path / "ok", lambda content: None).problems.lines())


def test_files_of_one_image_that_cannot_be_read(tmp_path: Path) -> None:
    written.voc(tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation><object>")
    (tmp_path / "JPEGImages" / "d.jpg").write_bytes(b"no image")
    parts, _, _ = layouts.read(tmp_path)
    assert boxes(parts["train"]) == {k: v for k, v in truth("train").items() if k != "a"}
    assert boxes(parts["val"]) == {k: v for k, v in truth("val").items() if k != "d"}
    problems = parts["train"].problems + parts["val"].problems
    assert problems["annotation files that can't be read, left out"] == 1
    assert problems["images that can't be decoded, left out"] == 1


def test_lines_of_yolo(tmp_path: Path) -> None:
    """An outline becomes the box around it; what is wrong costs no more than itself."""
    pytest.importorskip("yaml")
    written.yolo_images_labels(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").write_text(
        "0 .125 .25 .5 .25 .5 .75\n1 .5 .5 .25 .5 0.9\n1.0 .5 .5 .25\n7 .5 .5 .5 .5\nx .5 .5 .5 .5\n0 nan .5 .5 .5\n\n"
    )
    (tmp_path / "labels" / "train" / "b.txt").unlink()
    parts, _, _ = layouts.read(tmp_path)
    assert boxes(parts["train"])["a"] == [("ball", [8, 12, 24, 24]), ("cup", [24, 12, 16, 24])]
    assert boxes(parts["train"])["b"] == []
    assert parts["train"].problems == {
        "boxes that are not four finite numbers, left out": 2,
        "boxes of unknown categories, left out": 2,
        "images without a label file, taken for background": 1,
    }
    place = parts["train"].problems.first["boxes of unknown categories, left out"]
    assert place.endswith("a.txt:4")
    for path in (tmp_path / "labels").rglob("*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match="none of 5 images has a label file"):
        layouts.read(tmp_path)


def test_turned_boxes_and_other_shapes(tmp_path: Path) -> None:
    written.photo(tmp_path / "a.jpg", 0, (80, 80))
    shapes = (
        '<box label="x" xtl="20" ytl="30" xbr="60" ybr="50" rotation="90"/>'
        '<ellipse label="x" cx="40" cy="30" rx="10" ry="20"/>'
        '<polygon label="x" points="1,2;9,4;5,20"/><points label="x" points="1,2"/><tag label="x"/>'
        '<mask label="x" rle="1" left="3" top="4" width="5" height="6"/>'
    )
    image = f'<image id="0" name="a.jpg" width="80" height="80">{shapes}</image>'
    (tmp_path / "annotations.xml").write_text(f"<annotations>{image}</annotations>")
    (parts, _, _) = layouts.read(tmp_path)
    found = [box for _, box in boxes(parts["train"])["a"]]
    assert found == [[30, 20, 20, 40], [30, 10, 20, 40], [1, 2, 8, 18], [3, 4, 5, 6]]
    assert parts["train"].problems["shapes that have no box (points, skeletons, cuboids), left out"] == 1


def test_photos_with_an_orientation_are_upright(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    written.yolo_images_labels(tmp_path)
    file = tmp_path / "images" / "train" / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    train = sets.dataset(Config().replace(data=tmp_path).data, "train")
    assert train is not None and boxes(train.annotations) == truth("train")
    assert {tuple(train[i].image.shape[1:]) for i in range(3)} == {(48, 64), (80, 40), (64, 64)}


def test_classes_of_a_model_give_the_labels(tmp_path: Path) -> None:
    written.voc(tmp_path)
    data = Config().replace(data=tmp_path).data
    val = sets.dataset(data, "val", ["person", "cup", "ball"])
    assert val is not None and val.classes == ["person", "cup", "ball"] and boxes(val.annotations) == truth("val")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no images and no annotations that are known: YOLO"):
        layouts.read(tmp_path)
    (tmp_path / "export.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"unpack export\.zip first"):
        layouts.read(tmp_path)
    with pytest.raises(ValueError, match=r"unpack .*export\.zip first"):
        layouts.read(tmp_path / "export.zip")
    with pytest.raises(FileNotFoundError, match="absent"):
        layouts.read(tmp_path / "absent")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"x\.csv is in no format that is known"):
        layouts.read(tmp_path / "x.csv")


def test_several_files_of_one_part_are_named(tmp_path: Path) -> None:
    written.coco_cvat(tmp_path)
    for name in ("train_one.json", "train_two.json"):
        content = (tmp_path / "annotations" / "instances_train.json").read_text()
        (tmp_path / "annotations" / name).write_text(content)
    assert len(layouts.read(tmp_path)[0]) == 2  # "instances" decides
    (tmp_path / "annotations" / "instances_train.json").unlink()
    with pytest.raises(ValueError, match=r"several annotation files for train: .*train_one\.json, .*train_two\.json"):
        layouts.read(tmp_path)
