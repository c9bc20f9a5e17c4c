# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: loaded where it fits the torch at hand, else the reason why it is not there."""

from __future__ import annotations

import importlib.metadata
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Extension:
    """What there is of the compiled extension.

    Attributes:
        module: `gfl_ops._C`, None where it is absent or switched off.
        reason: why there is no module, empty where there is one.
        cuda_reason: why its CUDA part is missing, empty where it is there.
        info: the build's record: torch, CUDA, compiler, architectures; empty for a tree that was never built.
    """

    module: ModuleType | None
    reason: str
    cuda_reason: str
    info: dict[str, Any] = field(default_factory=dict)


def _load() -> Extension:
    try:
        from ._build_info import BUILD_INFO as info
    except ImportError:
        return _without(_never_built(), {})
    if not info["extension"]:
        return _without(f"it was installed without one: {info['reason']}", info)
    mismatch = _mismatch(info)
    if mismatch:
        return _without(mismatch, info)
    try:
        from . import _C
    except ImportError as error:
        shadow = _shadowed()
        return _without(shadow or f"it does not load: {error}", info)
    return Extension(_C, "", info["cuda_reason"], info)


def _without(reason: str, info: dict[str, Any]) -> Extension:
    return Extension(None, reason, reason, info)


def _mismatch(info: dict[str, Any]) -> str:
    """Why an extension with this record does not fit the imported torch; empty if it does.

    The C++ interface of torch is stable within a minor version. A CUDA part also needs the CUDA libraries of the torch it
    was linked with, and builds for different CUDA versions may differ in the C++ standard library's ABI.
    """
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


def _never_built() -> str:
    return _shadowed() or f"{_FOLDER} is a source tree that was never built; pip install -e . builds it in place"


def _shadowed() -> str:
    """Says so where this folder, on sys.path before site-packages, hides an installed package; empty if it does not."""
    for distribution in importlib.metadata.distributions(name="gfl-ops"):
        installed = Path(str(distribution.locate_file("gfl_ops"))).resolve()
        if installed != _FOLDER and (installed / "_build_info.py").is_file():
            return (
                f"the source tree {_FOLDER} is imported instead of the installed package {installed};"
                " start Python in another folder, or install with pip install -e ."
            )
    return ""


def _say_what_is_missing(extension: Extension) -> None:
    if extension.module is None:
        what, why, serve = "the compiled extension", extension.reason, "Triton and the reference serve instead"
    elif extension.cuda_reason and torch.version.cuda:
        what, why, serve = "the extension's CUDA part", extension.cuda_reason, "Triton and the reference serve CUDA tensors"
    else:
        return
    warnings.warn(f"gfl_ops: without {what}: {why}. {serve}.", RuntimeWarning, stacklevel=2)


EXTENSION = _load()
_say_what_is_missing(EXTENSION)


def why_not(device_type: str) -> str | None:
    """Why the extension has no kernels for a device; None if it has."""
    if EXTENSION.module is None:
        return f"the compiled extension is not there: {EXTENSION.reason}"
    if device_type == "cuda":
        return f"the extension has no CUDA part: {EXTENSION.cuda_reason}" if EXTENSION.cuda_reason else None
    return None if device_type == "cpu" else f"the extension has no kernels for {device_type}"


def serves(name: str, device_type: str) -> bool:
    """Whether the extension registered a kernel for the operator ``gfl::<name>`` on a device."""
    if EXTENSION.module is None:
        return False
    operator = f"gfl::{name}"
    return torch._C._dispatch_has_kernel(operator) and torch._C._dispatch_has_kernel_for_dispatch_key(
        operator, device_type.upper()
    )
