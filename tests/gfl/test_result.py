# SPDX-License-Identifier: Apache-2.0
"""`gfl.Result` as people use it, what a call of the detector may ask for, and the detector's own methods."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gfl import checkpoint
from gfl.detector import Detector
from gfl.result import Detection, Result

CLASSES = ["cup", "cat", "car"]


@pytest.fixture
def photo(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((150, 100), Image.Resampling.BICUBIC))


@pytest.fixture
def detector(model) -> Detector:
    return Detector(model, classes=CLASSES, score_threshold=0.1)


def test_it_is_short_and_a_sequence(detector: Detector, photo: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(photo).save(tmp_path / "a\x1bb.png")
    result = detector(tmp_path / "a\x1bb.png", edges=True)
    assert repr(result).startswith(f"Result({tmp_path}/a\\x1bb.png 150×100: ") and len(repr(result)) < 200
    assert repr(detector(photo, score_threshold=1.0)) == "Result(150×100: nothing)"
    assert repr(detector) == "Detector(resnet18, 3 classes, cpu, float32)"
    listed = list(result)
    assert all(isinstance(one, Detection) for one in listed) and listed[0] == result[0] and listed[-1] == result[-1]
    assert [one.score for one in listed] == result.scores.tolist() and listed[0].name == result.names[0]
    with pytest.raises(IndexError):
        result[len(result)]
    some = result[result.labels == result.labels[0]]
    assert set(some.names) == {result.names[0]} and len(some.edges.probabilities) == len(some) == len(some.boxes)
    assert result[:2] == result[[0, 1]] and list(result[:2]) == listed[:2]


def test_equality_does_not_raise(detector: Detector, photo: np.ndarray) -> None:
    one, same, other = detector(photo), detector(photo), detector(photo[:, ::-1])
    assert one == same and one != other and one != one[:1] and one != "text" and hash(one) == hash(same)
    assert one in [other, same] and len({one, same}) == 1


def test_pictures_and_files(detector: Detector, photo: np.ndarray, tmp_path: Path, monkeypatch) -> None:
    result = detector(photo)
    assert Image.open(io.BytesIO(result._repr_png_())).size == (150, 100)
    result.save(tmp_path / "found.png", score_threshold=0)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "found.png")), np.asarray(result.draw(0)))
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda image: shown.append(image))
    result.show()
    assert shown[0].size == (150, 100)


def test_other_forms(detector: Detector, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    result = detector(photo, edges=True)
    found = json.loads(json.dumps(result.to_dict()))
    assert (found["width"], found["height"]) == (150, 100) and len(found["detections"]) == len(result)
    assert found["detections"][0]["box"] == result[0].box and len(found["detections"][0]["edges"]["probabilities"]) == 4
    assert all(value > 0 for value in found["milliseconds"].values())
    assert "edges" not in detector(photo).to_dict()["detections"][0]
    made = types.ModuleType("supervision")
    made.Detections = types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", made)
    other = result.to_supervision()
    assert np.array_equal(other.xyxy, result.boxes.numpy()) and other.data["class_name"].tolist() == result.names
    assert other.class_id.tolist() == result.labels.tolist() and other.confidence.tolist() == result.scores.tolist()
    for name, method in (("pandas", result.to_pandas), ("supervision", result.to_supervision)):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(RuntimeError, match=f"pip install {name}"):
                method()


def test_a_data_frame(detector: Detector, photo: np.ndarray) -> None:
    pytest.importorskip("pandas")
    result = detector(photo)
    frame = result.to_pandas()
    assert list(frame.columns) == ["xmin", "ymin", "xmax", "ymax", "score", "label", "name"]
    assert frame["name"].tolist() == result.names and frame[["xmin", "ymax"]].to_numpy()[0].tolist() == [
        result[0].box[0],
        result[0].box[3],
    ]


def test_every_form_of_one_image(detector: Detector, photo: np.ndarray) -> None:
    result, content = detector(photo), io.BytesIO()
    Image.fromarray(photo).save(content, "PNG")
    transparent = np.dstack([photo, np.zeros(photo.shape[:2], np.uint8)])
    forms = (content.getvalue(), bytearray(content.getvalue()), memoryview(content.getvalue()), transparent)
    for one in forms:
        assert detector(one) == result
    assert detector([*forms]) == [result] * 4
    grey = photo[..., 0]
    assert detector(grey[..., None]) == detector(grey)
    with pytest.raises(ValueError, match="bytes of an image can't be decoded"):
        detector(b"no image")


def test_what_a_call_asks_for(detector: Detector, photo: np.ndarray) -> None:
    everything = detector(photo)
    assert {0, 1, 2} == set(everything.labels.tolist()) and len(everything) > 6
    middle = (everything.scores[3] + everything.scores[4]).item() / 2
    assert detector(photo, score_threshold=middle) == everything[:4]
    assert detector(photo, max_detections=2) == everything[:2]
    # As if the network knew no other class: these don't take the places of those.
    for asked in (["cat"], [1]):
        cats = detector(photo, classes=asked, max_detections=2)
        assert cats == everything[everything.labels == 1][:2] and len(cats) == 2
    optimized = Detector(detector.model, classes=CLASSES, score_threshold=0.1, optimize=True)
    assert set(optimized(photo, classes=["cup", 2]).labels.tolist()) == {0, 2}
    assert detector(photo) == everything
    assert {*next(detector.stream([photo], classes=["cat"])).names} == {"cat"}
    for wrong, says in (
        (["dog"], "no class 'dog'"),
        (["cta"], "did you mean `cat`"),
        ([3], "no class 3"),
        ([-1], "-1"),
    ):
        with pytest.raises(ValueError, match=says):
            detector(photo, classes=wrong)


# The detector's methods


def test_a_detector_is_saved_and_read(detector: Detector, photo: np.ndarray, tmp_path: Path) -> None:
    for name in ("best.pt", "best.safetensors"):
        if name.endswith("safetensors"):
            pytest.importorskip("safetensors")
        detector.save(tmp_path / name)
        again = Detector(tmp_path / name, "cpu", score_threshold=0.1)
        assert again.classes == CLASSES and again(photo) == detector(photo)


def test_it_is_evaluated_exported_and_trained(small, tmp_path: Path) -> None:
    from gfl.models import build

    torch.manual_seed(0)
    config = small(num_classes=2)
    first = Detector(build(config.model, config.test), "cpu", classes=["disc", "box"], config=config)
    data = tmp_path / "data"
    before = first.evaluate(data / "annotations.json", data / "images", workers=0)
    assert set(before) >= {"AP", "AP50", "APs"}
    size, outputs = first.export(tmp_path / "x.pt2", format="torch-export", size=(64, 96))
    assert size == (64, 96) and outputs == "detections"
    boxes, scores, _ = torch.export.load(tmp_path / "x.pt2").module()(torch.zeros(1, 3, 64, 96))
    assert boxes.shape[2] == 4 and scores.dim() == 2
    with pytest.raises(ValueError, match="`format` must be"):
        first.export(tmp_path / "x.onnx", format="tflite")
    weights = first.model.bbox_head.gfl_cls.weight.detach().clone()
    trained = first.train(tmp_path / "run", epochs=1, lr_drops=())
    assert isinstance(trained, Detector) and trained.classes == ["disc", "box"] and trained.category_ids == [2, 5]
    assert torch.equal(first.model.bbox_head.gfl_cls.weight, weights)
    assert not torch.equal(trained.model.bbox_head.gfl_cls.weight, weights)
    assert "start.pt" in (tmp_path / "run" / "config.json").read_text()


def test_the_hub_s_form_is_a_folder(detector: Detector, photo: np.ndarray, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    detector.save_pretrained(tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").iterdir()} >= {"model.safetensors", "config.json", "README.md"}
    content = checkpoint.read(tmp_path / "mine" / "model.safetensors")
    assert content["meta"]["classes"] == CLASSES and content["meta"]["config"]["model"]["backbone"] == "resnet18"
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "library_name: gfl-ops" in card and "object-detection" in card
    again = Detector.from_pretrained(tmp_path / "mine", device="cpu", score_threshold=0.1)
    assert again.classes == CLASSES and again(photo) == detector(photo) and isinstance(again(photo), Result)
    # Uploading is the mixin's; what it uploads is such a folder.
    from huggingface_hub import HfApi

    uploaded = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **how: types.SimpleNamespace(repo_id=how["repo_id"]))

    def upload(*_: object, **how: object) -> str:
        uploaded.update({path.name: path.stat().st_size for path in Path(how["folder_path"]).iterdir()})
        return "https://example.org"

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    detector.push_to_hub("me/mine")
    assert set(uploaded) >= {"model.safetensors", "config.json", "README.md"}


def test_without_the_hub_s_package(detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "gfl.hub", raising=False)
    for call in (lambda: detector.save_pretrained(tmp_path), lambda: Detector.from_pretrained(tmp_path)):
        with pytest.raises(RuntimeError, match=r"pip install 'gfl-ops\[hub\]'"):
            call()
