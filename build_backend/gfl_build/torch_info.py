# SPDX-License-Identifier: Apache-2.0
"""Which torch the extension is for: found and read without importing it."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .flags import FLAGS

OLDEST = (2, 6)


@dataclass(frozen=True)
class TorchInfo:
    """An installed torch.

    Attributes:
        version: as in `torch.__version__`, for example "2.13.0+cu130".
        cuda: the CUDA version it was built with, None for a build without.
        hip: the ROCm version, None for a build without.
        folder: the package's folder.
    """

    version: str
    cuda: str | None
    hip: str | None
    folder: Path

    @property
    def release(self) -> tuple[int, int]:
        numbers = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)

    @property
    def site(self) -> Path:
        return self.folder.parent

    @property
    def standard(self) -> int:
        """The C++ standard that its headers want: 17, later 20. No header tells; how torch builds extensions does."""
        try:
            own = (self.folder / "utils" / "cpp_extension.py").read_text(encoding="utf-8")
        except OSError:
            own = ""
        return max([FLAGS["std"], *map(int, re.findall(r"-std=c\+\+(\d\d)\b", own))])


def read_torch(folder: Path) -> TorchInfo | None:
    """Read torch's own version.py; None if there is no torch."""
    try:
        tree = ast.parse((folder / "version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None
    values: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    values[target.id] = node.value.value
    version = values.get("__version__")
    if not isinstance(version, str):
        return None
    cuda, hip = values.get("cuda"), values.get("hip")
    return TorchInfo(version, str(cuda) if cuda else None, str(hip) if hip else None, folder)


def find_torch() -> TorchInfo | None:
    """The torch that the installed extension will be used with, None if there is none new enough.

    In order: what this process can import (no build isolation, or torch is a build requirement), the
    site-packages of the interpreter (pip's isolation keeps `sys.prefix`), what that interpreter imports when it is
    started outside the isolation (user site, system site packages, a development install).
    """
    for folder in (*_importable(), *_site_packages(), *_outside_isolation()):
        info = read_torch(folder)
        if info is not None and info.release >= OLDEST:
            return info
    return None


def _importable() -> Iterable[Path]:
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent


def _site_packages() -> Iterable[Path]:
    paths = sysconfig.get_paths()
    for name in ("purelib", "platlib"):
        yield Path(paths[name]) / "torch"


def _outside_isolation() -> Iterable[Path]:
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    try:
        # From the root folder: a `torch` folder in the current one would be taken for the package.
        found = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=os.sep, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return
    if found.returncode == 0 and found.stdout.strip():
        yield Path(found.stdout.strip()).parent


@dataclass(frozen=True)
class Abi:
    """What decides whether compiled code fits a torch: the C++ standard library's ABI and pybind11's own marks."""

    cxx11: bool
    pybind: tuple[tuple[str, str], ...]

    @property
    def flags(self) -> list[str]:
        """As compiler flags."""
        return [f"-D_GLIBCXX_USE_CXX11_ABI={int(self.cxx11)}", *(f'-DPYBIND11_{n}="{v}"' for n, v in self.pybind)]


def read_abi(torch: TorchInfo) -> Abi:
    """Ask torch, which has to be imported for it, so in a process of its own.

    Raises:
        RuntimeError: it does not import, or another torch does.
    """
    code = f"""if True:
        import json, sys
        sys.path.append({str(torch.site)!r})
        import torch
        names = ("COMPILER_TYPE", "STDLIB", "BUILD_ABI")
        pybind = [(n, getattr(torch._C, "_PYBIND11_" + n, None)) for n in names]
        print(json.dumps([torch.__version__, torch.compiled_with_cxx11_abi(), pybind]))
    """
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if answer.returncode != 0:
        raise RuntimeError(f"torch {torch.version} in {torch.site} can't be imported:\n{answer.stderr.strip()}")
    version, cxx11, pybind = json.loads(answer.stdout.splitlines()[-1])
    if version != torch.version:
        raise RuntimeError(f"found torch {torch.version} in {torch.site}, but `import torch` gives {version}")
    return Abi(bool(cxx11), tuple((name, value) for name, value in pybind if value is not None))
