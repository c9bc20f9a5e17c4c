# SPDX-License-Identifier: Apache-2.0
"""Published weights by name, wherever a checkpoint is taken; a local server has files of the published keys."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from file_server import FileServer
from PIL import Image

import gfl
from gfl import checkpoint, zoo
from gfl.cli import main
from gfl.config import PRESETS

KEYS = {
    "gfl_r50_1x": "gfl_r50_fpn_1x_coco",
    "gfl_r101_dcn": "gfl_r101-dconv-c3-c5_fpn_ms-2x_coco",
    "gfl_x101_32x4d_dcn": "gfl_x101-32x4d-dconv-c4-c5_fpn_ms-2x_coco",
}


def weights(name: str, data: Path) -> dict[str, torch.Tensor]:
    """Of a published file's keys and shapes, in fp16 to be small; all zero but the class bias."""
    shapes = json.loads((data / "checkpoint_keys" / f"{KEYS[name]}.json").read_text())
    found = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()}
    found["bbox_head.gfl_cls.bias"][17] = 1
    return found


def publish(name: str, path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Gives a file the name that says its hash, and the table its URL."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    file = path.rename(path.with_name(f"{name}-{digest}.pth"))
    monkeypatch.setitem(zoo.TABLE, name, zoo.TABLE[name]._replace(url=f"{url}{file.name}"))
    return file.name


@pytest.fixture
def r50(server: FileServer, cache: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The server has the file of gfl_r50_1x, the cache is empty."""
    path = tmp_path / "r50.pth"
    torch.save({"meta": {}, "state_dict": weights("gfl_r50_1x", data)}, path)
    name = publish("gfl_r50_1x", path, server.url(""), monkeypatch)
    server.files[name] = (tmp_path / name).read_bytes()
    return cache


def test_a_name_is_taken_wherever_a_checkpoint_is(
    r50: Path, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48)).save("photo.png")
    detector = gfl.Detector("gfl_r50_1x", "cpu")
    assert detector.classes[0] == "person" and detector.category_ids[17] == 19 and len(detector.classes) == 80
    assert detector.model.config.head_groups == 32 and detector.model.test.short_side == 800
    assert detector.model.bbox_head.gfl_cls.bias[17].item() == 1
    model = gfl.create_model("gfl_r50_1x", pretrained=True)
    assert model.bbox_head.gfl_cls.bias[17].item() == 1
    other = gfl.create_model("gfl_r50_1x", 3, pretrained=True)
    assert not other.backbone.conv1.weight.any() and other.bbox_head.gfl_cls.weight.any()
    assert main(["convert", "gfl_r50_1x", "r50.pt"]) == 0
    _, _, classes, ids = checkpoint.model_from("r50.pt")
    assert classes == list(zoo.CATEGORIES.values()) and ids == list(zoo.CATEGORIES)
    assert len(server.requests) == 1  # Once for all of them.
    capsys.readouterr()
    assert main(["models"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert next(row for row in rows if row.startswith("gfl_r50_1x")).endswith("yes")
    assert next(row for row in rows if row.startswith("gfl_r50_2x")).endswith("no")


def test_a_training_starts_from_a_name(r50: Path, small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gfl.engine.train import train

    config = small(
        init="gfl_r50_1x", epochs=1, short_side=32, long_side=32, train_short_side=(32, 32), max_detections=1
    )
    whole = gfl.preset("gfl_r50_1x").replace(num_classes=2)
    config.model = whole.model
    train(config, tmp_path / "run", device="cpu", progress=False)
    log = (tmp_path / "run" / "train.log").read_text()
    note = "the weights are for 80 classes, the model has 2: new are the class outputs of bbox_head.gfl_cls, "
    assert note + "all else is taken over" in log


@pytest.mark.parametrize(("name", "stages"), [("gfl_r101_dcn", (3, 4, 5)), ("gfl_x101_32x4d_dcn", (4, 5))])
def test_files_of_version_1_are_known_by_their_keys(
    name: str, stages: tuple[int, ...], cache: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    torch.save({"state_dict": weights(name, data)}, cache / "x.pth")
    publish(name, cache / "x.pth", "http://127.0.0.1:9/", monkeypatch)
    model, config, classes, _ = checkpoint.model_from(name)
    assert (config.model.dcn, config.model.dcn_stages) == ("v1", stages) and classes[-1] == "toothbrush"
    assert PRESETS[name]().model == config.model == model.config


def test_without_a_network_one_message_says_what_to_fetch(cache: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth"
    monkeypatch.setitem(zoo.TABLE, "gfl_r50_1x", zoo.TABLE["gfl_r50_1x"]._replace(url=url))
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    assert main(["detect", "gfl_r50_1x", str(tmp_path / "photo.jpg"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(rf"not downloaded .*: fetch {url} and put it into {cache}$", error)


def test_names_that_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no published weights of that name; did you mean `gfl_r50_1x`"):
        gfl.Detector("gfl_r50_1")
    with pytest.raises(ValueError, match=r"'gfl_r18_1x', and no published weights"):
        gfl.create_model("gfl_r18_1x", pretrained=True)
    with pytest.raises(FileNotFoundError):
        gfl.Detector(tmp_path / "best.pt")
    with pytest.raises(ValueError, match="leave `config` out"):
        gfl.Detector("gfl_r50_1x", config=gfl.preset("gfl_r50_2x"))
    monkeypatch.chdir(tmp_path)
    Path("gfl_r50_1x").write_bytes(b"a file of that name comes first")
    with pytest.raises(ValueError, match="gfl_r50_1x: truncated, or not a checkpoint"):
        gfl.Detector("gfl_r50_1x")


def test_the_table(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads((data / "zoo.json").read_text())["models"]
    for entry in listed:
        name = entry["preset"].split()[0]
        if name in PRESETS:
            assert zoo.TABLE[name][:3] == (name, entry["url"], entry["box_ap"])
    assert {entry["preset"].split()[0] for entry in listed} >= set(zoo.TABLE)
    instances = json.loads((data / "coco_val2017_47" / "instances_val2017_47.json").read_text())
    assert {c["id"]: c["name"] for c in instances["categories"]} == zoo.CATEGORIES
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines) and {
        line.split()[0] for line in lines[1 : 1 + len(zoo.TABLE)]
    } == set(zoo.TABLE)
    assert re.search(r"^gfl_r50_1x +32\.44 M +217\.98 +800×1344 +40\.2 +130 MB", "\n".join(lines), flags=re.MULTILINE)


def test_every_command_takes_a_name(
    server: FileServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """With a small network in the place of a published one, since these run it."""
    monkeypatch.chdir(tmp_path)
    fields = {"width": 8, "neck_channels": 8, "head_channels": 8, "head_convs": 1, "head_groups": 2}
    config = gfl.preset("gfl_tiny").replace(short_side=64, long_side=64, **fields)
    monkeypatch.setitem(PRESETS, "gfl_small", lambda: config)
    monkeypatch.setitem(zoo.TABLE, "gfl_small", zoo.TABLE["gfl_r50_1x"]._replace(preset="gfl_small"))
    plain = {key: value.clone() for key, value in gfl.create_model("gfl_small").state_dict().items()}
    torch.save({"state_dict": plain}, "x.pth")
    name = publish("gfl_small", tmp_path / "x.pth", server.url(""), monkeypatch)
    server.files[name] = (tmp_path / name).read_bytes()
    Image.new("RGB", (64, 64)).save("a.png")
    image = {"id": 1, "file_name": "a.png", "width": 64, "height": 64}
    box = {"id": 1, "image_id": 1, "category_id": 19, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    categories = [{"id": number, "name": text} for number, text in zoo.CATEGORIES.items()]
    Path("a.json").write_text(json.dumps({"images": [image], "annotations": [box], "categories": categories}))
    data = "--data . --val-annotations a.json --val-images . --workers 0"
    for words in (
        f"eval gfl_small {data} --device cpu",
        "export gfl_small --out x.pt2 --format torch-export",
        "detect gfl_small a.png --out found --score 0 --device cpu",
        "convert gfl_small ours.pt",
        f"train --config gfl_small --init gfl_small --out run {data} --train-annotations a.json --train-images . "
        "--epochs 1 --lr-drops 9 --batch-size 1 --train-short-side 64,64 --train-long-side 64 --device cpu",
    ):
        assert main(words.split()) == 0, capsys.readouterr().err
    found = json.loads(Path("found/detections.json").read_text())
    assert {c["id"]: c["name"] for c in found["categories"]} == zoo.CATEGORIES
    assert len(server.requests) == 1
