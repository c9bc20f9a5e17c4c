# SPDX-License-Identifier: Apache-2.0
"""What the package says if the extension does not fit the torch it meets, or is not there; and whole builds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="64")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "build_backend"))

from bare_machine import bare_machine  # noqa: E402, F401

from gfl_build import host, plan  # noqa: E402
from gfl_build.commands import record  # noqa: E402


def copy_of_the_package(folder: Path, **changes: object) -> Path:
    """The installed package as a tree of its own, with another record; returns its parent folder."""
    import gfl_ops
    from gfl_ops.core import extension

    shutil.copytree(Path(gfl_ops.__file__).parent, folder / "gfl_ops", ignore=shutil.ignore_patterns("__pycache__"))
    info = {**record(plan.Plan(None, None, None, (), "nothing", "nothing")), **extension.EXTENSION.info, **changes}
    (folder / "gfl_ops" / "_build_info.py").write_text(f"BUILD_INFO = {info!r}\n")
    return folder


def import_there(folder: Path) -> str:
    # No other installed package: the copy would rightly be told to stand in its way.
    code = "import importlib.metadata as m; m.distributions = lambda **_: []; "
    code += "import gfl_ops, gfl_ops.core.extension as e; print(e.EXTENSION.module is None, e.why_not('cpu'))"
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "always::RuntimeWarning", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_torch_changed_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from gfl_ops.core import extension

    fitting = {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cuda": None,
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
    }
    assert extension._mismatch(fitting) == ""
    for change in (
        {"torch": "2.5.0"},
        {"cxx11_abi": not torch.compiled_with_cxx11_abi()},
        {"cuda": "11.8", "torch_cuda": "11.8"},
    ):
        assert "it was built with torch" in extension._mismatch({**fitting, **change})
    assert "built for Python 3.9" in extension._mismatch({**fitting, "python": "3.9"})

    said = import_there(copy_of_the_package(tmp_path, **{**fitting, "extension": True, "torch": "2.5.0+cu121"}))
    assert said.startswith("True") and said.count("RuntimeWarning") == 1
    assert "torch 2.5.0+cu121" in said and f"torch {torch.__version__}" in said


def test_source_tree_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gfl_ops.core import extension

    (tmp_path / "gfl_ops").mkdir()
    (tmp_path / "gfl_ops" / "_build_info.py").touch()
    (tmp_path / "gfl_ops-9.dist-info").mkdir()
    (tmp_path / "gfl_ops-9.dist-info" / "METADATA").write_text("Name: gfl-ops\nVersion: 9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = extension._shadowed()
    assert str(extension._FOLDER) in said and str(tmp_path / "gfl_ops") in said


def test_missing_cuda_part_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from gfl_ops.core import extension

    built = extension.Extension(sys, "", "no nvcc was found")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(RuntimeWarning, match="CUDA part is not there: no nvcc was found") as said:
        extension._say_what_is_missing(built)
    assert len(said) == 1
    monkeypatch.setattr(torch.version, "cuda", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extension._say_what_is_missing(built)


def build_wheel(folder: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    source = folder / "source"
    unwanted = shutil.ignore_patterns(".*", "build*/", "build", "build-*", "dist", "*.so", "__pycache__", "*.egg-info")
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    for name in ("build_backend", "gfl_ops", "python", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
    done = subprocess.run(command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return zipfile.ZipFile(next(folder.glob("*.whl"))), done.stdout + done.stderr


@pytest.mark.slow
def test_pure_wheel(tmp_path: Path) -> None:
    wheel, said = build_wheel(tmp_path, CXX=str(tmp_path / "none"))
    assert wheel.filename is not None and wheel.filename.endswith("-py3-none-any.whl")
    assert said.count("gfl-ops: a pure wheel, without the compiled extension: no C++ compiler was found") == 1
    names = wheel.namelist()
    assert {"gfl_ops/__init__.py", "gfl_ops/py.typed", "gfl_ops/_build_info.py", "gfl/py.typed"} <= set(names)
    assert not [n for n in names if n.endswith(".so") or n.startswith(("csrc", "build_backend", "tests"))]
    metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "Requires-Dist: torch>=2.6\n" in metadata and "License: Apache-2.0\n" in metadata


@pytest.mark.slow
def test_compiled_wheel(tmp_path: Path) -> None:
    import torch

    if host.find_compiler() is None:
        pytest.skip("no C++ compiler")
    wheel, _ = build_wheel(tmp_path, GFL_OPS_WITH_CUDA="0")
    names = wheel.namelist()
    assert [n for n in names if n.startswith("gfl_ops/_C.") and n.endswith(".so")]
    metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert f"Requires-Dist: torch=={'.'.join(torch.__version__.split('.')[:2])}.*\n" in metadata
    wheel.extractall(tmp_path / "installed")
    assert import_there(tmp_path / "installed").startswith("False")
