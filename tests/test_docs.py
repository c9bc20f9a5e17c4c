# SPDX-License-Identifier: Apache-2.0
"""What the documentation names exists: paths, functions, and links between its files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gfl
import gfl_ops
from gfl_ops.core.registry import SPECS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("docs/architecture.md", "docs/data.md", "CONTRIBUTING.md", "README.md")
# What a build, a command or a user makes, and other projects' files.
ELSEWHERE = re.compile(r"^(runs|mine|build|out|coco|annotations|found|detections/|/)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    """The text without its code blocks."""
    return re.sub(r"```.*?```", "", read(name), flags=re.DOTALL)


def paths(text: str) -> set[str]:
    """What is written like a path in backticks; a placeholder such as <family> stands for any name."""
    quoted = re.findall(r"`([\w./<>*-]+/[\w./<>*-]*|[\w-]+\.(?:md|toml))`", text)
    return {path for path in quoted if not ELSEWHERE.match(path)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document: str) -> None:
    found = paths(prose(document))
    assert document in ("README.md", "docs/data.md") or len(found) > 10
    missing = [path for path in found if not list(ROOT.glob(re.sub(r"<\w+>", "*", path).rstrip("/") + "*"))]
    assert not missing, f"{document} names {missing}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", read(document)):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).exists(), f"{document} links to {target}"


def test_every_function_exists() -> None:
    for name in re.findall(r"`(gfl_ops|gfl)\.(\w+)", read("docs/architecture.md")):
        package = {"gfl": gfl, "gfl_ops": gfl_ops}[name[0]]
        assert hasattr(package, name[1]) or name[1] == "_C", ".".join(name)


def test_the_families_are_those_of_the_tree() -> None:
    folders = {path.name for path in (ROOT / "gfl_ops" / "ops").iterdir() if (path / "__init__.py").is_file()}
    assert set(re.findall(r"^\| `(\w+)` \|", read("docs/architecture.md"), flags=re.MULTILINE)) == folders
    families = {getattr(gfl_ops, spec.public[0]).__module__.split(".")[-2] for spec in SPECS.values()}
    assert families == folders


def test_the_architecture_fits_on_a_few_screens() -> None:
    assert len(read("docs/architecture.md").splitlines()) <= 150
