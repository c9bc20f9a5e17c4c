# SPDX-License-Identifier: Apache-2.0
"""Gather what .ci/gpu measured into DIR/<gpu>.json, the form that benchmarks/results keeps.

What an earlier part wrote there, or else into benchmarks/results, stays as far as it was not measured again. Each
figure names its commit.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

import stamp  # noqa: E402


def goals(logs: Path) -> dict[str, Any]:
    """The goals of ``bench.py gpu``, by name and whom they are against."""
    found = {}
    for file in sorted(logs.glob("bench-*/bench_gpu.json")):
        for goal in json.loads(file.read_text())["goals"]:
            found[f"{goal['goal']} / {goal['provider'] or 'limit'}"] = goal
    return found


def detectors(logs: Path) -> dict[str, Any]:
    """Images per second of ``gfl bench``, from images in memory, and of ``bench.py files``."""
    found = {}
    file = logs / "gfl-bench.json"
    for timing in json.loads(file.read_text())["timings"] if file.is_file() else ():
        size = "{}x{}".format(*timing["size"])
        name = f"{timing['model']} {size} {timing['dtype']} batch {timing['batch']}, from memory"
        found[name] = {key: timing[key] for key in ("images_per_second", "p20", "p50", "p80")}
    file = logs / "bench-files" / "bench_files.json"
    record = json.loads(file.read_text()) if file.is_file() else {"results": ()}
    for result in record["results"]:
        if result["provider"] == "optimized" and result["forward"]:
            name = f"{result['stem']} {result['what']} {result['dtype']} batch {result['batch']}, from JPEG files"
            found[name] = {"images_per_second": 1e3 * record["files"] / result["forward"]["median"]}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", type=Path, help="folder of what the benchmarks wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the result")
    options = parser.parse_args()
    record: dict[str, Any] = {"detectors": detectors(options.logs), "goals": goals(options.logs)}
    if not any(record.values()):
        return 0
    where = stamp.stamp()
    name = re.sub(r"[^a-z0-9]+", "-", (where["gpu"] or "no GPU").split("(")[0].lower()).strip("-")
    path = options.out / f"{name}.json"
    earlier = [file for file in (path, RESULTS / path.name) if file.is_file()]
    merged = {"stamp": where, "detectors": {}, "goals": {}} | (json.loads(earlier[0].read_text()) if earlier else {})
    merged["stamp"] = where
    for key, found in record.items():
        merged[key] |= {name: figures | {"commit": where["commit"]} for name, figures in found.items()}
    path.write_text(json.dumps(merged, indent=1) + "\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
