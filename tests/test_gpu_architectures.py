# SPDX-License-Identifier: Apache-2.0
"""A GPU for which the extension has no code, stood in for by a fake `torch.cuda`."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gfl_ops
from gfl_ops.core import backends, extension
from gfl_ops.core.registry import SPECS

sys.path.append(str(Path(__file__).resolve().parents[1] / "build_backend"))

from gfl_build import cuda
from gfl_build.flags import FLAGS

Gpus = Callable[..., None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """``gpus((7, 5), archs=["sm_80"])``: the capabilities of the GPUs, and what the extension was compiled for."""
    monkeypatch.setenv("GFL_OPS_SELF_CHECK", "0")
    automatic = dict(backends._AUTOMATIC)

    def there(*capabilities: tuple[int, int], archs: list[str]) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "NVIDIA Fake")
        properties = SimpleNamespace(total_memory=16 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=0: properties)
        info = {"compiler": "c++", "torch": torch.__version__, "nvcc": "nvcc 13.0", "archs": archs}
        module = extension.EXTENSION.module or object()
        built = dataclasses.replace(extension.EXTENSION, module=module, reason="", cuda_reason="", info=info)
        monkeypatch.setattr(extension, "EXTENSION", built)
        native = {stem: dataclasses.replace(k, native=("cpu", "cuda")) for stem, k in backends._KERNELS.items()}
        monkeypatch.setattr(backends, "_KERNELS", native)
        monkeypatch.setattr(backends, "_gpu_is_new", True)
        monkeypatch.setattr(backends, "_no_native_on_gpu", None)
        for stem in native:
            backends._AUTOMATIC[stem, "cuda"] = "native"

    yield there
    backends._AUTOMATIC.clear()
    backends._AUTOMATIC.update(automatic)


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((7, 5), ["sm_80", "sm_90"], False),
        ((8, 7), ["sm_80", "sm_90"], True),
        ((8, 7), ["sm_90"], False),
        ((8, 0), ["sm_86"], False),
        ((8, 0), ["sm_90"], False),
        ((11, 0), ["sm_80", "sm_90"], False),
        ((11, 0), ["sm_90", "compute_90"], True),
        ((12, 1), ["sm_120"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((7, 5), ["compute_80"], False),
    ],
)
def test_an_extension_without_code_for_the_gpu_is_not_used(
    gpus: Gpus, capability: tuple[int, int], archs: list[str], runs: bool
) -> None:
    gpus(capability, archs=archs)
    if runs:
        assert backends.serving("qfl", "cuda") == "native"
        return
    with pytest.warns(RuntimeWarning, match=r"not for NVIDIA Fake \(sm_\d+\); install gfl-ops again") as said:
        assert backends.serving("qfl", "cuda") != "native"
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert backends.serving("nms", "cuda") != "native"
    assert "compiled for" in (backends.unavailable("native", "qfl", "cuda") or "")


def test_the_default_build_has_code_for_every_gpu() -> None:
    codes = cuda.target_archs("", frozenset(arch.partition("+")[0] for arch in FLAGS["cuda_archs"]))
    for capability in [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]:
        assert any(extension.runs_on(code, capability) for code in codes), capability


def test_the_doctor_says_that_the_gpu_has_no_code(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus((7, 5), archs=["sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = gfl_ops.explain_backend()
    rows = [line.split() for line in text.splitlines()]
    assert {row[2] for row in rows if row and row[0] in SPECS and len(row) > 3} <= {"triton", "reference"}
    words = " ".join(text.split())
    assert "native on cuda: every operator: the extension was compiled for sm_80, sm_90, not for NVIDIA Fake" in words
    assert "install gfl-ops again with TORCH_CUDA_ARCH_LIST=7.5" in words
    assert "self-check of cuda:0: not done; `gfl doctor --check`" in words and "GPU 16.0 GiB" in words


def test_one_unknown_gpu_among_several_is_enough(gpus: Gpus) -> None:
    gpus((8, 0), (7, 5), archs=["sm_80"])
    with pytest.warns(RuntimeWarning, match="sm_75"):
        assert backends.serving("qfl", "cuda") != "native"


def test_a_forced_backend_says_why(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus((7, 5), archs=["sm_80"])
    monkeypatch.setattr(backends, "_backend", "native")
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match=r"can't run qfl on cuda: .*sm_75"):
        backends.serving("qfl", "cuda")


def test_the_cpu_asks_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("CUDA was initialised")

    for name in ("device_count", "get_device_capability", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr(backends, "_gpu_is_new", True)
    backends.serving("qfl", "cpu")


def test_the_first_call_may_be_compiled(gpus: Gpus) -> None:
    gpus((7, 5), archs=["sm_80"])

    def choose(x: torch.Tensor) -> torch.Tensor:
        return x * (2.0 if backends.serving("qfl", "cuda") == "native" else 3.0)

    with pytest.warns(RuntimeWarning, match="sm_75"):
        result = torch.compile(choose, fullgraph=True, backend="eager")(torch.ones(2))
    assert result.tolist() in ([3.0, 3.0], [2.0, 2.0])
    assert backends.serving("qfl", "cuda") != "native"
