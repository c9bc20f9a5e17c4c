# SPDX-License-Identifier: Apache-2.0
"""What the documentation names exists: paths, functions, and links between its files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import gfl
import gfl_ops
from gfl_ops.core.registry import SPECS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = (*PAGES, "CONTRIBUTING.md", "README.md", "SECURITY.md")
# Pages that scripts/docs_pages.py makes.
MADE = {"index.md", "options.md", "examples.md", "contributing.md", "changelog.md", "security.md"}
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
    assert document not in ("docs/architecture.md", "CONTRIBUTING.md") or len(found) > 10
    missing = [path for path in found if not list(ROOT.glob(re.sub(r"<\w+>", "*", path).rstrip("/") + "*"))]
    assert not missing, f"{document} names {missing}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", read(document)):
        if not target.startswith("http") and target not in MADE:
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


def texts() -> str:
    """Every text in the code of both packages and of the build, with … where a value is put in, a line each."""
    found = []
    for folder in ("gfl_ops", "python/gfl", "build_backend"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (one.value if isinstance(one, ast.Constant) else "…" for one in node.values)
                    found.append("".join(map(str, parts)))
    return "\n".join(found)


def test_every_error_of_the_faq_exists() -> None:
    there = texts()
    quoted = re.findall(r"^\*\*(`+) ?(.+?) ?\1\*\*$", read("docs/faq.md"), flags=re.MULTILINE)
    assert len(quoted) > 20
    missing = [
        error for _, error in quoted if not all(part.strip() in there for part in error.split("…")) or len(error) < 15
    ]
    assert not missing, missing
    assert "no such error" not in there


def test_every_page_is_in_the_site() -> None:
    named = set(re.findall(r"[\w/-]+\.md", read("mkdocs.yml")))
    assert named == MADE | {page.removeprefix("docs/") for page in PAGES} - {"images/CREDITS.md"}


def test_the_api_pages_name_what_is_public() -> None:
    detector = read("docs/api/detector.md")
    assert not [name for name in gfl.__all__ if name not in ("PRESETS", "__version__") and f".{name}\n" not in detector]
    modules = {path.stem for path in (ROOT / "gfl_ops" / "compat").glob("[a-z]*.py")} - {
        "mmdet_patch",
        "mmdet_registry",
    }
    assert set(re.findall(r"::: gfl_ops\.compat\.(\w+)", read("docs/api/compat.md"))) == modules


def test_the_version_is_said_once() -> None:
    from gfl_ops._version import __version__

    (cited,) = re.findall(r"^version: (.+)$", read("CITATION.cff"), flags=re.MULTILINE)
    assert cited == __version__
    changes = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert changes[0] in ("Unreleased", __version__)


def test_issues_ask_for_what_answers_need() -> None:
    yaml = pytest.importorskip("yaml")
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert path.stem == "config" or {"name", "description", "body"} <= form.keys()
        if path.stem in ("bug", "speed"):
            (doctor,) = (part for part in form["body"] if part.get("id") == "doctor")
            assert doctor["validations"]["required"] and "gfl doctor" in doctor["attributes"]["description"]
