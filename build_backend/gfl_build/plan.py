# SPDX-License-Identifier: Apache-2.0
"""What is built, against what, and why something is not."""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from setuptools.errors import BaseError

from .cuda import CudaToolkit, find_toolkit, target_archs, visible_gpus
from .host import Compiler, find_compiler
from .torch_info import OLDEST, TorchInfo, find_torch

# What `gfl` needs; `gfl_ops` itself imports torch alone.
DETECTOR_REQUIREMENTS = ("numpy", "pillow", "pycocotools", "tqdm", "tomli; python_version < '3.11'")
ANY_TORCH = f"torch>={OLDEST[0]}.{OLDEST[1]}"


class BuildError(BaseError):
    """The requested build is impossible. setuptools prints the text without a traceback."""


@dataclass(frozen=True)
class Plan:
    """What will be built.

    Attributes:
        torch: the torch that the extension is compiled against, None without extension.
        compiler: the C++ compiler, None without extension.
        cuda: the CUDA toolkit, None without CUDA part.
        archs: what the CUDA part is compiled for: nvcc's code names, "sm_90" for machine code, "compute_90" for PTX.
        reason: why there is no extension, empty if there is one.
        cuda_reason: why there is no CUDA part, empty if there is one.
    """

    torch: TorchInfo | None
    compiler: Compiler | None
    cuda: CudaToolkit | None
    archs: tuple[str, ...]
    reason: str
    cuda_reason: str


def build_requirements() -> list[str]:
    """torch, where the target environment has none and an extension is built: pip then installs the same newest one."""
    return [ANY_TORCH] if not _no_host() and find_torch() is None else []


def runtime_requirements(plan: Plan) -> list[str]:
    """The torch that the wheel works with, and what `gfl` needs."""
    torch = ANY_TORCH
    if plan.torch is not None:
        # The C++ interface is stable within a minor version only.
        torch = f"torch=={plan.torch.release[0]}.{plan.torch.release[1]}.*"
    return [torch, *DETECTOR_REQUIREMENTS]


@lru_cache(maxsize=1)
def make_plan() -> Plan:
    """Look at the machine and the environment variables and decide."""
    wish = _cuda_wish()
    reason = _no_host()
    torch = None if reason else find_torch()
    if not reason and torch is None:
        reason = f"no {ANY_TORCH} was found to compile against"
    compiler = None if reason else find_compiler()
    cuda, archs, cuda_reason = _plan_cuda(torch, wish) if torch else (None, (), reason)
    if wish == "1" and cuda is None:
        raise BuildError(f"GFL_OPS_WITH_CUDA=1, but the CUDA part can't be built: {cuda_reason}")
    return Plan(torch, compiler, cuda, archs, reason, cuda_reason)


def wants_cuda() -> bool:
    """Whether the user insists on the CUDA part."""
    return _cuda_wish() == "1"


def _cuda_wish() -> str:
    wish = os.environ.get("GFL_OPS_WITH_CUDA", "").strip()
    if wish not in ("", "0", "1"):
        raise BuildError(f"GFL_OPS_WITH_CUDA must be 0, 1 or unset, got {wish!r}")
    return wish


def _no_host() -> str:
    if sys.platform != "linux":
        return f"the extension is built on Linux only, this is {sys.platform}"
    if not find_compiler():
        return "no C++ compiler was found (CXX, c++, g++, clang++)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return f"the headers of Python {sys.version.split()[0]} are not installed"
    return ""


def _plan_cuda(torch: TorchInfo, wish: str) -> tuple[CudaToolkit | None, tuple[str, ...], str]:
    if wish == "0":
        return None, (), "switched off by GFL_OPS_WITH_CUDA=0"
    if torch.hip:
        return None, (), f"torch {torch.version} is a ROCm build"
    if not torch.cuda:
        return None, (), f"torch {torch.version} is a CPU build"
    toolkit, reason = find_toolkit(torch.cuda, torch.site)
    if toolkit is None:
        return None, (), reason
    try:
        wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        return toolkit, target_archs(wish, toolkit.archs, visible_gpus()), ""
    except ValueError as error:
        raise BuildError(str(error)) from None
