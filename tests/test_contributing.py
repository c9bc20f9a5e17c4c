# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING.md adds a loss to a copy of the tree by its own code blocks; the copy is compiled and tested."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from gfl_ops.core import extension
from gfl_ops.core.backends import why_no_triton

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STEM = "brier"


class Block(NamedTuple):
    path: str
    code: str


# A block that belongs to a file names it after the language.
BLOCKS = [Block(path, code) for path, code in re.findall(r"^```\w+ (\S+)\n(.*?)^```", TEXT, flags=re.M | re.S)]


def apply(block: Block, tree: Path) -> None:
    """Put the block where the text says: into a new file, the list of losses, the end of a file, or the imports."""
    file = tree / block.path
    if not file.exists():
        file.write_text(block.code, encoding="utf-8")
        return
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".h":
        name = re.findall(r"^struct (\w+)", block.code, flags=re.M)[0]
        text, lists = re.subn(r"^(using ScoreLosses = .*)>;", rf"{block.code}\n\1, {name}>;", text, flags=re.M)
        assert lists == 1
    elif "__all__" in text:
        name = block.code.split()[-1]
        text = text.replace("\n__all__ = [", f"{block.code}\n__all__ = [\n    {name!r},")
    else:
        text += f"\n\n{block.code}"
    file.write_text(text, encoding="utf-8")


def copy_of_the_tree(folder: Path) -> Path:
    """The files that a build or a test reads, without what was built."""
    tree = folder / "tree"
    for name in ("gfl_ops", "csrc", "python", "benchmarks", "scripts", "tests", "build_backend", "docs", "examples"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tree / name)
    return tree


BUILD = """
import shutil, subprocess, sys, sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from gfl_build import commands, ninja_build
from gfl_build.plan import make_plan
from gfl_build.torch_info import read_abi

tree, built, changed = Path(sys.argv[1]), Path(sys.argv[2]), set(sys.argv[3:])
plan = replace(make_plan(), cuda=None, archs=())
abi = read_abi(plan.torch)

def includes(file, seen):
    if file in seen or not file.is_file():
        return seen
    seen.add(file)
    for line in file.read_text().splitlines():
        if line.startswith("#include \\""):
            name = line.split('"')[1]
            for folder in (file.parent, tree / "csrc", tree / "csrc" / "include"):
                includes(folder / name, seen)
    return seen

def compile(step):
    before = built / step.output.relative_to(tree / "objects")
    if before.is_file() and not {str(f.relative_to(tree)) for f in includes(step.source, set())} & changed:
        return before
    step.output.parent.mkdir(parents=True, exist_ok=True)
    print("compiling", step.output.relative_to(tree / "objects"), flush=True)
    subprocess.run([*step.command, "-c", str(step.source), "-o", str(step.output)], check=True)
    return step.output

with ThreadPoolExecutor(ninja_build.job_count()) as pool:
    objects = list(pool.map(compile, ninja_build.steps(plan, tree, tree / "objects", abi)))
library = tree / "gfl_ops" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
subprocess.run(ninja_build.link_command(plan, objects, library), check=True)
commands.write_record(commands.record(plan, abi), tree)
"""


def run(command: list[str], tree: Path, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'python'}:{tree / 'build_backend'}", **environment}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def test_the_blocks_are_four_files() -> None:
    assert len(BLOCKS) == 4 == len({block.path for block in BLOCKS})
    assert sum(block.code.count("\n") for block in BLOCKS) <= 150
    assert not (ROOT / BLOCKS[0].path).exists() and all((ROOT / block.path).exists() for block in BLOCKS[1:])


@pytest.mark.slow
def test_a_loss_is_added_by_the_words_of_contributing(tmp_path: Path) -> None:
    if extension.EXTENSION.module is None:
        pytest.skip(f"there is no compiled extension here: {extension.EXTENSION.reason}")
    tree = copy_of_the_tree(tmp_path)
    for block in BLOCKS:
        apply(block, tree)
    # What the blocks don't touch keeps the objects of the last build.
    built = next(iter(sorted((ROOT / "build").glob("temp/*/torch-*[!a]"))), ROOT / "nothing")
    run([sys.executable, "-c", BUILD, str(tree), str(built), *(block.path for block in BLOCKS)], tree)

    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_op_contract.py", "-k"]
    out = run([*tests, f"{STEM}-native-cpu"], tree)
    assert int(re.findall(r"(\d+) passed", out)[0]) >= 12, out
    if not why_no_triton():
        out = run([*tests, f"{STEM}-triton"], tree, TRITON_INTERPRET="1")
        assert int(re.findall(r"(\d+) passed", out)[0]) >= 12, out

    words = ["--ops", STEM, "--dtypes", "fp32", "--size", "96x160", "--rounds", "1", "--seconds", "0.01"]
    out = run([sys.executable, "benchmarks/bench_losses.py", *words, "--device", "cpu", "--out", str(tmp_path)], tree)
    assert re.search(rf"{STEM} fp32 +native", out), out
    run([sys.executable, "scripts/doc_tables.py"], tree)
    row = next(
        line
        for line in (tree / "docs" / "operators.md").read_text(encoding="utf-8").splitlines()
        if f"`{STEM}_loss`" in line
    )
    assert "C++, CUDA, Triton" in row
    if importlib.util.find_spec("ruff"):
        run([sys.executable, "-m", "ruff", "check", "gfl_ops", "--ignore", "E501,I001,RUF022"], tree)
