# SPDX-License-Identifier: Apache-2.0
"""What the dialects have in common: nothing of a system is imported before it is asked for, all can be taken back."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gfl_ops.compat._patch import Change, Patch, graft, stand_in

SYSTEMS = sorted(
    p.stem
    for p in (Path(__file__).resolve().parent.parent / "gfl_ops" / "compat").glob("*.py")
    if not p.stem.startswith("_") and not p.stem.startswith("mmdet_")
)


def test_importing_a_dialect_imports_torch_alone() -> None:
    code = f"""
import importlib, sys
for name in {SYSTEMS}:
    importlib.import_module("gfl_ops.compat." + name)
found = set(n.split(".")[0] for n in sys.modules) & {{"mmdet", "mmcv", "mmengine", "torchvision", "ultralytics", "gfl"}}
print("imported", sorted(found))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent
    )
    assert result.stdout.strip() == "imported []", result.stderr


@pytest.fixture
def package() -> Iterator[types.SimpleNamespace]:
    """A class, a module with a function, and a module that has imported that function."""

    class Parent:
        def inherited(self) -> str:
            return "their parent's"

    class Theirs(Parent):
        def forward(self) -> str:
            return "theirs"

    def function() -> str:
        return "theirs"

    modules = {name: types.ModuleType(name) for name in ("their_library", "their_user")}
    for module in modules.values():
        module.function = function  # type: ignore[attr-defined]
    sys.modules.update(modules)
    yield types.SimpleNamespace(cls=Theirs, **modules)
    for name in ("their_library", "their_user", "their_late_user"):
        sys.modules.pop(name, None)


def replacement(*_: object) -> str:
    return "ours"


def patch_of(package: types.SimpleNamespace, broken: bool = False) -> Patch:
    def plan() -> Iterator[Change]:
        yield Change("Theirs", package.cls, "forward", replacement)
        yield Change("Theirs", package.cls, "inherited", replacement)
        yield Change("function", package.their_library, "function", replacement, everywhere=True)
        if broken:
            raise ImportError("no such library")

    return Patch(plan)


def heard(package: types.SimpleNamespace) -> list[str]:
    thing = package.cls()
    functions = [m.function for n, m in vars(package).items() if n.startswith("their")]
    return [thing.forward(), thing.inherited(), *(f() for f in functions)]


THEIRS = """
import torch
from torch import Tensor


def helper(x: Tensor) -> Tensor:
    return x * 2.0


def function(x: Tensor) -> Tensor:
    return helper(x)


class Module(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return helper(x) + 1


class User(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return function(x)
"""


def test_torch_jit_gets_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted and traced, what contained a replaced function or method is what it was; called, it is ours."""
    (tmp_path / "their_jit.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("their_jit")

    def ours(*given: torch.Tensor) -> torch.Tensor:
        return torch.zeros(())

    def plan() -> Iterator[Change]:
        new = stand_in(ours, theirs.function)
        yield Change("their_jit.function", theirs, "function", new, everywhere=True)
        yield from graft(theirs.Module, types.new_class("Ours", (), {}, lambda n: n.update(forward=ours)))

    x = torch.rand(3)
    with Patch(plan).apply():
        for module, want in ((theirs.User(), 2 * x), (theirs.Module(), 2 * x + 1)):
            assert module(x).shape == ()
            for graph in (torch.jit.script(module), torch.jit.trace(module, x)):
                torch.testing.assert_close(graph(x), want)
        torch.testing.assert_close(torch.jit.script(theirs.function)(x), 2 * x)
    sys.modules.pop("their_jit")


BEFORE = ["theirs", "their parent's", "theirs", "theirs"]


def test_what_is_replaced_comes_back(package: types.SimpleNamespace) -> None:
    patch = patch_of(package)
    before = dict(vars(package.cls))
    assert patch.apply() == ["Theirs", "function"]
    assert heard(package) == ["ours"] * 4
    late = types.ModuleType("their_late_user")
    late.function = package.their_library.function  # type: ignore[attr-defined]
    sys.modules["their_late_user"] = late
    assert patch.remove() == ["Theirs", "function"]
    assert heard(package) == BEFORE and late.function() == "theirs"
    assert dict(vars(package.cls)) == before
    assert patch.remove() == []


def test_it_is_idempotent_and_a_context_manager(package: types.SimpleNamespace) -> None:
    patch = patch_of(package)
    with pytest.raises(KeyError), patch.apply() as names:
        assert names == ["Theirs", "function"]
        with patch.apply() as again:
            assert again == names
        assert heard(package) == ["ours"] * 4, "the inner block replaced nothing, so it takes nothing back"
        raise KeyError
    assert heard(package) == BEFORE


def test_a_failure_leaves_nothing_replaced(package: types.SimpleNamespace) -> None:
    with pytest.raises(ImportError, match="no such library"):
        patch_of(package, broken=True).apply()
    assert heard(package) == BEFORE
