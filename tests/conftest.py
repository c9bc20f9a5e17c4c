# SPDX-License-Identifier: Apache-2.0
"""Fresh inputs for every run, repeatable by their seed, and where the real data lies."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import on_device
import pytest
import torch

import gfl_ops
from gfl_ops.core import backends

SEED = int(os.environ.get("GFL_TEST_SEED", random.randrange(2**31)))
ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("GFL_TEST_DATA", ROOT.parent / "shared" / "data"))


def pytest_report_header() -> str:
    return f"seed: {SEED} (repeat with GFL_TEST_SEED={SEED})"


if torch.__version__.startswith("2.6."):
    # Asked for by name there, as docs/install.md says; later versions capture such operators by themselves.
    import torch._dynamo

    torch._dynamo.config.capture_dynamic_output_shape_ops = True


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Differs from test to test and from run to run; the run's own seed, in the header, brings it back."""
    digest = hashlib.sha256(f"{SEED}:{request.node.nodeid}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def no_backend_stays() -> Iterator[None]:
    """A test that leaves its backend set would change every test after it."""
    before = gfl_ops.get_backend()
    yield
    after = gfl_ops.get_backend()
    gfl_ops.set_backend(before)
    assert after == before, f"the test left set_backend({after!r}) behind"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real photos, annotations and head outputs."""
    if not DATA.exists():
        pytest.skip(f"no real data at {DATA}; GFL_TEST_DATA names another place")
    return DATA


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def everywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test that makes its tensors on the CPU once more with the package's operators on the GPU."""
    if request.param == "cpu":
        yield
        return
    if "compile" in request.node.name:
        pytest.skip("torch.compile does not look into a dispatch mode")
    with on_device.OnDevice(torch.device(request.param)):
        yield


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Each backend in turn, set for the operator that the file names STEM; skipped with the reason if it can't run."""
    reason = backends.unavailable(request.param, request.module.STEM, device.type)
    if reason is not None:
        pytest.skip(reason)
    with gfl_ops.set_backend(request.param):
        yield request.param
