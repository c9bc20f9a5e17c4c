# SPDX-License-Identifier: Apache-2.0
"""``gfl convert`` from and to mmdet's checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gfl import checkpoint
from gfl.cli import main
from gfl.models import create_model


@pytest.fixture
def mmdets(tmp_path: Path) -> Path:
    model = create_model("gfl_r18_1x", num_classes=3, head_convs=1)
    path = tmp_path / "mmdet.pth"
    meta = {"mmdet_version": "2.28", "CLASSES": ("cat", "dog", "bird")}
    torch.save({"meta": meta, "state_dict": model.state_dict(), "optimizer": {}}, path)
    return path


def test_mmdets_becomes_ours_and_mmdets_again(mmdets: Path, tmp_path: Path, capsys) -> None:
    ours, again = tmp_path / "ours.pth", tmp_path / "again.pth"
    assert main(["convert", str(mmdets), str(ours)]) == 0
    printed = capsys.readouterr().out
    assert "mmdet 2.28" in printed and "model: resnet18, num_classes 3, head_convs 1" in printed
    assert "classes: cat, dog, bird" in printed
    content = checkpoint.read(ours)
    assert content["meta"]["format"] == checkpoint.FORMAT and content["meta"]["classes"] == ["cat", "dog", "bird"]
    assert main(["convert", str(ours), str(again), "--to", "mmdet"]) == 0
    first, last = checkpoint.read(mmdets)["state_dict"], checkpoint.read(again)["state_dict"]
    assert set(first) == set(last) and all(torch.equal(first[k], last[k]) for k in first)
    assert checkpoint.read(again)["meta"]["dataset_meta"]["classes"] == ("cat", "dog", "bird")


def test_nothing_is_overwritten(mmdets: Path, capsys) -> None:
    before = mmdets.read_bytes()
    assert main(["convert", str(mmdets), str(mmdets)]) == 1
    assert "is there already" in capsys.readouterr().err and mmdets.read_bytes() == before


def test_what_mmdet_has_not_is_not_given_to_it(tmp_path: Path, capsys) -> None:
    model = create_model("gfl_tiny", num_classes=3, quality_branch=True)
    source = tmp_path / "v2.pth"
    torch.save(model.state_dict() | {f"bbox_head.gfl_cls.{n}": torch.zeros(4, *s) for n, s in
                                     (("weight", (64, 3, 3)), ("bias", ()))}, source)  # fmt: skip
    words = ["convert", str(source), str(tmp_path / "out.pth"), "--to", "mmdet"]
    assert main(words) == 1
    assert "`config` must be given" in capsys.readouterr().err
    assert main([*words, "--config", "gfl_tiny"]) == 1
    assert "no `quality_branch`" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


def test_a_bad_file_is_named(tmp_path: Path, capsys) -> None:
    path = tmp_path / "bad.pth"
    torch.save({"x": torch.ones(1)}, path)
    assert main(["convert", str(path), str(tmp_path / "out.pth")]) == 1
    assert "bad.pth: not a GFL detector" in capsys.readouterr().err
