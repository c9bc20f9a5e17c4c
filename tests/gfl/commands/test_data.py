# SPDX-License-Identifier: Apache-2.0
"""``gfl data``: what it says in 80 columns, the picture, and the data sets that it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import layout_writers as written
import pytest
from PIL import Image

from gfl.cli import main
from gfl.data import layouts


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> list[str]:
    assert main(["data", *words]) == status
    captured = capsys.readouterr()
    lines = (captured.err if status else captured.out).splitlines()
    assert status or all(len(line) <= 80 for line in lines)
    return lines


def test_a_table_and_a_sheet(capsys: pytest.CaptureFixture[str]) -> None:
    written.voc(Path("set"))
    lines = said(capsys, "set")
    assert lines[0] == "set: Pascal VOC XML; images: train 3, val 2"
    table = [line.split() for line in lines[3:7]]
    assert table[1:] == [["ball", "2", "2", "2", "2"], ["cup", "2", "2", "1", "1"], ["all", "3", "4", "2", "3"]]
    assert "no problems" in lines and "boxes: 7 small (below 32), 0 medium, 0 large (from 96 on)" in lines
    sheet = Image.open("data_sheet.jpg")
    assert sheet.width > 600 and len(sheet.resize((40, 40)).getcolors(1600)) > 100
    assert "pictures:" not in "".join(said(capsys, "set", "--sheet", ""))


def test_the_folder_that_one_is_in(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: the sheet that lies there by then is no image of the set."""
    written.label_studio_yolo(Path("set"))
    monkeypatch.chdir("set")
    first, second = said(capsys, "."), said(capsys, ".")
    assert first == second and first[0] == ".: YOLO text files; images: train 5"
    assert Path("data_sheet.jpg").is_file()


def test_problems_with_their_first_place_and_duplicates(capsys: pytest.CaptureFixture[str]) -> None:
    written.coco_roboflow(Path("set"))
    file = Path("set/train/_annotations.coco.json")
    content = json.loads(file.read_text())
    content["annotations"][1]["bbox"] = [30, 0, 60, 24]
    content["annotations"][0]["bbox"][2] = None
    content["images"].append({"id": 9, "file_name": "gone.jpg", "width": 8, "height": 8})
    content["images"].append({"id": 10, "file_name": "copy.jpg", "width": 48, "height": 48})
    file.write_text(json.dumps(content))
    Image.open("set/valid/e.jpg").save("set/train/copy.jpg", quality=80)
    (Path("set") / "train" / ("x" * 100 + ".jpg")).write_bytes(b"")
    text = " ".join(" ".join(said(capsys, "set")).split())
    place = "set/train/_annotations.coco.json"
    for problem in (
        f"1 images that are not there, left out (first: gone.jpg of {place}: images[3])",
        f"1 boxes that are not four finite numbers, left out (first: {place}: annotations[0])",
        "1 boxes more than a pixel over their image's edge, clipped (first: train/a.jpg)",
        "1 classes that are supercategories without a box, left out: things",
        "1 images without objects, kept",
        "1 pairs of images of two parts look the same (first: copy.jpg (train) = e.jpg (val))",
    ):
        assert problem in text, text


def test_splitting_and_classes(capsys: pytest.CaptureFixture[str]) -> None:
    written.label_studio_coco(Path("set"))
    lines = said(capsys, "set", "--split", "0.4,0.4,0.2", "--classes", "cup", "--out", "new", "--copy", "--seed", "3")
    assert lines[-1] == "written: new/annotations/instances_test.json, 1 images, " + lines[-1].split(", ")[-1]
    shutil.rmtree("set")
    parts, root, _ = layouts.read("new")
    assert {part: len(a.image_ids) for part, a in parts.items()} == {"train": 2, "val": 2, "test": 1}
    assert sum(len(a.boxes) for a in parts.values()) == 3 and all(a.classes == ["cup"] for a in parts.values())
    names = [name for a in parts.values() for name in a.file_names]
    assert len(set(names)) == 5 and all((root / name).is_file() for name in names)


def test_merging_by_the_names_of_classes(capsys: pytest.CaptureFixture[str]) -> None:
    written.voc(Path("set"))
    Path("other").mkdir()
    written.cvat_xml(Path("other"))
    file = Path("other/annotations.xml")
    file.write_text(file.read_text().replace("ball", "kite"))
    said(capsys, "set", "other", "--out", "both")
    parts, _, _ = layouts.read("both")
    for part, images in (("train", 6), ("val", 4)):
        a = parts[part]
        assert a.classes == ["ball", "cup", "kite"] and len(a.image_ids) == images
        mine, others = (a.labels[(a.rows < images // 2) == first].tolist() for first in (True, False))
        assert [{0: 2}.get(label, label) for label in mine] == others


def test_boxes_in_another_form(capsys: pytest.CaptureFixture[str]) -> None:
    written.label_studio_coco(Path("set"))
    whole = layouts.read("set")[0]["train"]
    content = json.loads(Path("set/result.json").read_text())
    for form in ("corners", "shares"):
        changed = json.loads(json.dumps(content))
        for entry in changed["annotations"]:
            x, y, w, h = entry["bbox"]
            image = next(i for i in content["images"] if i["id"] == entry["image_id"])
            shares = [x / image["width"], y / image["height"], w / image["width"], h / image["height"]]
            entry["bbox"] = [x, y, x + w, y + h] if form == "corners" else shares
        Path("set/result.json").write_text(json.dumps(changed))
        assert f"(--boxes {form} converts)" in " ".join(" ".join(said(capsys, "set")).split())
        assert "look like" not in "".join(said(capsys, "set", "--boxes", form, "--out", form))
        (new,) = layouts.read(form)[0].values()
        assert (new.boxes - whole.boxes).abs().max() < 1e-4


@pytest.mark.parametrize(
    "words, message",
    [
        (["--classes", "cat"], "has no class 'cat'; it has ball, cup"),
        (["--split", "0.9,0.9"], "shares must be positive and add up to 1 at most, got 0.9, 0.9"),
        (["--split", "1"], "`--split` must be two or three shares, as 0.8,0.2, got '1'"),
        (["--split", "a,b"], "`--split` must be two or three shares, as 0.8,0.2, got 'a,b'"),
        (["--copy"], "`--copy` needs --out DIR"),
        (["--out", "set"], "is there already and not empty"),
        (["--sheet", "set/JPEGImages/a.jpg"], "is an input"),
        (["nowhere"], "nowhere is not there"),
    ],
)
def test_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    written.voc(Path("set"))
    (line,) = said(capsys, "set", *words, status=1)
    assert line.startswith("gfl data: ") and message in line
