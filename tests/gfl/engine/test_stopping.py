# SPDX-License-Identifier: Apache-2.0
"""SIGTERM to real processes, as `timeout`, SLURM and Kubernetes send it: to the whole group, workers and all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gfl import checkpoint
from gfl.config import Config
from gfl.engine.log import STEPS
from gfl.engine.train import LAST

Small = Callable[..., Config]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def started(config: Config, out: Path, *launcher: str, more: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A training of its own process group."""
    config.save(out.with_suffix(".json"))
    words = ["train", "--config", str(out.with_suffix(".json")), "--out", str(out), "--device", "cpu", *more]
    return subprocess.Popen(
        [sys.executable, *(launcher or ("-m", "gfl.cli")), *words],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 400
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)


def step(out: Path) -> int:
    return checkpoint.read(out / LAST)["training"]["position"]["step"]


def test_a_signal_to_the_group_ends_with_a_checkpoint_and_nothing_is_lost(small: Small, tmp_path: Path) -> None:
    config, out = small(epochs=10**4, val_annotations="", workers=2, checkpoint_steps=0), tmp_path / "run"
    process = started(config, out)
    wait_for(out / STEPS, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 130, errors
    assert f"stopped after step {step(out)}, saved in" in errors
    # The step of the log's last line: nothing after it was computed in vain.
    assert int((out / STEPS).read_text().splitlines()[-1].split(",")[0]) == step(out)
    for word in ("Traceback", "killed by signal", "Terminated"):
        assert word not in errors, errors


# Writing takes for ever: the first signal waits for it, the second does not.
SLOW = """
import pathlib, sys, time
from gfl import checkpoint, cli
def write(path, *_):
    pathlib.Path(path).with_name("writing").touch()
    time.sleep(1000)
checkpoint.write = write
sys.exit(cli.main())
"""


def test_a_second_signal_ends_it_at_once(small: Small, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    config, out = small(epochs=10**4, val_annotations="", workers=1, checkpoint_steps=0), tmp_path / "run"
    process = started(config, out, str(tmp_path / "slow.py"))
    wait_for(out / "writing", process)
    os.killpg(process.pid, signal.SIGTERM)
    # What a launcher passes on right after it is the same request.
    os.killpg(process.pid, signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM


def test_ranks_stop_at_one_step_and_go_on_as_if_nothing_happened(small: Small, tmp_path: Path) -> None:
    same = {"batch_size": 4, "val_annotations": "", "checkpoint_steps": 0, "train_short_side": (64, 64)}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gfl.cli")
    out = tmp_path / "run"
    process = started(small(epochs=10**4, **same), out, *launcher)
    wait_for(out / STEPS, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=400)
    stopped = step(out)
    assert f"stopped after step {stopped}, saved in" in errors and "did not answer" not in errors
    epochs = stopped // 2 + 1
    whole = small(epochs=epochs, **same)
    for name, more in (("run", ("--resume",)), ("whole", ())):
        process = started(whole, tmp_path / name, *launcher, more=more)
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
    one, other = (checkpoint.read(tmp_path / name / LAST)["state_dict"] for name in ("run", "whole"))
    assert step(out) == 2 * epochs and all(torch.equal(value, other[key]) for key, value in one.items())
