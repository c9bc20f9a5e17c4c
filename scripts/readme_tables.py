# SPDX-License-Identifier: Apache-2.0
"""Write the README's table of operators from the registry; with --check, fail if it is not what the registry says."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from gfl_ops._spec import SPECS, OpSpec

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- operators: written by scripts/readme_tables.py -->\n", "<!-- end of operators -->"


def compiled() -> dict[str, set[str]]:
    """The devices that the binding registers a kernel for, by operator: read off the sources, not off this build."""
    found: dict[str, set[str]] = {}
    for source in (ROOT / "csrc" / "binding").glob("*.cpp"):
        for device, name in re.findall(r"GFL_IMPL_(CPU|CUDA)\(\"(\w+)\"", source.read_text()):
            found.setdefault(name, set()).add(device)
    return found


def row(spec: OpSpec, kernels: set[str]) -> str:
    triton = "Triton" if (ROOT / "gfl_ops" / "triton" / f"{spec.stem}.py").exists() else None
    where = ", ".join(
        filter(None, ["C++" if "CPU" in kernels else None, "CUDA" if "CUDA" in kernels else None, triton])
    )
    public = ", ".join(f"`{name}`" for name in spec.public)
    return f"| {public} | {spec.summary} | {where} | {'yes' if spec.differentiable else ''} |"


def table() -> str:
    kernels = compiled()
    rows = [row(spec, kernels.get(spec.forward_name, set())) for spec in SPECS.values()]
    return "\n".join(["| function | what it computes | kernels | gradient |", "|---|---|---|---|", *rows, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is out of date")
    options = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}{table()}{END}{after}"
    if wanted == text:
        return 0
    if options.check:
        print("README.md: the table of operators is out of date; python scripts/readme_tables.py writes it")
        return 1
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
