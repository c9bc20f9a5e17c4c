# SPDX-License-Identifier: Apache-2.0
"""What nvidia-smi, pytest, compute-sanitizer and the benchmarks print, read for scripts/gpu_suite.py."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """The first GPU, as nvidia-smi describes it. `capability` is for example "9.0"."""

    name: str
    driver: str
    capability: str
    memory: str

    @property
    def arch(self) -> str:
        return f"sm_{self.capability.replace('.', '')}"


def parse_gpus(text: str) -> list[Gpu]:
    """The lines of ``nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader``."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and re.fullmatch(r"\d+\.\d+", parts[2]):
            found.append(Gpu(*parts))
    return found


def parse_pytest(text: str) -> tuple[dict[str, int], list[str]]:
    """(how many passed, failed, …; what failed) of ``pytest -v``, also of a run that was cut off before its end."""
    seen: dict[str, str] = {}
    verdicts = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
    for line in text.splitlines():
        # "path::name VERDICT [ 5%]", with pytest-xdist "[gw1] [ 5%] VERDICT path::name"
        plain = re.match(rf"(\S*\.py::.+?) ({verdicts})(?:\s|$)", line)
        spread = re.match(rf"\[gw\d+\](?: \[ *\d+%\])? ({verdicts}) (\S*\.py::.+?)\s*$", line)
        if plain:
            seen[plain[1]] = plain[2]
        elif spread:
            seen[spread[2]] = spread[1]
    counts: dict[str, int] = {}
    for verdict in seen.values():
        counts[verdict.lower()] = counts.get(verdict.lower(), 0) + 1
    failures = [name for name, verdict in seen.items() if verdict in ("FAILED", "ERROR")]
    # A file that can't be imported shows in the summary alone: "ERROR tests/test_x.py - reason".
    for line in text.splitlines():
        broken = re.match(r"ERROR (\S+\.py)(?: - .*)?$", line)
        if broken and broken[1] not in failures:
            failures.append(broken[1])
            counts["error"] = counts.get("error", 0) + 1
    return counts, failures


def parse_sanitizer(tool: str, code: int | None, text: str) -> tuple[str, str]:
    """(status, in words) of a run under compute-sanitizer."""
    if code is None:
        return "out of time", "ended for its time"
    refusals = ("Device not supported", "No supported CUDA device", "Failed to initialize", "Unable to find injection")
    for line in text.splitlines():
        if any(refusal in line for refusal in refusals):
            return "not there", f"compute-sanitizer refused: {line.strip(' =')}"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.+)", text)
    if not summary:
        return "failed", f"no summary, exit code {code}"
    numbers = [int(n) for n in re.findall(r"\d+", summary[-1])]
    if code == 0 and not any(numbers):
        return "passed", "0 errors" if tool != "racecheck" else "0 hazards"
    return "failed", summary[-1] if any(numbers) else f"{summary[-1]}, exit code {code}"


def parse_bench(text: str) -> list[str]:
    """The end of a benchmark's output that says how it compares."""
    lines = text.rstrip().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("ours against"):
            return lines[number:]
    return lines[-25:]
