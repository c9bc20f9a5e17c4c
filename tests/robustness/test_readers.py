# SPDX-License-Identifier: Apache-2.0
"""Every reader of files against drawn values: what is taken is sound, what is not is a named error, nothing else."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path

import file_fuzz as fuzz
import layout_writers
import pytest
import torch

from gfl import checkpoint, files
from gfl.config import Config, preset
from gfl.data import layouts
from gfl.data.coco import CocoDataset, read_annotations, read_detections
from gfl.data.transforms import UnreadableImage, read_image
from gfl.engine import evaluate
from gfl.engine.folder import stored_config
from gfl.models import build

FIELDS = {"num_classes": 2, "width": 8, "neck_channels": 8, "head_channels": 8, "head_convs": 1, "head_groups": 2}
SHAPE = preset("gfl_tiny").replace(**FIELDS)


@pytest.fixture
def draw(seed: int) -> random.Random:
    return random.Random(seed)


def test_annotations(tmp_path: Path, draw: random.Random) -> None:
    """A changed place costs its box, with a count, or the file is refused by name; the other boxes stay as they are."""
    content = fuzz.data_set(tmp_path)
    path = tmp_path / "annotations.json"
    whole = read_annotations(path)
    taken = 0
    for what, changed in fuzz.changes(content, draw, 400):
        path.write_text(fuzz.written(changed))
        try:
            data = CocoDataset(path, tmp_path / "images")
            read = data.annotations
        except (ValueError, FileNotFoundError) as error:
            assert "annotations.json" in str(error), what
            continue
        taken += 1
        assert read.boxes.isfinite().all() and read.areas.isfinite().all(), what
        lost = len(whole.boxes) - len(read.boxes)
        counted = sum(n for text, n in read.problems.items() if "left out" in text)
        assert lost == counted or len(changed["annotations"]) < len(content["annotations"]), what
        # A single box decides over no more than itself.
        if "'annotations', " in what:
            assert lost <= 1, what
        evaluate.coco_metrics(read, []) if taken % 40 == 0 else None
    assert taken > 100


@pytest.mark.parametrize(
    ("value", "crowd"),
    [(0, False), (1, True), (False, False), (True, True), (None, False), ("0", False), ("1", True), ("false", False),
     ("True", True), (1.0, True), (2, None), ("no", None), (float("nan"), None), ([], None), ({}, None)],
)  # fmt: skip
@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_truth(key: str, value: object, crowd: bool | None, tmp_path: Path) -> None:
    content = fuzz.data_set(tmp_path)
    content["annotations"][0][key] = value
    (tmp_path / "annotations.json").write_text(fuzz.written(content))
    read = read_annotations(tmp_path / "annotations.json")
    if crowd is None:
        assert len(read.boxes) == 5
        assert read.problems == {"boxes with `iscrowd` or `ignore` neither true nor false, left out": 1}
    else:
        assert (read.crowd if key == "iscrowd" else read.ignored).tolist() == [crowd] + [False] * 5


def test_detections(tmp_path: Path, draw: random.Random) -> None:
    content = fuzz.data_set(tmp_path)
    annotations = read_annotations(tmp_path / "annotations.json")
    path = tmp_path / "found.json"
    sound = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": draw.random()}
        for a in content["annotations"]
    ]
    full = {**content, "annotations": [{**a, "score": 0.5} for a in content["annotations"]]}
    for original in (sound, full):
        for what, changed in fuzz.changes(original, draw, 150):
            path.write_text(fuzz.written(changed))
            try:
                found = read_detections(path, annotations)
            except ValueError as error:
                assert "found.json" in str(error), what
                continue
            numbers = torch.tensor([[*d["bbox"], d["score"]] for d in found], dtype=torch.float64)
            assert numbers.isfinite().all(), what
            assert {d["category_id"] for d in found} <= {1, 2} and {d["image_id"] for d in found} <= {1, 2, 3}, what


def test_detections_of_a_program(tmp_path: Path) -> None:
    """Numbers in every form that Python has, with the same result; what is no number is refused and never decides."""
    content = fuzz.data_set(tmp_path)
    annotations = read_annotations(tmp_path / "annotations.json")
    for form in range(5):
        found = [
            {
                "image_id": a["image_id"],
                "category_id": a["category_id"],
                "bbox": [fuzz.numbers_like(float(x))[form] for x in a["bbox"]],
                "score": fuzz.numbers_like(0.5)[form],
            }
            for a in content["annotations"]
        ]
        assert evaluate.coco_metrics(annotations, found)["AP"] == pytest.approx(1)
    for score in (float("nan"), "0.5", None, True):
        with pytest.raises(ValueError, match=r"entry \[0\]: `score` must be a finite number"):
            evaluate.coco_metrics(annotations, [{**found[0], "score": score}])


def test_configurations(tmp_path: Path, draw: random.Random) -> None:
    path = tmp_path / "config.json"
    sound = preset("gfl_tiny").to_dict()
    for what, changed in fuzz.changes(sound, draw, 400):
        path.write_text(fuzz.written(changed))
        try:
            config = preset(str(path))
        except ValueError as error:
            assert "config.json" in str(error), what
            continue
        for section in (config.model, config.data, config.train, config.test):
            for name, value in vars(section).items():
                numbers = value if isinstance(value, tuple) else (value,)
                assert all(abs(x) < float("inf") for x in numbers if isinstance(x, float)), (what, name)
                assert type(value) is type(getattr(Config().replace(**{name: value}), "x", value))
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="holds no training"):
        stored_config(tmp_path)


def test_a_small_configuration_that_stands_for_billions_of_values(tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    nested = ", ".join([f"&a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]" for n in range(10)])
    for place in ("[{}]", "model: [{}]", "model: {{backbone: [{}]}}", "train: {{epochs: [{}], lr: 1}}"):
        (tmp_path / "config.yaml").write_text(place.format(nested))
        with pytest.raises(ValueError, match=r"config\.yaml is not a configuration: gfl\."):
            preset(str(tmp_path / "config.yaml"))


def test_what_a_checkpoint_says_of_itself(tmp_path: Path, draw: random.Random) -> None:
    """A changed value is taken, or refused with the file's name, before memory is taken for it."""
    path = tmp_path / "last.pt"
    weights = dict(build(SHAPE.model, SHAPE.test).state_dict())
    sound = checkpoint.meta(SHAPE, ["a", "b"])
    checkpoint.write(path, {"meta": sound, "state_dict": weights})
    assert checkpoint.model_from(path).classes == ["a", "b"]
    model = sound["config"]["model"]
    chosen = [
        *(
            {**sound, "config": {**sound["config"], "model": {**model, name: value}}}
            for name, value in (("neck_channels", 10**30), ("head_channels", 2**62), ("head_convs", 10**7))
        ),
        *({**sound, "classes": names} for names in (["a", 1], ["a"], ["a", "b", "c"], "ab", None)),
        *({**sound, "category_ids": ids} for ids in ([1], [1, 2, 3], [1, "2"], [1.5, 2], "12")),
    ]
    for changed in chosen:
        checkpoint.write(path, {"meta": changed, "state_dict": weights})
        with pytest.raises(ValueError, match=r"last\.pt"):
            checkpoint.model_from(path)
    for what, changed in fuzz.changes({"meta": sound}, draw, 60):
        torch.save({**changed, "state_dict": weights}, path)
        try:
            loaded = checkpoint.model_from(path, SHAPE if "meta" not in changed else None)
        except ValueError as error:
            assert "last.pt" in str(error), what
        else:
            count = loaded.config.model.num_classes
            assert len(loaded.classes or range(count)) == len(loaded.category_ids or range(count)) == count, what


@pytest.mark.parametrize("older", [False, True], ids=["zip", "legacy"])
def test_damaged_checkpoints(older: bool, tmp_path: Path, draw: random.Random) -> None:
    """A file of `write` is refused after any damage; others are refused or read as numbers, and nothing runs."""
    path = tmp_path / "last.pt"
    model = build(SHAPE.model, SHAPE.test)
    content = {"meta": checkpoint.meta(SHAPE, ["a", "b"]), "state_dict": model.state_dict()}
    if older:
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        checkpoint.write(path, content)
    whole = path.read_bytes()
    ends = [(f"{n} bytes less", whole[:-n]) for n in (1, 2, 70, 71, 72, 73, 74, 93, 100)]
    ends += [(f"flip {n} from the end", whole[:-n] + bytes([whole[-n] ^ 4]) + whole[len(whole) - n + 1 :])
             for n in (1, 40, 71, 72, 73, 74, 93, 94)]  # fmt: skip
    for what, damaged in [*fuzz.damages(whole, draw, 60), *ends]:
        path.write_bytes(damaged)
        try:
            checkpoint.read(path)
        except ValueError as error:
            assert "last.pt" in str(error), what
        else:
            assert older, f"{what} was not noticed"


def test_checkpoints_of_other_programs_are_checked_by_their_checksums(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "x.pt"
    torch.manual_seed(seed)
    torch.save({"state_dict": {"a": torch.randn(50_000), "b": torch.randn(50_000)}}, path)
    whole = bytearray(path.read_bytes())
    whole[100_000] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"x\.pt: damaged: the checksum of its record .*data/. is wrong"):
        checkpoint.read(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": {"a": torch.ones(4)}}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.read(path)["state_dict"]["a"].tolist() == [1.0] * 4


def test_several_threads_read_what_asks_for_inert_objects(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    path = tmp_path / "m.pth"
    torch.save({"hub": {"x": np.float64(1.5), "y": np.arange(3)}, "state_dict": {"a": torch.zeros(10)}}, path)
    before = len(torch.serialization.get_safe_globals())
    errors: list[Exception] = []

    def read() -> None:
        for _ in range(25):
            try:
                checkpoint.read(path)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(torch.serialization.get_safe_globals()) == before


def test_a_file_that_asks_for_more_memory_than_it_holds(tmp_path: Path) -> None:
    model = build(SHAPE.model, SHAPE.test)
    weights = dict(model.state_dict())
    weights["bbox_head.gfl_cls.bias"] = torch.zeros(1).expand(10**12)
    torch.save(weights, tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"bbox_head.gfl_cls.bias claims to have 1000000000000 numbers"):
        checkpoint.model_from(tmp_path / "wide.pt")
    # A configuration of a network that would need terabytes, with the weights of a small one.
    huge = SHAPE.replace(neck_channels=10**6, head_channels=10**6)
    checkpoint.write(
        tmp_path / "huge.pt", {"meta": checkpoint.meta(huge, ["a", "b"]), "state_dict": model.state_dict()}
    )
    with pytest.raises(ValueError, match=r"huge\.pt: the weights are not this model's"):
        checkpoint.model_from(tmp_path / "huge.pt")
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("x/data.pkl", bytes(10**8))
    with pytest.raises(ValueError, match=r"bomb\.pt: damaged: its records claim 100000000 bytes"):
        checkpoint.read(tmp_path / "bomb.pt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders there")
def test_pipes_devices_and_large_files_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(UnreadableImage, match=f"{name} can't be decoded: not a regular file"):
            read_image(tmp_path / name)
        for reader in (checkpoint.read, read_annotations, files.read_bytes):
            with pytest.raises(OSError, match="not a regular file"):
                reader(tmp_path / name)
    (tmp_path / "large").write_bytes(bytes(2000))
    monkeypatch.setattr("gfl.data.transforms.LARGEST_FILE", 1000)
    with pytest.raises(UnreadableImage, match="large can't be decoded: larger than"):
        read_image(tmp_path / "large")


def test_images(tmp_path: Path, draw: random.Random) -> None:
    fuzz.data_set(tmp_path, 1)
    path = tmp_path / "images" / "1.png"
    whole = path.read_bytes()
    for what, damaged in fuzz.damages(whole, draw, 150):
        path.write_bytes(damaged)
        try:
            assert read_image(path).shape[0] == 3, what
        except UnreadableImage as error:
            assert "1.png" in str(error), what


def test_deep_and_long_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("[" * 10**5, '{"a":' * 10**5, '{"images":[{"id":' + "1" * 5000 + "}]}", "\ufeff{}", ""):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"x\.json"):
            read_annotations(path)
    json.dumps(text)


@pytest.mark.parametrize(
    "format", ["coco_roboflow", "label_studio", "label_studio_min", "labelme", "voc", "cvat_xml", "csv_roboflow"]
)
def test_layouts(format: str, tmp_path: Path, draw: random.Random) -> None:
    """A changed place of a labelling tool's file costs what it describes, or the data are refused by a named error."""
    layout_writers.WRITERS[format](tmp_path)
    (path, *_) = sorted(p for p in tmp_path.rglob("*") if p.suffix in (".json", ".xml", ".csv"))
    whole = path.read_bytes()
    if path.suffix == ".json":
        cases = ((what, fuzz.written(c).encode()) for what, c in fuzz.changes(json.loads(whole), draw, 120))
    else:
        cases = fuzz.damages(whole, draw, 60)
    taken = 0
    for what, content in cases:
        path.write_bytes(content)
        try:
            parts, _, _ = layouts.read(tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error), what
            continue
        taken += 1
        assert all(bool(a.boxes.isfinite().all()) for a in parts.values()), what
    # Damage to one file of XML is damage to all of it.
    assert taken > (0 if format == "cvat_xml" else 20)
