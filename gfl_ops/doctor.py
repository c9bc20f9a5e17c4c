# SPDX-License-Identifier: Apache-2.0
"""What is installed, what runs each operator, and why nothing faster does; printed by ``gfl doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import textwrap
import warnings
from typing import Any

import torch

from . import kernel_check
from ._version import __version__
from .core import backends, extension
from .core.registry import SPECS

WIDTH = 80
# Extras of those who work on the package itself.
OF_DEVELOPERS = {"test", "dev", "docs"}


def explain_backend() -> str:
    """A text of a few dozen lines: what runs each operator on this machine, and why another backend does not."""
    if torch.cuda.is_available():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the text says the same
            backends.meet_gpu()
    return "\n\n".join(["\n".join(_facts()), "\n".join(_table()), "\n".join(_reasons())]) + "\n"


def _facts() -> list[str]:
    info = extension.EXTENSION.info
    facts = [
        ("gfl-ops", f"{__version__} in {os.path.dirname(os.path.abspath(__file__))}"),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {_cuda_of_torch()}, {torch.get_num_threads()} CPU threads"),
        ("GPU", _gpus()),
        ("memory", _memory()),
        ("disk", _disk()),
        ("packages", _packages(optional=False)),
        ("optional", _packages(optional=True)),
        ("extension", extension.why_not("cpu") or f"compiled by {info['compiler']} for torch {info['torch']}"),
        ("CPU kernels", _cpu_kernels()),
        ("its CUDA part", _cuda_part(info)),
        ("Triton", _triton()),
        ("backend", _chosen()),
        *(("self-check", _self_check(device)) for device in kernel_check.devices()),
    ]
    wrapped = []
    for name, fact in facts:
        wrapped += textwrap.wrap(f"{name:<14} {fact}", WIDTH, subsequent_indent=" " * 15, break_on_hyphens=False)
    return wrapped


def _cuda_of_torch() -> str:
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(
        f"{name} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})" for i, name in enumerate(names)
    )


def _memory() -> str:
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    text = f"{pages * page / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        sizes = (torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
        text += f"; GPU {', '.join(f'{size / 2**30:.1f} GiB' for size in sizes)}"
    return f"{text}, {len(os.sched_getaffinity(0))} CPU cores for this process"


def _disk() -> str:
    """Free bytes where a run's folder is made by default, and where weights and verdicts are kept."""
    free = {place: shutil.disk_usage(place).free for place in (os.getcwd(), os.path.expanduser("~"))}
    return ", ".join(f"{size / 2**30:.1f} GiB free in {place}" for place, size in free.items())


def _packages(optional: bool) -> str:
    """What the package requires, or what its extras do, with the versions that are installed."""
    try:
        requirements = importlib.metadata.requires("gfl-ops") or []
    except importlib.metadata.PackageNotFoundError:
        return "unknown: this is a source tree that is not installed"
    there: dict[str, str] = {}
    missing: set[str] = set()
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement)[0]
        extra = re.search(r"extra == [\"']([\w-]+)", requirement)
        marked = "python_version" in requirement  # for other versions of Python
        if bool(extra) != optional or marked or (extra and extra[1] in OF_DEVELOPERS):
            continue
        try:
            there[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.add(name)
    lists = [", ".join(f"{name} {version}" for name, version in sorted(there.items()))]
    lists += [f"missing: {', '.join(sorted(missing))}"] if missing else []
    return "; ".join(filter(None, lists))


def _cpu_kernels() -> str:
    module = extension.EXTENSION.module
    return f"{module.cpu_isa()}; GFL_OPS_CPU_ISA=portable, avx2 or avx512 asks for less" if module else "none"


def _cuda_part(info: dict[str, Any]) -> str:
    if extension.EXTENSION.cuda_reason:
        return f"none: {extension.EXTENSION.cuda_reason}"
    return f"compiled by {info['nvcc']} for {', '.join(info['archs'])}"


def _triton() -> str:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    return f"{version}{', interpreting (TRITON_INTERPRET=1)' if backends.TRITON_INTERPRETS else ''}"


def _chosen() -> str:
    source = " (GFL_OPS_BACKEND)" if os.environ.get("GFL_OPS_BACKEND") == backends.get_backend() else ""
    return f"{backends.get_backend()}{source}"


def _self_check(device: str) -> str:
    report = kernel_check.stored(device)
    if report is None:
        return f"of {device}: not done; `gfl doctor --check` runs every kernel"
    right = sum(verdict.status == kernel_check.OK for verdict in report.verdicts)
    return f"of {device}: {right} of {len(report.verdicts)} kernels right"


def _table() -> list[str]:
    """Which backend "auto" chooses for each operator on each kind of device."""
    lines = [f"{'operator':<18}{'cpu':<12}{'cuda':<12}has kernels for", "-" * WIDTH]
    for stem in SPECS:
        serving = [backends.automatic(stem, device) for device in ("cpu", "cuda")]
        kernels = backends.kernels(stem)
        compiled = [f"native {device}" for device in kernels.native]
        also = ", ".join([*compiled, *(["triton"] if kernels.triton else [])]) or "-"
        lines.append(f"{stem:<18}{serving[0]:<12}{serving[1]:<12}{also}")
    return lines


def _reasons() -> list[str]:
    """Why the faster backends do not run: each reason once, with the operators that it applies to."""
    held: dict[tuple[str, str, str], list[str]] = {}
    for stem in SPECS:
        for device in ("cpu", "cuda"):
            for backend in ("native", "triton"):
                reason = backends.unavailable(backend, stem, device) or backends.distrusted(backend, stem, device)
                if reason is not None:
                    held.setdefault((backend, device, reason.replace(stem, "it")), []).append(stem)
    lines = ["why another backend does not serve:"]
    for (backend, device, reason), stems in held.items():
        which = "every operator" if len(stems) == len(SPECS) else ", ".join(stems)
        lines += textwrap.wrap(
            f"- {backend} on {device}: {which}: {reason}", WIDTH, subsequent_indent="  ", break_on_hyphens=False
        )
    return lines
