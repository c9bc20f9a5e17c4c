# SPDX-License-Identifier: Apache-2.0
"""Write the documentation's tables from what they are about: the registry, the examples, the zoo, pyproject.toml, and
benchmarks/results.

With --check, fail if one is out of date.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gfl.zoo import TABLE
from gfl.zoo.cost import cost
from gfl.zoo.cost import memory as cost_memory
from gfl_ops.core.registry import SPECS, OpSpec

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
COMPAT = "gfl_ops.compat"


def compiled() -> dict[str, set[str]]:
    """Per operator the devices that the binding has a kernel for: read from the sources, not from this build."""
    # A family that registers whatever its list of terms holds names its operators there.
    terms = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "csrc" / "terms").glob("*.h"))
    found = {f"{stem}_fwd": {"CPU", "CUDA"} for stem in re.findall(r'constexpr const char\* name = "(\w+)"', terms)}
    for source in (ROOT / "csrc" / "binding").glob("*.cpp"):
        for cpu_only, name in re.findall(r"^GFL_OPERATOR(_CPU)?\((\w+), \w+\)", source.read_text(), re.M):
            found[name] = {"CPU"} if cpu_only else {"CPU", "CUDA"}
    # The losses of class scores are registered all at once, by the names of their terms.
    terms = (ROOT / "csrc" / "terms" / "score.h").read_text()
    stems = re.findall(r'const char\* name = "(\w+)"', terms)
    return found | {f"{stem}_fwd": {"CPU", "CUDA"} for stem in stems}


def row(spec: OpSpec, kernels: set[str]) -> str:
    triton = "Triton" if spec.triton_kernel("forward") else None
    where = ", ".join(
        filter(None, ["C++" if "CPU" in kernels else None, "CUDA" if "CUDA" in kernels else None, triton])
    )
    public = ", ".join(f"`{name}`" for name in spec.public)
    return f"| {public} | {spec.summary} | {where} | {'yes' if spec.differentiable else ''} |"


def operators() -> str:
    kernels = compiled()
    rows = [row(spec, kernels.get(spec.forward_name, set())) for spec in SPECS.values()]
    return "\n".join(["| function | what it computes | kernels | gradient |", "|---|---|---|---|", *rows, ""])


def fields(docstring: str) -> dict[str, str]:
    """The lines "Key: text" of an example's docstring, joined with their continuation lines."""
    found = re.findall(r"^(\w+): (.*(?:\n {4}.*)*)", docstring, flags=re.MULTILINE)
    return {key: " ".join(text.split()) for key, text in found}


def framework(path: Path) -> tuple[int, str, str]:
    """Rank, file name and row of an example; the line to type is the example's import from `gfl_ops.compat`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    described, rank, line = fields(ast.get_docstring(tree) or ""), 2, ""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(COMPAT):
            continue
        patches = "patch" in {alias.name for alias in node.names}
        rank, line = (0, f"`{node.module}.patch()`") if patches else (1, f"`{ast.unparse(node)}`")
    if "Or" in described:
        line += f"; or {described['Or']}"
    example = f"[{path.name}](../{path.relative_to(ROOT)})"
    return rank, path.name, f"| {described['Framework']} | {line} | {described['Replaces']} | {example} |"


def frameworks() -> str:
    examples = [path for path in (ROOT / "examples").glob("*.py") if "\nFramework: " in path.read_text("utf-8")]
    rows = sorted(map(framework, examples))
    head = ["| framework | the line | what it replaces | example |", "|---|---|---|---|"]
    return "\n".join([*head, *(text for _, _, text in rows), ""])


def gpu(record: dict[str, Any]) -> list[str]:
    """The rows of a GPU: a title, then whole detectors, then the goals of ``bench.py gpu``, each in one row."""
    stamp = record["stamp"]
    rows = [f"| **{stamp['gpu']}**, torch {stamp['versions']['torch']}, {stamp['date'][:10]}, {stamp['commit']} | |"]
    for name, found in record["detectors"].items():
        rows.append(f"| {name} | {found['images_per_second']:.4g} images/s |")
    of_goal: dict[str, list[dict[str, Any]]] = {}
    for goal in record["goals"].values():
        if goal["got"] is not None:
            of_goal.setdefault(goal["goal"], []).append(goal)
    for name, found in of_goal.items():
        texts = [f"{1e3 * found[0]['ours_ms']:.3g} µs"] if found[0]["ours_ms"] else []
        for goal in found:
            against, unit = (f" as fast as {goal['provider']}", "×") if goal["provider"] else ("", " µs")
            texts.append(f"{goal['got']:.3g}{unit}{against} (goal {goal['want']:.3g})")
        rows.append(f"| {name} | {'; '.join(texts)} |")
    return rows


def gpus() -> str:
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    # Those of scripts/gpu_record.py; single benchmarks leave records of another form there.
    rows = [row for record in records if "detectors" in record for row in gpu(record)]
    if not rows:
        return "Nothing has been timed on a GPU yet; `.ci/gpu 1` and `.ci/gpu 2` do so.\n"
    head = ["`.ci/gpu 1` and `.ci/gpu 2` measured:", "", "| GPU and case | measured |", "|---|---|"]
    return "\n".join([*head, *rows, ""])


def models() -> str:
    rows = [
        "| name | parameters | GFLOPs | size | AP | memory, inference | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, entry in TABLE.items():
        found, memory = cost(entry.config), (size / 2**20 for size in cost_memory(entry.config))
        parts = [f"`{name}`", f"{found.parameters / 1e6:.2f} M", f"{found.multiply_adds / 1e9:.2f}"]
        parts += ["×".join(map(str, found.size)), f"{entry.box_ap}", *(f"{size:.0f} MiB" for size in memory)]
        rows.append(f"| {' | '.join(parts)} |")
    return "\n".join([*rows, ""])


def extras() -> str:
    """Each extra's line of pyproject.toml, the comment behind it as its purpose."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    rows = ["| extra | for | packages |", "|---|---|---|"]
    for name, packages, purpose in re.findall(r"^(\w+) = (\[.*\])  # (.+)$", section, flags=re.MULTILINE):
        rows.append(f"| `{name}` | {purpose} | {', '.join(ast.literal_eval(packages))} |")
    return "\n".join([*rows, ""])


# Each by the document that it is in.
TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "operators": ("operators.md", operators),
    "frameworks": ("drop-in.md", frameworks),
    "gpus": ("speed.md", gpus),
    "models": ("models.md", models),
    "extras": ("install.md", extras),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is out of date")
    options = parser.parse_args()
    stale = False
    for name, (document, make) in TABLES.items():
        path = DOCS / document
        text = path.read_text(encoding="utf-8")
        begin, end = f"<!-- {name}: written by scripts/doc_tables.py -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        wanted = f"{before}{begin}{make()}{end}{rest.split(end)[1]}"
        if wanted == text:
            continue
        stale = True
        if options.check:
            print(f"docs/{document}: the table of {name} is out of date; python scripts/doc_tables.py writes it")
        else:
            path.write_text(wanted, encoding="utf-8")
    return int(stale and options.check)


if __name__ == "__main__":
    sys.exit(main())
