# SPDX-License-Identifier: Apache-2.0
"""csrc/cuda compiled for the host, by way of C functions (../cuda_on_host/photo.cpp), for tests without a GPU."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / "csrc" / "tests" / "cuda_on_host"


@functools.cache
def library() -> ctypes.CDLL:
    """Decoding, NMS and post-process. Skips the test where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler: c++ is not on PATH")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "cuda_sources.so"
        command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"]
        command += ["-DGFL_CUDA_ON_HOST", "-DGFL_WITH_CUDA", f"-I{HOST / 'include'}"]
        command += [f"-I{ROOT / 'csrc' / name}" for name in ("include", ".")]
        command += ["-x", "c++", str(ROOT / "tests" / "cuda_on_host" / "photo.cpp")]
        command += [str(ROOT / "csrc" / "cuda" / name) for name in ("bins.cu", "nms.cu", "postprocess.cu")]
        command += [str(HOST / name) for name in ("api.cpp", "fiber.cpp", "runtime.cpp", "warp.cpp")]
        subprocess.run([*command, "-o", str(target)], check=True, timeout=600)
        return ctypes.CDLL(str(target))  # once it is loaded, the file may go


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def numbers(values: list[float] | list[int]) -> ctypes.Array:
    kind = ctypes.c_double if isinstance(values[0], float) else ctypes.c_int64
    return (kind * len(values))(*values)


def nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, threshold: float, by_class: bool = False) -> Tensor:
    """Indices of the kept ones of fp32 boxes. `by_class`: by the kernel that gives each class a block."""
    boxes = boxes.contiguous()
    order = scores.sort(descending=True, stable=True).indices
    keep = torch.zeros(len(boxes), dtype=torch.uint8)
    common = (ctypes.c_int64(len(boxes)), ctypes.c_double(threshold), address(keep))
    if by_class:
        labels, grouped = (torch.zeros_like(order) if idxs is None else idxs[order]).sort(stable=True)
        status = library().nms_class_rows(address(boxes), address(order), address(grouped), address(labels), *common)
    else:
        labels = None if idxs is None else idxs.contiguous()
        status = library().nms_rows(
            address(boxes), None if labels is None else address(labels), address(order), *common
        )
    assert status == 0
    return order[keep.bool()]
