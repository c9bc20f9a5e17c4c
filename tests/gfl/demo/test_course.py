# SPDX-License-Identifier: Apache-2.0
"""`gfl demo` from end to end."""

import json

import pytest
import torch
from PIL import Image

from gfl import checkpoint
from gfl.cli import main
from gfl.demo.course import run_demo


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_few_steps(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--iterations", "8", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert "8 steps of 8 images" in said and "AP50" in said
    assert all(len(line) <= 80 for line in said.replace(str(tmp_path), "").splitlines()), said
    assert len(list((out / "data/train").iterdir())) == 8
    assert len(json.loads((out / "data/annotations/val.json").read_text())["images"]) == 8
    assert Image.open(out / "detections.jpg").width > 1000
    model, config, classes, _ = checkpoint.model_from(out / "training/best.pt")
    assert classes == ["ring", "star", "cross", "moon", "heart"] and config.train.seed == 3
    assert model.config.strides == (8, 16, 32)

    assert main(["demo", "--out", str(out), "--iterations", "8"]) == 1
    assert "holds a demo" in capsys.readouterr().err


def test_no_iterations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`iterations` must be at least 1, got 0"):
        run_demo(tmp_path, iterations=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_whole_of_it(tmp_path, number):
    """The three seeds that the README speaks of; each takes some minutes on two cores."""
    metrics = run_demo(tmp_path / "demo", seed=number)
    assert metrics["AP"] > 0.5
    assert (tmp_path / "demo" / "distributions.jpg").is_file()
