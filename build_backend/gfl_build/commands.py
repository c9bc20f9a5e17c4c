# SPDX-License-Identifier: Apache-2.0
"""setuptools' commands: they build the extension by `ninja_build` and write a record of the build into the package."""

from __future__ import annotations

import pprint
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from . import host, ninja_build
from .cuda import probe
from .plan import BuildError, Plan, make_plan, wants_cuda
from .torch_info import Abi, read_abi

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path("gfl_ops") / "_build_info.py"


def extensions(plan: Plan, root: Path) -> list[Extension]:
    """The extension, or an empty list for a pure wheel."""
    if plan.reason:
        return []
    found = [str(s.relative_to(root)) for s in ninja_build.sources(root, with_cuda=True)]
    return [Extension("gfl_ops._C", sources=found)]


def say(text: str) -> None:
    """Print one line to stderr, since frontends read the standard output."""
    print(f"gfl-ops: {text}", file=sys.stderr)


def record(plan: Plan, abi: Abi | None = None) -> dict[str, Any]:
    """What the doctor prints and `gfl_ops.core.extension` compares with the torch in use."""
    torch = plan.torch
    return {
        "extension": torch is not None,
        "reason": plan.reason,
        "torch": torch.version if torch else None,
        "torch_cuda": torch.cuda if torch else None,
        "cxx11_abi": abi.cxx11 if abi else None,
        "compiler": plan.compiler.version if plan.compiler else None,
        "cuda": plan.cuda.version if plan.cuda else None,
        "nvcc": host.last_line((str(plan.cuda.nvcc),)) if plan.cuda else None,
        "archs": list(plan.archs),
        "cuda_reason": plan.cuda_reason,
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def write_record(built: dict[str, Any], folder: Path) -> None:
    """Write the record as a module of the package below `folder`."""
    text = pprint.pformat(built, width=110, sort_dicts=False)
    head = "# SPDX-License-Identifier: Apache-2.0\n# Written by the build: what was built here, and with what.\n"
    target = folder / RECORD
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"{head}BUILD_INFO = {text}\n", encoding="utf-8")


class BuildPy(build_py):
    """Copies the modules; writes the record if no extension is built."""

    def run(self) -> None:
        if not self.editable_mode:
            for package in ("gfl_ops", "gfl"):
                # Leftovers of an earlier build would go into the wheel too.
                shutil.rmtree(Path(self.build_lib) / package, ignore_errors=True)
        super().run()
        plan = make_plan()
        if plan.reason:
            say(f"a pure wheel, without the compiled extension: {plan.reason}. Triton and the reference serve.")
            write_record(record(plan), ROOT if self.editable_mode else Path(self.build_lib))


class BuildExt(build_ext):
    """Builds the extension by `ninja_build`; writes the record."""

    def run(self) -> None:
        plan = make_plan()
        if plan.cuda:
            trouble = probe(plan.cuda, plan.archs)
            if trouble and wants_cuda():
                raise BuildError(f"GFL_OPS_WITH_CUDA=1, but {trouble}")
            if trouble:
                plan = replace(plan, cuda=None, archs=(), cuda_reason=trouble)
        if plan.torch is None:
            return
        say(f"compiling against torch {plan.torch.version} in {plan.torch.site}")
        say("this takes some minutes; GFL_OPS_WITH_CUDA=0 or TORCH_CUDA_ARCH_LIST=9.0 shorten it, docs/install.md how")
        cuda = f"with CUDA part by {plan.cuda.nvcc} for {', '.join(plan.archs)}" if plan.cuda else ""
        say(cuda or f"without CUDA part: {plan.cuda_reason}")
        try:
            self.abi = read_abi(plan.torch)
        except RuntimeError as error:
            raise BuildError(str(error)) from None
        self.plan = plan
        in_place = self.inplace
        super().run()
        write_record(record(plan, self.abi), ROOT if in_place else Path(self.build_lib))

    def build_extension(self, ext: Extension) -> None:
        # The folder of an editable install is temporary; the tree's own keeps the objects for the next build.
        objects = ROOT / "build" / "temp" / f"{self.plat_name}-{sys.implementation.cache_tag}"
        try:
            library = ninja_build.build(self.plan, self.abi, ROOT, objects)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            raise BuildError(f"the extension was not built: {error}") from error
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file, since a process may have the old one mapped.
        target.unlink(missing_ok=True)
        shutil.copy2(library, target)
