# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: loaded if it fits the installed torch, else the reason why it is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_FOLDER = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Extension:
    """The state of the compiled extension.

    Attributes:
        module: `gfl_ops._C`, or None if it could not be loaded.
        reason: why there is no module; empty if there is one.
        cuda_reason: why its CUDA part is missing; empty if it is not.
        info: what the build recorded: torch, CUDA, compiler, architectures; empty for a tree that was never built.
    """

    module: ModuleType | None
    reason: str
    cuda_reason: str
    info: dict[str, Any] = field(default_factory=dict)


def _load() -> Extension:
    try:
        info: dict[str, Any] = importlib.import_module("gfl_ops._build_info").BUILD_INFO
    except ImportError:
        return _without(f"{_FOLDER} is a source tree that was never built; `pip install -e .` builds it in place", {})
    trouble = f"it was installed without one: {info['reason']}" if not info["extension"] else _mismatch(info)
    if trouble:
        return _without(trouble, info)
    try:
        module = importlib.import_module("gfl_ops._C")
    except ImportError as error:
        return _without(f"it does not load: {error}", info)
    return Extension(module, "", info["cuda_reason"], info)


def _without(reason: str, info: dict[str, Any]) -> Extension:
    reason = _shadowed() or reason
    return Extension(None, reason, reason, info)


def _mismatch(info: dict[str, Any]) -> str:
    """Why an extension that was built so does not fit the imported torch; empty if it does.

    The C++ interface of torch is stable within a minor version. A CUDA part also needs the CUDA libraries of the torch
    that it was linked with, and builds for different CUDA versions may differ in the C++ standard library's ABI.
    """
    if info["python"] != f"{sys.version_info.major}.{sys.version_info.minor}":
        return f"it was built for Python {info['python']}; install gfl-ops again to rebuild it"
    built, found = str(info["torch"]), str(torch.__version__)
    fits = _minor(built) == _minor(found)
    if fits and info["cuda"]:
        fits = _major(info["torch_cuda"]) == _major(torch.version.cuda)
    if fits and info["cxx11_abi"] != bool(torch.compiled_with_cxx11_abi()):
        fits = False
    if fits:
        return ""
    return f"it was built with torch {built}, and this is torch {found}; install gfl-ops again to rebuild it"


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def _major(version: str | None) -> str:
    return (version or "none").split(".")[0]


def _shadowed() -> str:
    """A text if this folder, on sys.path before site-packages, hides an installed package; empty if it does not."""
    for distribution in importlib.metadata.distributions(name="gfl-ops"):
        installed = Path(str(distribution.locate_file("gfl_ops"))).resolve()
        if installed != _FOLDER and (installed / "_build_info.py").is_file():
            return (
                f"the source tree {_FOLDER} is imported instead of the installed package {installed};"
                " start Python in another folder, or install with `pip install -e .`"
            )
    return ""


def _say_what_is_missing(extension: Extension) -> None:
    if extension.module is None:
        if sys.platform != "linux":
            return  # it is built for Linux only, as the doctor says
        what, why, rest = "the compiled extension", extension.reason, "everything"
    elif extension.cuda_reason and torch.version.cuda:
        what, why, rest = "the extension's CUDA part", extension.cuda_reason, "CUDA tensors"
    else:
        return
    text = f"gfl_ops: {what} is not there: {why}. Triton and the reference serve {rest}; `gfl doctor` tells more."
    warnings.warn(text, RuntimeWarning, stacklevel=2)


EXTENSION = _load()
_say_what_is_missing(EXTENSION)


def why_not(device_type: str) -> str | None:
    """Why the extension has no kernels for a device; None if it has."""
    if EXTENSION.module is None:
        return f"the compiled extension is not there: {EXTENSION.reason}"
    if device_type == "cuda":
        return f"the extension has no CUDA part: {EXTENSION.cuda_reason}" if EXTENSION.cuda_reason else None
    return None if device_type == "cpu" else f"the extension has no kernels for {device_type}"


def why_not_on_gpus() -> str | None:
    """Why the CUDA part has no code for a GPU of this machine; None if it has for all. Initialises CUDA."""
    codes = EXTENSION.info.get("archs", [])
    if why_not("cuda") is not None:
        return None  # a reason that needs no GPU
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not any(runs_on(code, capability) for code in codes):
            name = f"{torch.cuda.get_device_name(index)} (sm_{capability[0]}{capability[1]})"
            return (
                f"the extension was compiled for {', '.join(codes)}, not for {name}; install gfl-ops again with"
                f" TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
            )
    return None


def runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Whether code by nvcc's name for it ("sm_80", "compute_90", "sm_90a") runs on a GPU of the capability.

    Machine code runs on later GPUs of the same major version, PTX on every later one; code for the features of one GPU
    ("a") on that GPU alone, of one family ("f") within its major version.
    """
    kind, _, number = code.partition("_")
    suffix = number[-1] if number[-1:].isalpha() else ""
    digits = number.removesuffix(suffix)
    made_for = int(digits[:-1]), int(digits[-1])
    if suffix == "a":
        return capability == made_for
    if kind == "compute" and not suffix:
        return capability >= made_for
    return capability[0] == made_for[0] and capability[1] >= made_for[1]


def serves(name: str, device_type: str) -> bool:
    """Whether the extension registered a kernel for the operator ``gfl::<name>`` on a device."""
    if EXTENSION.module is None:
        return False
    operator = f"gfl::{name}"
    return torch._C._dispatch_has_kernel(operator) and torch._C._dispatch_has_kernel_for_dispatch_key(
        operator, device_type.upper()
    )
