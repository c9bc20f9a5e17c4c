# SPDX-License-Identifier: Apache-2.0
"""Average precision: pycocotools' figures, a detector's way to them, and several processes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_cuda
import pytest
import real_data
import torch
from PIL import Image

from gfl import checkpoint, cli, models
from gfl.config import Config, preset
from gfl.data.coco import CocoDataset, read_annotations
from gfl.engine import evaluate
from gfl.engine.quality import POINT
from gfl.models.fused import FusedGFL

Draw = Callable[[int], CocoDataset]
real = pytest.mark.skipif(real_data.missing() is not None, reason=str(real_data.missing()))
STUB = Path(__file__).with_name("evaluate_stub.py")
# Of the data's own description.
REFERENCE = {"AP": 0.3644, "AP50": 0.5389, "AP75": 0.3856, "APs": 0.1303, "APm": 0.3633, "APl": 0.6727}


@pytest.fixture(scope="module")
def stub() -> ModuleType:
    specification = importlib.util.spec_from_file_location("evaluate_stub", STUB)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def draw(tmp_path: Path, generator: torch.Generator, stub: ModuleType) -> Draw:
    """Images with one rectangle of each colour, or without, and their annotations without optional keys."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def draw(images: int) -> CocoDataset:
        (tmp_path / "images").mkdir()
        entries, annotations = [], []
        for n in range(images):
            height, width = number(60, 130), number(60, 130)
            pixels = torch.zeros((height, width, 3), dtype=torch.uint8)
            for category, channel in ((11, 0), (4, 1), (8, 2)):
                if number(0, 4) == 0 and n:
                    continue
                w, h = number(20, 50), number(20, 50)
                x, y = number(0, width - w), number(0, height - h)
                pixels[y : y + h, x : x + w, channel] = 255
                annotations.append({"image_id": 50 - n, "category_id": category, "bbox": [x, y, w, h]})
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{n}.png")
            entries.append({"id": 50 - n, "file_name": f"{n}.png", "height": height, "width": width})
        content = {"images": entries, "annotations": annotations, "categories": stub.CATEGORIES}
        (tmp_path / "annotations.json").write_text(json.dumps(content))
        return CocoDataset(tmp_path / "annotations.json", tmp_path / "images")

    return draw


def settings(**values: Any) -> Config:
    return Config().replace(**{"short_side": 96, "long_side": 128, "test_batch_size": 3, "workers": 0, **values})


def pycocotools_stats(file: Path, detections: list[dict[str, Any]]) -> list[float]:
    """The library as its own documentation uses it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        evaluation = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


@real
def test_reference_detections_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detections, output = real_data.COCO / "reference_detections.json", tmp_path / "metrics.json"
    arguments = ["--detections", str(detections), "--annotations", str(real_data.annotations())]
    assert cli.main(["eval", *arguments, "--output", str(output), "--per-class"]) == 0
    metrics = json.loads(output.read_text())
    assert {key: round(metrics[key], 4) for key in REFERENCE} == REFERENCE
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "4541 detections, 47 images" and printed.err == ""
    assert lines[1].split() == ["AP", "AP50", "AP75", "small", "medium", "large"]
    assert lines[2].split() == [f"{value:.4f}" for value in REFERENCE.values()]
    assert max(map(len, lines)) < 80 and any("toothbrush" in line for line in lines)


@real
def test_figures_are_pycocotools(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other detections than the reference's: objects moved at random, some left out, some made up."""
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    content = json.loads(real_data.annotations().read_text())
    detections = []
    for a in content["annotations"]:
        for _ in range(int(torch.randint(0, 3, (), generator=generator))):
            shift = 1 + 0.2 * torch.randn(4, generator=generator)
            box = (torch.tensor(a["bbox"]) * shift).clamp(min=1).tolist()
            score = float(torch.rand((), generator=generator))
            detections.append({"image_id": a["image_id"], "category_id": a["category_id"], "bbox": box, "score": score})
    expected = pycocotools_stats(real_data.annotations(), detections)
    metrics = evaluate.coco_metrics(real_data.annotations(), detections)
    assert list(metrics) == [*evaluate.METRICS, *POINT]
    assert [metrics[name] for name in evaluate.METRICS] == expected
    by_class = evaluate.class_metrics(real_data.annotations(), detections)
    there = [value for value in by_class.values() if not math.isnan(value)]
    assert len(by_class) == 80 and len(there) == 60
    assert sum(there) / len(there) == pytest.approx(metrics["AP"], abs=1e-12)


@real
@pytest.mark.parametrize("text_ids", [False, True])
def test_the_fast_package_gives_what_pycocotools_gives(
    text_ids: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faster_coco_eval")
    data = read_annotations(real_data.annotations())
    if text_ids:
        data.image_ids = [f"photo {number}" for number in data.image_ids]
    found = []
    for a in data.to_coco()["annotations"]:
        shift = 1 + 0.2 * torch.randn(4, generator=generator)
        box = (torch.tensor(a["bbox"]) * shift).clamp(min=1).tolist()
        score = float(torch.rand((), generator=generator))
        found.append({"image_id": a["image_id"], "category_id": a["category_id"], "bbox": box, "score": score})
    chosen = data.image_ids[:40]
    used, measured = [], []
    for package in ("faster_coco_eval", "pycocotools"):
        if package == "pycocotools":
            monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
        used.append(type(evaluate.coco_evaluation(data, found, chosen)).__module__.split(".")[0])
        figures = (function(data, found, chosen) for function in (evaluate.coco_metrics, evaluate.class_metrics))
        measured.append(list(figures))
    assert used == ["faster_coco_eval", "pycocotools"]
    for one, other in zip(*measured, strict=True):
        assert one == pytest.approx(other, rel=1e-12, nan_ok=True)


def test_a_detector_from_files_to_figures(draw: Draw, stub: ModuleType) -> None:
    data, model = draw(8), stub.Finder()
    model.train()
    model.inner.eval()
    own = model.test
    metrics, detections = evaluate.evaluate(model, data, settings(score_threshold=0.25), "cpu")
    assert model.training and not model.inner.training and model.test is own
    assert set(model.thresholds) == {0.25} and len(model.thresholds) == 3
    # The finder is wrong by half a pixel of the resized image at most, and where rectangles blend.
    assert metrics["AP50"] == pytest.approx(1) and metrics["AP"] > 0.8
    assert math.isnan(metrics["APl"])
    assert [d["image_id"] for d in detections] == sorted((d["image_id"] for d in detections), key=data.image_ids.index)
    truth = data.annotations.to_coco()["annotations"]
    assert len(detections) == len(truth)
    for a in truth:
        (found,) = [d for d in detections if (d["image_id"], d["category_id"]) == (a["image_id"], a["category_id"])]
        assert found["bbox"] == pytest.approx(a["bbox"], abs=2)
    chosen = evaluate.coco_metrics(data.annotations, detections, data.image_ids[:3])
    assert chosen["AP50"] == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_a_folded_network_is_a_graph_and_is_read_once_per_batch(
    draw: Draw, cuda: fake_cuda.FakeCuda, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    data = draw(7)
    config = preset("gfl_tiny").replace(num_classes=3, workers=0, short_side=64, long_side=64, test_batch_size=2)
    config = config.replace(width=8, neck_channels=8, head_channels=8, head_convs=1, head_groups=4)
    torch.manual_seed(seed)
    model = models.build(config.model).eval()
    torch.nn.init.constant_(model.bbox_head.gfl_cls.bias, -1.5)
    wanted, on_cpu = evaluate.evaluate(FusedGFL(model), data, config, "cpu")
    wait = fake_cuda.FakeEvent.synchronize
    monkeypatch.setattr(fake_cuda.FakeEvent, "synchronize", lambda event: cuda.note("wait") or wait(event))
    metrics, found = evaluate.evaluate(FusedGFL(model), data, config, "cuda:1")
    # 3 whole batches of one shape, of which the second is captured, and half a batch.
    assert len(cuda.captures) == 1 and cuda.captures[0]["device"] == 1
    assert found == on_cpu and len(found) > 20 and metrics == pytest.approx(wanted, nan_ok=True)
    # A batch and its five tensors are queued before the host waits, once, for the one before.
    order = [action.what for action in cuda.actions if action.what in ("fetch", "wait")]
    assert order == [*["fetch"] * 10, "wait", *["fetch"] * 5, "wait", *["fetch"] * 5, "wait", "wait"]
    assert {action.stream.device.index for action in cuda.actions if action.what != "to"} == {1}


def test_undecodable_images_count_as_missed(draw: Draw, stub: ModuleType) -> None:
    data = draw(4)
    data.path(0).write_bytes(b"\x89PNG")
    with pytest.warns(UserWarning, match=r"0\.png can't be decoded"):
        metrics, detections = evaluate.evaluate(stub.Finder(), data, settings(test_batch_size=1), "cpu")
    assert {d["image_id"] for d in detections} <= {49, 48, 47}
    assert metrics["AR100"] < 1 and data.problems["images that can't be decoded, passed over"] == 1


def test_a_model_of_other_classes(draw: Draw) -> None:
    model = models.create_model("gfl_tiny", num_classes=5)
    with pytest.raises(ValueError, match=r"the model has 5 classes, .*annotations\.json lists 3"):
        evaluate.evaluate(model, draw(1), settings(), "cpu")


def test_nothing_found_and_nothing_to_find(draw: Draw) -> None:
    annotations = draw(3).annotations
    none = evaluate.coco_metrics(annotations, [])
    assert none["AP"] == none["AR100"] == 0 and math.isnan(none["APl"])
    found = [{"image_id": 50, "category_id": 8, "bbox": [1, 2, 3, 4], "score": 0.5}]
    empty = read_annotations(annotations.path)
    for name in ("boxes", "labels", "rows", "areas", "crowd", "ignored"):
        setattr(empty, name, getattr(empty, name)[:0])
    metrics = evaluate.coco_metrics(empty, found)
    assert all(math.isnan(value) for value in metrics.values())
    assert evaluate.table(metrics).splitlines()[1].split() == ["–"] * 6
    with pytest.raises(ValueError, match=r"`image_id` 7 is not in .*annotations\.json"):
        evaluate.coco_metrics(annotations, [{**found[0], "image_id": 7}])


def test_an_object_of_id_zero_is_found(draw: Draw) -> None:
    """pycocotools itself takes a match with id 0 for none."""
    data = draw(1)
    content = json.loads(data.annotations.path.read_text())
    for n, a in enumerate(content["annotations"]):
        a.update(id=n, area=a["bbox"][2] * a["bbox"][3], iscrowd=0)
    data.annotations.path.write_text(json.dumps(content))
    exact = [{**a, "score": 0.9} for a in content["annotations"]]
    assert pycocotools_stats(data.annotations.path, exact)[0] < 1
    assert evaluate.coco_metrics(data.annotations.path, exact)["AP"] == pytest.approx(1)


def test_tables_fit_a_screen() -> None:
    values = {"a name that is much longer than any column could be": 0.1234, "b": math.nan, "c": 1.0}
    lines = evaluate.class_table(values).splitlines()
    assert len(lines) == 2 and max(map(len, lines)) < 80 and "…" in lines[0] and lines[1].split() == ["b", "–"]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"annotations": []}, "a list of detections is needed"),
        ([{"category_id": 4, "bbox": [1, 2, 3, 4], "score": 1}], r"entry \[0\] has no `image_id`"),
        ([{"image_id": 1, "category_id": 4, "bbox": [1, 2, 3, 4], "score": 1}], r"`image_id` 1 is not in"),
        ([{"image_id": 50, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 1}], r"`category_id` 5 is not in"),
        ([{"image_id": 50, "category_id": 4, "score": 1}], r"entry \[0\] has no `bbox`"),
        ([{"image_id": 50, "category_id": 4, "bbox": [1, 2, 3], "score": 1}], "`bbox` must be four finite numbers"),
        ([{"image_id": 50, "category_id": 4, "bbox": [1, 2, 3, math.nan], "score": 1}], "`bbox` must be four finite"),
        ([{"image_id": 50, "category_id": 4, "bbox": [1, 2, 3, 4]}], "has no `score`"),
        ([{"image_id": 50, "category_id": 4, "bbox": [1, 2, 3, 4], "score": "1"}], "got '1'"),
        ([[1, 2]], r"entry \[0\] has no `image_id`"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_detections(
    content: Any, message: str, draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps(content))
    assert cli.main(["eval", "--detections", str(file), "--annotations", str(draw(1).annotations.path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gfl eval: ") and "found.json" in error and re.search(message, error)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "a CHECKPOINT is needed, or --detections FILE and --annotations FILE"),
        (["--detections", "d.json"], "`--detections` needs --annotations FILE"),
        (["--detections", "d.json", "--annotations", "a.json", "c.pth"], "goes without a CHECKPOINT"),
        (["--detections", "d.json", "--annotations", "a.json", "--optimize"], "goes without a CHECKPOINT"),
        (["c.pth", "--annotations", "a.json"], "`--annotations` is for --detections"),
        (["--detections", "d.json", "--annotations", "a.json"], "a.json"),
        (
            ["--detections", "d.json", "--annotations", "a.json", "--output", "no/where.json"],
            "no, the folder of no/where",
        ),
    ],
)
def test_wrong_command_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gfl eval: ") and message in error and error.count("\n") == 1


def torchrun(processes: int, *arguments: str | Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.filterwarnings("ignore:.*can't be decoded")
def test_two_processes_give_the_figures_of_one(draw: Draw, stub: ModuleType, tmp_path: Path) -> None:
    data = draw(11)
    broken = data.path(4)
    broken.write_bytes(b"")
    torchrun(2, STUB, data.annotations.path, data.images, tmp_path)
    metrics, detections = evaluate.evaluate(stub.Finder(), data, stub.CONFIG, "cpu")
    content = json.loads((tmp_path / "annotations.json").read_text())
    found = {a["image_id"] for a in content["annotations"]}
    found -= {image["id"] for image in content["images"] if image["file_name"] == broken.name}
    assert metrics["AP"] > 0.2 and {d["image_id"] for d in detections} == found
    assert data.problems["images that can't be decoded, passed over"] == 1
    one = {"metrics": metrics, "detections": detections, "problems": data.problems, "error": "broken in process 0"}
    for rank in range(2):
        # Compared as text: equal to the last bit, NaN like NaN.
        assert (tmp_path / f"{rank}.json").read_text() == json.dumps(one)


def test_a_checkpoint_by_the_command(draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network of random weights, in one process and in two."""
    data = draw(7)
    paths = {"data": str(tmp_path), "val_annotations": "annotations.json", "val_images": "images"}
    config = preset("gfl_tiny").replace(num_classes=3, workers=0, test_batch_size=2, short_side=96)
    config = config.replace(width=8, neck_channels=8, head_channels=8, head_convs=1, head_groups=4, **paths)
    torch.manual_seed(0)
    model = models.build(config.model)
    torch.nn.init.constant_(model.bbox_head.gfl_cls.bias, -1.5)
    file = tmp_path / "tiny.pth"
    meta = checkpoint.meta(config, data.classes)
    checkpoint.write(file, {"meta": meta, "state_dict": model.state_dict()})

    found = [tmp_path / f"found{world}.json" for world in (1, 2)]
    arguments = ["eval", str(file), "--device", "cpu", "--max-detections", "7", "--save-detections"]
    # Both in fresh processes of one thread: torch's own results depend on how many it started with.
    printed = torchrun(1, "-m", "gfl.cli", *arguments, found[0])
    assert printed.startswith("49 detections, 7 images\n")
    assert torchrun(2, "-m", "gfl.cli", *arguments, found[1]) == printed
    assert found[0].read_text() == found[1].read_text()
    metrics = evaluate.coco_metrics(data.annotations, json.loads(found[0].read_text()))
    assert evaluate.table(metrics) in printed

    meta["classes"] = ["green", "red", "blue"]
    checkpoint.write(file, {"meta": meta, "state_dict": model.state_dict()})
    assert cli.main(arguments[:4]) == 1
    assert re.search("class 1 of .*tiny.pth is 'red', that of .*annotations.json is 'blue'", capsys.readouterr().err)
