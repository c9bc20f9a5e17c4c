# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an operator: the user's choice, what is available, and why another backend can't run it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from . import extension

BACKENDS = ("auto", "native", "triton", "reference")


@dataclass(frozen=True)
class _Kernels:
    """What an operator has kernels for: devices of the compiled extension, and Triton."""

    native: tuple[str, ...]
    triton: bool


_KERNELS: dict[str, _Kernels] = {}
_AUTOMATIC: dict[tuple[str, str], str] = {}  # computed once: it can't change while the process runs
_no_native_on_gpu: str | None = None  # known from the first call on a GPU
_gpu_is_new = True
_AT_FIRST_GPU_CALL: list[Callable[[], None]] = []
_DISTRUSTED: dict[tuple[str, str, str], str] = {}  # (backend, stem, device type) -> why
OLDEST_TRITON = (3, 6)  # the oldest that the kernels were run with


def triton_version() -> tuple[int, ...] | None:
    """Triton's major and minor version, None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


_TRITON = triton_version()
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0") == "1"

# A plain module global: torch.compile guards on it, so that a compiled graph follows a later choice.
_backend = "auto"


def declare(stem: str, native: Iterable[str], triton: bool) -> None:
    """Record what an operator has kernels for. Called once per operator, when it is registered."""
    _KERNELS[stem] = _Kernels(tuple(native), triton)
    for device_type in ("cpu", "cuda"):
        _AUTOMATIC[stem, device_type] = automatic(stem, device_type)


def kernels(stem: str) -> _Kernels:
    """What the operator has kernels for, whether or not this machine can run them."""
    return _KERNELS[stem]


def why_no_triton() -> str | None:
    """Why no Triton kernel can be compiled or interpreted here; None if they can."""
    if _TRITON is None:
        return "the package triton is not installed"
    if _TRITON < OLDEST_TRITON:
        return f"it needs Triton {'.'.join(map(str, OLDEST_TRITON))} or later"
    return None


def unavailable(backend: str, stem: str, device_type: str) -> str | None:
    """Why `backend` can't run the operator there; None if it can. "auto", the doctor and the error texts all use it."""
    kernels = _KERNELS[stem]
    if backend == "native":
        if device_type in kernels.native:
            return _no_native_on_gpu if device_type == "cuda" else None
        return extension.why_not(device_type) or f"the extension has no {device_type} kernel for {stem}"
    if backend == "triton":
        if not kernels.triton:
            return f"there is no Triton kernel for {stem}"
        if reason := why_no_triton():
            return reason
        if device_type == "cuda" or TRITON_INTERPRETS:
            return None
        return f"Triton runs on {device_type} only in its interpreter; set TRITON_INTERPRET=1 before Python starts"
    return None


def automatic(stem: str, device_type: str) -> str:
    """The fastest backend that works there. Triton's interpreter is for tests and never chosen automatically."""
    for backend in ("native", "triton") if device_type == "cuda" else ("native",):
        if (backend, stem, device_type) not in _DISTRUSTED and unavailable(backend, stem, device_type) is None:
            return backend
    return "reference"


def at_first_gpu_call(function: Callable[[], None]) -> None:
    """Call `function` before the first operator runs on a GPU."""
    _AT_FIRST_GPU_CALL.append(function)


@torch.compiler.assume_constant_result
def meet_gpu() -> None:
    """What can only be known once there is a GPU: whether the extension has code for it. Runs once, at the first call
    of an operator on one: importing the package must not initialise CUDA."""
    global _gpu_is_new, _no_native_on_gpu
    if not _gpu_is_new:
        return
    _gpu_is_new = False
    _no_native_on_gpu = extension.why_not_on_gpus()
    if _no_native_on_gpu:
        for stem in _KERNELS:
            _AUTOMATIC[stem, "cuda"] = automatic(stem, "cuda")
        rest = "the reference" if why_no_triton() else "Triton"
        text = f"gfl_ops: the compiled CUDA kernels are not used: {_no_native_on_gpu}. CUDA tensors run on {rest}."
        warnings.warn(text, RuntimeWarning, stacklevel=4)
    for function in _AT_FIRST_GPU_CALL:
        function()


def distrust(backend: str, stem: str, device_type: str, reason: str) -> None:
    """Never choose `backend` for the operator there, since its kernel is known to be wrong; says so once."""
    if (backend, stem, device_type) in _DISTRUSTED:
        return
    _DISTRUSTED[backend, stem, device_type] = reason
    _AUTOMATIC[stem, device_type] = automatic(stem, device_type)
    warnings.warn(
        f"gfl_ops: the {backend} kernel of {stem} is not used on {device_type}: {reason}. {stem} runs on the backend"
        f" {_AUTOMATIC[stem, device_type]!r}; please report this with the output of `gfl doctor --check`.",
        RuntimeWarning,
        stacklevel=3,
    )


def distrusted(backend: str, stem: str, device_type: str) -> str | None:
    """Why "auto" does not choose the backend although it could run; None if it may."""
    return _DISTRUSTED.get((backend, stem, device_type))


def serving(stem: str, device_type: str) -> str:
    """The backend that runs the operator there: "native", "triton" or "reference"."""
    if _gpu_is_new and device_type == "cuda":
        meet_gpu()
    if _backend == "auto":
        return _AUTOMATIC.get((stem, device_type), "reference")
    reason = unavailable(_backend, stem, device_type)
    if reason is not None:
        raise RuntimeError(f"gfl_ops: backend {_backend!r} can't run {stem} on {device_type}: {reason}")
    return _backend


class _Restore(contextlib.AbstractContextManager[None]):
    def __init__(self, previous: str) -> None:
        self._previous = previous

    def __exit__(self, *exception: object) -> None:
        set_backend(self._previous)


def set_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Choose what runs the operators, for the whole process; as a context manager, until the block ends.

    Args:
        name: "native" (the compiled extension), "triton" (Triton kernels, on a GPU or in Triton's interpreter),
            "reference" (plain PyTorch) or "auto" (the fastest that works, per operator). The environment
            variable ``GFL_OPS_BACKEND`` sets what a process starts with.

    Raises:
        ValueError: there is no backend of that name. A backend that can't run an operator raises RuntimeError with the
            reason when the operator is called.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"gfl_ops.set_backend: `name` must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    previous, _backend = _backend, name
    return _Restore(previous)


def get_backend() -> str:
    """The current backend: "auto", "native", "triton" or "reference"."""
    return _backend


def _start() -> None:
    name = os.environ.get("GFL_OPS_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"GFL_OPS_BACKEND must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    set_backend(name)


_start()
