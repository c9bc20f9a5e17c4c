# SPDX-License-Identifier: Apache-2.0
"""Reading, writing, and loading checkpoints: our own, other systems', and broken ones."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gfl import checkpoint
from gfl.config import Config, preset
from gfl.models import GFL, build, create_model

FIELDS = {"num_classes": 4, "width": 8, "neck_channels": 16, "head_channels": 16, "head_convs": 1, "head_groups": 4}


@pytest.fixture
def config() -> Config:
    return preset("gfl_tiny").replace(**FIELDS)


@pytest.fixture
def model(config: Config, seed: int) -> GFL:
    torch.manual_seed(seed)
    return build(config.model, config.test).eval()


def own(model: GFL, config: Config, classes: tuple[str, ...] = ("a", "b", "c", "d")) -> dict:
    return {"meta": checkpoint.meta(config, classes), "state_dict": model.state_dict()}


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def published(file: str, data: Path) -> dict[str, Tensor]:
    """Random weights under the keys of one of mmdet's models."""
    shapes = json.loads((data / "checkpoint_keys" / f"{file}.json").read_text())
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


# Writing and reading


def test_what_is_written_is_read(model: GFL, config: Config, tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    checkpoint.write(path, own(model, config) | {"training": {"step": 7, "names": ["x"]}})
    again, its_config, classes, _ = checkpoint.model_from(path)
    assert same(model, again) and not again.training
    assert its_config == config and classes == ["a", "b", "c", "d"]
    assert again.test.short_side == 192
    assert checkpoint.read(path)["training"] == {"step": 7, "names": ["x"]}
    assert os.listdir(tmp_path) == ["last.pth"]


def test_a_failed_rename_leaves_the_last_one(model: GFL, config: Config, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "last.pth"
    checkpoint.write(path, {"state_dict": {"x": torch.ones(3)}})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"not written.*No space left.*the one written before it is kept.*last.pth"
    ) as info:
        checkpoint.write(path, own(model, config))
    assert info.value.errno == 28
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pth"]


FULL = """
import resource, sys, torch
from gfl import checkpoint
path = sys.argv[1]
checkpoint.write(path, {"state_dict": {"x": torch.ones(3)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a disk that is full after so many bytes
try:
    checkpoint.write(path, {"state_dict": {"x": torch.ones(1_000_000)}})
except OSError as error:
    print("OSError:", error)
print(checkpoint.read(path)["state_dict"]["x"].tolist())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of a file there")
def test_a_full_disk_leaves_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("OSError:") and str(path) in done.stdout, done.stdout
    assert "checkpoint not written (File too large); the one written before it is kept" in done.stdout
    assert done.stdout.splitlines()[1] == "[1.0, 1.0, 1.0]"
    assert os.listdir(tmp_path) == ["last.pth"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere"):
        checkpoint.write(tmp_path / "nowhere" / "x.pth", {})


# Files that are no good


class Command:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_one_that_would_run_code_is_refused(tmp_path: Path, new_format: bool) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"state_dict": {"x": torch.ones(2)}, "meta": Command(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"evil\.pth: refused, since it asks for .*system.*run code"):
        checkpoint.read(path)
    assert not marker.exists()
    path.write_bytes(pickle.dumps(content["meta"], protocol=2))
    with pytest.raises(ValueError, match=r"evil\.pth"):
        checkpoint.read(path)
    assert not marker.exists()


def test_one_that_runs_code_under_a_name_that_is_let_pass_does_not(tmp_path: Path) -> None:
    """A name out of numpy stands for nothing here, whatever it would do there."""
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save({"state_dict": {"x": torch.ones(2)}}, buffer)
    call = b"cnumpy.testing._private.utils\nrunstring\n(X" + (text := b"open('%s','w')" % bytes(marker))[:0]
    call += len(text).to_bytes(4, "little") + text + b"}tR."
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x80\x02" + call if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(ValueError, match="not a dictionary"):
        checkpoint.read(path)
    assert not marker.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.999])
def test_a_truncated_one_is_named(model: GFL, config: Config, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.pth"
    checkpoint.write(path, own(model, config))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cut\.pth: truncated, or not a checkpoint"):
        checkpoint.model_from(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "truncated, or not a checkpoint"),
        (b"{}\n", "truncated, or not a checkpoint"),
        ([torch.ones(2)], "not a checkpoint: it holds a list"),
        ({}, "no weights in it; its keys are none"),
        ({"epoch": 3, "loss": 0.1}, "no weights in it; its keys are epoch, loss"),
        ({"meta": {"format": "gfl-ops 9"}, "state_dict": {"x": torch.ones(1)}}, "its format is 'gfl-ops 9'"),
        ({"meta": {"format": "gfl-ops 1"}, "state_dict": {"x": torch.ones(1)}}, "no configuration"),
        ({"state_dict": {"x": torch.ones(1)}}, "not a GFL detector on a ResNet: it has no backbone.conv1.weight"),
        ({"conv1.weight": torch.ones(64, 3, 7, 7)}, "give it as backbone_weights"),
    ],
)
def test_what_is_no_checkpoint(content: object, text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"file\.pth: .*{text}"):
        checkpoint.model_from(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        checkpoint.read(tmp_path / "none.pth")
    with pytest.raises(IsADirectoryError):
        checkpoint.read(tmp_path)


# Loading into a model


def test_every_difference_is_named_and_nothing_is_loaded(model: GFL) -> None:
    weights = {k: v + 1 for k, v in model.state_dict().items()}
    del weights["neck.fpn_convs.3.conv.bias"], weights["backbone.bn1.weight"]
    weights["backbone.fc.weight"] = torch.zeros(3)
    weights["bbox_head.scales.2.scale"] = torch.zeros(1)
    weights["bbox_head.gfl_reg.bias"] = "text"  # type: ignore[assignment]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="not this model's") as info:
        checkpoint.load_weights(model, weights)
    assert str(info.value).splitlines()[1:] == [
        "  missing: backbone.bn1.weight",
        "  missing: neck.fpn_convs.3.conv.bias",
        "  unexpected: backbone.fc.weight",
        "  shape: bbox_head.gfl_reg.bias is str in the file, [68] in the model",
        "  shape: bbox_head.scales.2.scale is [1] in the file, [] in the model",
    ]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_classes_are_refused_unless_the_head_may_be_new(model: GFL, config: Config, tmp_path: Path) -> None:
    other = build(config.replace(num_classes=9).model)
    fresh = other.bbox_head.gfl_cls.weight.detach().clone()
    with pytest.raises(ValueError, match=r"gfl_cls.weight is \[4, 16, 3, 3\] in the file, \[9, 16") as info:
        checkpoint.load_weights(other, model.state_dict())
    assert "numbers of classes differ" in str(info.value)
    notes = checkpoint.load_weights(other, model.state_dict(), allow_new_head=True)
    layers = "bbox_head.gfl_cls"
    counts = "the weights are for 4 classes, the model has 9"
    assert notes == [f"{counts}: new are the class outputs of {layers}, all else is taken over"]
    assert torch.equal(other.bbox_head.gfl_cls.weight, fresh)
    assert torch.equal(other.bbox_head.gfl_reg.weight, model.bbox_head.gfl_reg.weight)
    # A file whose configuration and weights disagree.
    path = tmp_path / "odd.pth"
    checkpoint.write(path, own(other, config))
    with pytest.raises(ValueError, match=r"odd\.pth: the weights are not this model's"):
        checkpoint.model_from(path)


def test_counters_and_constants_need_not_be_there_and_types_are_converted(model: GFL, config: Config) -> None:
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    weights = {k: v for k, v in weights.items() if not k.endswith(("num_batches_tracked", "project"))}
    other = build(config.model)
    assert checkpoint.load_weights(other, weights) == []
    got = other.neck.fpn_convs[0].conv.weight
    assert got.dtype == torch.float32 and torch.equal(got, model.neck.fpn_convs[0].conv.weight.half().float())


# Other systems' files


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("gfl_r50_fpn_1x_coco", {"backbone": "resnet50"}),
        ("gfl_r101-dconv-c3-c5_fpn_ms-2x_coco", {"backbone": "resnet101", "dcn": "v1", "dcn_stages": (3, 4, 5)}),
        (
            "gfl_x101-32x4d-dconv-c4-c5_fpn_ms-2x_coco",
            {"backbone": "resnext101_32x4d", "dcn": "v1", "dcn_stages": (4, 5)},
        ),
    ],
)
def test_mmdets_tell_what_they_are(file: str, fields: dict, data: Path, tmp_path: Path) -> None:
    names = tuple(f"thing {i}" for i in range(80))
    path = tmp_path / "epoch_12.pth"
    meta = {"mmdet_version": "2.28", "CLASSES": names, "config": "model = …"}
    torch.save({"meta": meta, "state_dict": collections.OrderedDict(published(file, data)), "optimizer": {}}, path)
    model, config, classes, _ = checkpoint.model_from(path)
    assert classes == list(names)
    for name, value in fields.items():
        assert getattr(config.model, name) == value
    assert config.model == preset("gfl_r50_1x").replace(**fields).model
    assert not model.backbone.conv1.weight.any()


def test_another_size_of_detector_is_inferred(data: Path) -> None:
    want = create_model("gfl_r18_1x", 7, width=32, neck_channels=96, head_channels=64, head_convs=2, reg_max=8,
                        strides=(8, 16, 32, 64))  # fmt: skip
    with pytest.warns(UserWarning, match=r"can't tell head_groups \(32\), .*short_side \(800\)"):
        model, config, classes, _ = checkpoint.model_from({"module." + k: v for k, v in want.state_dict().items()})
    assert same(want, model) and config.model == want.config and classes is None


def test_mmengines_log_histories_are_passed_over(model: GFL, tmp_path: Path) -> None:
    """As mmengine writes them beside the weights: objects of its own and of numpy, neither of which is imported."""
    np = pytest.importorskip("numpy")

    class HistoryBuffer:
        def __init__(self) -> None:
            self.max_length, self._log_history = 10, np.arange(3.0)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    module = type(sys)("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    names = ["mmengine", "mmengine.logging", module.__name__]
    saved = {name: sys.modules.get(name) for name in names}
    path = tmp_path / "epoch_3.pth"
    try:
        sys.modules |= dict.fromkeys(names, module)
        hub = {"log_scalars": {"train/loss": HistoryBuffer()}, "rate": np.float64(0.5)}
        meta = {"mmengine_version": "0.10.7", "dataset_meta": {"classes": ("a", "b", "c", "d")}}
        torch.save({"meta": meta, "state_dict": model.state_dict(), "message_hub": hub}, path)
    finally:
        for name, value in saved.items():
            sys.modules.pop(name) if value is None else sys.modules.update({name: value})
    content = checkpoint.read(path)
    assert isinstance(content["message_hub"]["log_scalars"]["train/loss"], checkpoint._Inert)
    assert checkpoint.normalise(content).source == "mmengine 0.10.7"


def gfocal(version: str, model: GFL) -> dict[str, Tensor]:
    weights = dict(model.state_dict())
    if version == "v1":
        weights["bbox_head.distribution_project.project"] = weights.pop("bbox_head.integral.project")
        return {k.replace(".conv2.conv_offset.", ".conv2_offset."): v for k, v in weights.items()}
    for name in ("weight", "bias"):
        old = weights[f"bbox_head.gfl_cls.{name}"]
        weights[f"bbox_head.gfl_cls.{name}"] = torch.cat([old, torch.full_like(old[:1], 9.0)])
    return weights


def test_gfocal_v1_brings_its_geometry() -> None:
    with torch.device("meta"):
        want = create_model("gfl_r50_1x", dcn="v1")
    want.to_empty(device="cpu")
    weights = gfocal("v1", want)
    assert any("conv2_offset" in key for key in weights)
    found = checkpoint.normalise({"meta": {}, "state_dict": weights})
    assert found.source == "GFocal v1" and found.legacy and "geometry" in found.notes[0]
    config = checkpoint.infer_model(found)
    assert (config.legacy, config.topk_mode, config.dcn) == (True, "anchor", "v1")
    assert set(found.state_dict) == set(want.state_dict())


@pytest.mark.parametrize("classes", [None, 80, 81])
def test_gfocal_v2_has_a_class_channel_too_many(classes: int | None) -> None:
    want = create_model("gfl_r18_1x", classes if classes == 81 else 80, head_convs=1, quality_branch=True)
    weights = gfocal("v2", want) if classes != 81 else dict(want.state_dict())
    meta = {} if classes is None else {"CLASSES": [str(i) for i in range(classes)]}
    found = checkpoint.normalise({"meta": meta, "state_dict": weights})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the number of groups is not known
        model, config, _, _ = checkpoint.model_from({"meta": meta, "state_dict": dict(weights)})
    assert found.source == "GFocal V2" and same(model, want)
    assert (config.model.quality_branch, config.model.topk_mode, config.model.legacy) == (True, "anchor", False)
    assert len(found.notes) == (classes != 81)


def test_a_backbone_that_there_is_not(model: GFL) -> None:
    weights = dict(model.state_dict())
    weights |= {"backbone.layer3.2.conv1.weight": torch.ones(1), "backbone.layer3.3.conv1.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="2-2-4-2 blocks of 3x3-3x3 in 1 groups, which is none of resnet18"):
        checkpoint.model_from({"state_dict": weights})


def test_offsets_of_several_groups_are_refused(data: Path) -> None:
    weights = published("gfl_r101-dconv-c3-c5_fpn_ms-2x_coco", data)
    for key in weights:
        if "conv_offset" in key:
            weights[key] = weights[key].repeat(4, *[1] * (weights[key].dim() - 1))
    with pytest.raises(ValueError, match=r"\[72\] offset channels, not 18 \(v1\) or 27 \(v2\)"):
        checkpoint.model_from({"state_dict": weights})


def test_averages_and_extras_are_left_out_and_said(model: GFL) -> None:
    weights = dict(model.state_dict())
    weights["ema_backbone_conv1_weight"] = torch.ones(2)
    weights["extra"] = [1, 2]  # type: ignore[assignment]
    found = checkpoint.normalise({"state_dict": weights})
    assert set(found.state_dict) == set(model.state_dict())
    assert found.notes == ["left out, not being weights: extra", "left out: 1 weights of mmdet 2's average, ema_…"]


def test_safetensors(model: GFL, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    try:
        from safetensors.torch import save_file
    except ImportError:
        path.write_bytes(b"")
        with pytest.raises(RuntimeError, match="pip install safetensors"):
            checkpoint.read(path)
        return
    save_file(dict(model.state_dict()), path)
    assert set(checkpoint.read(path)) == set(model.state_dict())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"x\.safetensors: truncated"):
        checkpoint.read(path)


def test_log_histories_that_name_their_methods_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine's keep their own methods, which pickle writes as calls of getattr by Python 2's name."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    source = "class HistoryBuffer:\n    def mean(self): pass\n"
    exec(source, module.__dict__)
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    history = module.HistoryBuffer()
    history.methods = {"mean": module.HistoryBuffer.mean}
    torch.save({"state_dict": {"weight": torch.ones(2)}, "message_hub": {"loss": history}}, tmp_path / "epoch_1.pth")
    content = checkpoint.read(tmp_path / "epoch_1.pth")
    assert torch.equal(content["state_dict"]["weight"], torch.ones(2))
