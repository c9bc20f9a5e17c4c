# SPDX-License-Identifier: Apache-2.0
"""`gfl export` by its command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gfl import checkpoint
from gfl.cli import main
from gfl.config import preset
from gfl.models import build


@pytest.fixture
def file(tmp_path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = preset("gfl_tiny").replace(num_classes=2, width=8, neck_channels=8, head_channels=8, head_groups=2)
    model = build(config.model, config.test)
    checkpoint.write(
        tmp_path / "best.pt", {"meta": checkpoint.meta(config, ["cup", "cat"]), "state_dict": model.state_dict()}
    )
    return tmp_path / "best.pt"


def test_a_program_of_the_models_own_size(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = file.with_suffix(".pt2")
    words = ["export", str(file), "--out", str(out), "--format", "torch-export", "--outputs", "maps"]
    assert main(words) == 0
    # The preset's short and long side, 192.
    assert "images [1, 3, 192, 192] -> maps" in capsys.readouterr().out
    maps = torch.export.load(out).module()(torch.zeros(1, 3, 192, 192))
    assert [x.shape[1] for x in maps] == [2] * 5 + [68] * 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--batch", "0"], "`--batch` must be"),
        (["--batch", "many"], "`--batch` must be"),
        (["--size", "100x64"], "`--size` must be"),
    ],
)
def test_what_it_refuses(arguments: list[str], text: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    out = file.with_suffix(".onnx")
    assert main(["export", str(file), "--out", str(out), *arguments]) == 1
    assert text in capsys.readouterr().err and not out.exists()
