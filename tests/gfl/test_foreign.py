# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as people have them: weights that say nothing else, wrapped ones, other programs' objects beside them."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gfl import checkpoint
from gfl.cli import main
from gfl.config import preset
from gfl.detector import Detector
from gfl.models import GFL, build, create_model

FIELDS = {"num_classes": 4, "width": 8, "neck_channels": 16, "head_channels": 16, "head_convs": 1, "head_groups": 4}


@pytest.fixture
def model(seed: int) -> GFL:
    torch.manual_seed(seed)
    config = preset("gfl_tiny").replace(**FIELDS)
    return build(config.model, config.test).eval()


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# What weights can't tell


@pytest.fixture
def grouped(seed: int) -> GFL:
    """A network whose number of groups is not the default."""
    torch.manual_seed(seed)
    return create_model("gfl_tiny", 4, width=8, neck_channels=16, head_channels=32, head_convs=1, head_groups=4).eval()


def test_a_state_dict_of_a_model_says_its_configuration(grouped: GFL, tmp_path: Path) -> None:
    compiled = torch.compile(grouped)
    averaged = torch.optim.swa_utils.AveragedModel(grouped)
    images = torch.randn(1, 3, 64, 64)
    for number, weights in enumerate((grouped.state_dict(), compiled.state_dict(), averaged.state_dict())):
        torch.save(weights, tmp_path / f"{number}.pt")
        model, config, _, _ = checkpoint.model_from(tmp_path / f"{number}.pt", strict=True)
        assert same(model, grouped) and config.model.head_groups == 4 and config.test.short_side == 192
        for a, b in zip(model.predict_maps(images)[0], grouped.predict_maps(images)[0]):
            assert torch.equal(a, b)


def test_weights_alone_are_refused_by_name_or_completed_by_a_configuration(grouped: GFL, tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save(dict(grouped.state_dict()), path)
    with pytest.raises(ValueError, match=r"plain\.pt: .*can't tell head_groups \(32\), .*`config` must be given"):
        checkpoint.model_from(path, strict=True)
    with pytest.raises(ValueError, match="head_groups"):
        Detector(path)
    given = preset("gfl_tiny").replace(head_groups=4)
    model, config, _, _ = checkpoint.model_from(path, given, strict=True)
    assert same(model, grouped) and config.model == grouped.config and config.test.short_side == 192
    checkpoint.write(path, {"meta": checkpoint.meta(config, "abcd"), "state_dict": model.state_dict()})
    with pytest.raises(ValueError, match="leave `config` out"):
        checkpoint.model_from(path, given)


@pytest.mark.parametrize("command", ["detect", "eval", "export", "convert"])
def test_every_command_refuses_weights_alone(command: str, grouped: GFL, tmp_path: Path, capsys) -> None:
    path = tmp_path / "plain.pt"
    torch.save(dict(grouped.state_dict()), path)
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    more = {
        "detect": [tmp_path / "x.png", "--out", tmp_path / "found"],
        "export": ["--out", tmp_path / "x.pt2", "--format", "torch-export", "--size", "64x64", "--outputs", "maps"],
        "convert": [tmp_path / "own.pt"],
    }
    words = [command, str(path), *map(str, more.get(command, []))]
    assert main(words) == 1 and "can't tell head_groups" in capsys.readouterr().err
    if command != "eval":
        preset("gfl_tiny").replace(head_groups=4).save(tmp_path / "own.json")
        assert main([*words, "--config", str(tmp_path / "own.json")]) == 0


def test_mmdets_own_configuration_is_read(grouped: GFL) -> None:
    text = """
    model = dict(bbox_head=dict(norm_cfg=dict(type='GN', num_groups=4, requires_grad=True)),
                 test_cfg=dict(nms_pre=500, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.5), max_per_img=20))
    train_pipeline = [dict(type='Resize', scale=(1333, 640))]
    test_pipeline = [dict(keep_ratio=True, scale=(512, 320), type='Resize')]
    """
    content = {"meta": {"mmdet_version": "3.3.0", "cfg": text}, "state_dict": dict(grouped.state_dict())}
    config = checkpoint.model_from(content, strict=True).config
    test = config.test
    assert (config.model.head_groups, test.short_side, test.long_side, test.nms_pre) == (4, 320, 512, 500)
    assert (test.score_threshold, test.iou_threshold, test.max_detections) == (0.1, 0.5, 20)
    del content["meta"]["cfg"]
    with pytest.raises(ValueError, match=r"mmdet 3.3.0 can't tell head_groups"):
        checkpoint.model_from(content, strict=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_convert_writes_what_weights_cannot_tell(suffix: str, grouped: GFL, tmp_path: Path) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    torch.save(grouped.state_dict(), tmp_path / "x.pt")
    out = tmp_path / f"mmdet{suffix}"
    assert main(["convert", str(tmp_path / "x.pt"), str(out), "--to", "mmdet"]) == 0
    model, config, _, _ = checkpoint.model_from(out, strict=True)
    assert same(model, grouped) and config.model.head_groups == 4 and config.test.short_side == 192


# Checkpoints as other programs write them


def prefixed(prefix: str, model: GFL) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("older", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: prefixed("_orig_mod.", m),
        lambda m: prefixed("module._orig_mod.", m),
        lambda m: {"state_dict": prefixed("model.", m) | {"loss.weight": torch.ones(1)}, "epoch": np.float64(3)},
        lambda m: {"n_averaged": torch.tensor(3), **prefixed("module.", m)},
        lambda m: {"model_state_dict": prefixed("", m), "args": argparse.Namespace(lr=1)},
        lambda m: {"ema": {"module": prefixed("", m), "updates": 7}, "model": prefixed("", other(m))},
        lambda m: {"state_dict": prefixed("model.", other(m)) | prefixed("ema_model.module.", m)},
        lambda m: {"state_dict": prefixed("", m), "ema_state_dict": prefixed("module.", other(m))},
        lambda m: {k.replace("backbone.", "backbone._orig_mod."): v for k, v in prefixed("", m).items()},
        lambda m: {"model": prefixed("", m), "version": torch.__version__, "where": Path("x")},
    ],
)
def test_wrapped_state_dicts_are_read(wrap, older: bool, model: GFL, tmp_path: Path) -> None:
    torch.save(wrap(model), tmp_path / "x.pt", _use_new_zipfile_serialization=not older)
    found = checkpoint.model_from(tmp_path / "x.pt", preset("gfl_tiny").replace(head_groups=4))
    assert same(found.model, model)


def other(model: GFL) -> GFL:
    again = copy.deepcopy(model)
    with torch.no_grad():
        again.bbox_head.gfl_cls.bias.add_(1)
    return again


def test_what_is_really_wrong_is_said(model: GFL, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"several networks, helper\., student\."):
        checkpoint.normalise(prefixed("student.", model) | prefixed("helper.", model))
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"asks for gfl\.models\.gfl\.GFL, .*save its `state_dict\(\)`"):
        checkpoint.read(tmp_path / "model.pt")
    ids = {
        "meta": checkpoint.meta(preset("gfl_tiny"), ["a"]) | {"category_ids": "12"},
        "state_dict": {"x": torch.ones(1)},
    }
    with pytest.raises(ValueError, match=r"category_ids are not whole numbers"):
        checkpoint.normalise(ids)
