# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: what it imports, how a backend is chosen, what the doctor and the command say."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gfl_ops
from gfl_ops.core.registry import SPECS

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("GFL_OPS_")} | environment
    return run([sys.executable, "-c", code], env)


def run(command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """In a folder where neither the source tree nor tests/gfl hides the installed package."""
    return subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=300, cwd=Path(__file__).parent / "support"
    )


def test_gfl_ops_imports_torch_alone() -> None:
    """With everything refused but torch, what torch imports itself, and the standard library."""
    code = """
import sys, torch, torch.utils.cpp_extension
import torch._dynamo
allowed = set(sys.stdlib_module_names) | {name.split(".")[0] for name in sys.modules} | {"torch", "gfl_ops"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed or name.split(".")[0] in ("numpy", "PIL", "gfl", "triton", "tqdm"):
            raise ImportError("refused: " + name)
for name in [n for n in sys.modules if n.split(".")[0] in ("numpy", "triton", "PIL", "gfl")]:
    allowed.discard(name)
sys.meta_path.insert(0, Refuse())
import gfl_ops
pred = torch.randn(4, 3, requires_grad=True)
gfl_ops.quality_focal_loss(pred, (torch.tensor([0, 1, 2, 3]), torch.rand(4))).backward()
print("fine", "gfl" in sys.modules)
"""
    result = python(code)
    assert result.stdout.strip() == "fine False", result.stderr


def _imports_at_load(path: Path) -> Iterator[tuple[str, int, list[str]]]:
    """(module, level, names) of every import that runs when the file is imported: not those inside functions."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level, [alias.name for alias in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)


def import_graph(root: Path, package: str) -> dict[str, set[str]]:
    """Which modules of a package each of them imports at load; a package that only re-exports counts as a module."""
    files = {
        ".".join([package, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__"): path
        for path in root.rglob("*.py")
    }
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        parts = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for module, level, names in _imports_at_load(path):
            base = ".".join([*parts[: len(parts) + 1 - level], *filter(None, [module])]) if level else module
            targets = [f"{base}.{n}" for n in names if f"{base}.{n}" in files]
            graph[name].update(targets or [base] if base in files or targets else [])
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        for target in sorted(graph[name]):
            if found := visit(target, [*way, name]):
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := visit(name, []))), None)


@pytest.mark.parametrize(("folder", "package"), [("gfl_ops", "gfl_ops"), ("python/gfl", "gfl")])
def test_imports_have_no_circle(folder: str, package: str) -> None:
    graph = import_graph(ROOT / folder, package)
    assert len(graph) > 10 and sum(map(len, graph.values())) > 20
    circle = circle_in(graph)
    assert circle is None, " -> ".join(circle)


def test_a_circle_is_found(tmp_path: Path) -> None:
    for name, text in {
        "__init__": "from .a import x",
        "a": "from . import b\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import c",
        "b": "def late():\n    from . import a\nfrom .c import y",
        "c": "if True:\n    from . import b",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert circle_in(import_graph(tmp_path, "p")) == ["p.b", "p.c", "p.b"]
    (tmp_path / "c.py").write_text("import torch")
    assert circle_in(import_graph(tmp_path, "p")) is None


def test_the_backend_can_be_chosen_and_comes_back() -> None:
    before = gfl_ops.get_backend()
    with gfl_ops.set_backend("reference"):
        assert gfl_ops.get_backend() == "reference"
        with pytest.raises(KeyError), gfl_ops.set_backend("native"):
            raise KeyError
        assert gfl_ops.get_backend() == "reference"
    assert gfl_ops.get_backend() == before


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="`name` must be one of 'auto', 'native', 'triton', 'reference', got 'cuda'"):
        gfl_ops.set_backend("cuda")


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    code = """
import torch, gfl_ops
gfl_ops.set_backend("triton")
gfl_ops.quality_focal_loss(torch.randn(4, 3), (torch.tensor([0, 1, 2, 3]), torch.rand(4)))
"""
    result = python(code, TRITON_INTERPRET="0")
    assert result.returncode != 0
    assert "RuntimeError: gfl_ops: backend 'triton' can't run qfl on cpu: " in result.stderr


def test_the_environment_sets_the_first_backend() -> None:
    code = "import gfl_ops; print(gfl_ops.get_backend())"
    assert python(code, GFL_OPS_BACKEND="reference").stdout.strip() == "reference"
    assert python(code).stdout.strip() == "auto"
    wrong = python(code, GFL_OPS_BACKEND="fast")
    assert "GFL_OPS_BACKEND must be one of" in wrong.stderr and wrong.returncode != 0


def test_the_backend_is_followed_by_a_compiled_function(generator: torch.Generator) -> None:
    pred = torch.randn(9, 4, generator=generator)
    target = (torch.randint(0, 5, (9,), generator=generator), torch.rand(9, generator=generator))
    torch._dynamo.reset()
    compiled = torch.compile(gfl_ops.quality_focal_loss, fullgraph=True, backend="aot_eager")
    for backend in ("auto", "reference", "auto"):
        with gfl_ops.set_backend(backend):
            torch.testing.assert_close(compiled(pred, target), gfl_ops.quality_focal_loss(pred, target))


@pytest.mark.slow
def test_a_loss_compiles_with_inductor(generator: torch.Generator) -> None:
    pred = torch.randn(50, 8, generator=generator, requires_grad=True)
    target = (torch.randint(0, 9, (50,), generator=generator), torch.rand(50, generator=generator))
    torch._dynamo.reset()
    compiled = torch.compile(gfl_ops.quality_focal_loss, fullgraph=True)
    want = torch.autograd.grad(gfl_ops.quality_focal_loss(pred, target), pred)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(pred, target), pred)[0], want)


def test_the_doctor_names_every_operator_in_80_columns() -> None:
    text = gfl_ops.explain_backend()
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"\n{stem} " in text for stem in SPECS)
    assert torch.__version__ in text


def test_the_command() -> None:
    doctor = run([sys.executable, "-m", "gfl.cli", "doctor"])
    assert doctor.returncode == 0 and "operator" in doctor.stdout, doctor.stderr
    usage = run([sys.executable, "-m", "gfl.cli"])
    assert usage.returncode == 2 and "COMMAND" in usage.stderr
