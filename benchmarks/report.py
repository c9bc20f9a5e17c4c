# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks write: tables of 80 columns, JSON, and a plot."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

import stamp
from clock import Machine
from harness import BACKENDS, Result

WIDTH = 80
DISTURBED = (
    " The machine was busy with other work: trust only ratios of the same case, or repeat with --clock cpu --threads 1,"
    " which counts this process alone."
)
HEADER = f"{'':<13}{'forward':>8}{'backward':>9}{'both':>9}{'p20–p80':>16}{'GB/s':>7}{'floor':>7}{'MB':>7}"
# Of whole detectors: with this package's operators inside.
OURS = ("patched", "optimized")
DETECTOR_COLOURS = {"plain": "#9aa0a6", "optimized": "#1a73e8", "compiled": "#f9ab00"}
COLOURS = {
    "eager": "#9aa0a6",
    "torchvision": "#c58af9",
    "compiled": "#f9ab00",
    "native": "#1a73e8",
    "triton": "#12a37f",
    "reference": "#dadce0",
}


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits."""
    if value is None:
        return "-"
    if value <= 0:
        return "0"
    return f"{value:.{min(4, max(0, 2 - math.floor(math.log10(value))))}f}"


def rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%" if value >= 0.0995 else f"{100 * value:.1f}%"


def megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f}" if value < 1e9 else f"{value / 1e6:.0f}"


def wrapped(paragraphs: Iterable[str]) -> str:
    return "\n".join(line for text in paragraphs for line in textwrap.wrap(text, WIDTH) or [""])


def stamped(*more: str) -> str:
    """Where this runs, on which versions, by which command; and more lines."""
    return wrapped([*stamp.lines(stamp.stamp()), *more])


def head(machine: Machine, scene_lines: Sequence[str]) -> str:
    text = (
        f"A large copy moves {machine.bandwidth / 1e9:.1f} GB/s here; `floor` is the time that inputs, results and "
        "gradients would take at that rate, as a share of the measured time. Milliseconds are medians; p20–p80, GB/s, "
        "floor and MB (peak of what a turn allocates) are of both directions together."
    )
    return stamped(*scene_lines, "", text)


def section(dtype: str, batch: int, machine: Machine) -> str:
    """The column headers."""
    header = HEADER + ("  runs" if machine.cuda else "")
    return f"{f'{dtype}, batch {batch}':<13}{header[13:]}\n{'=' * len(header)}"


def block(results: Sequence[Result]) -> str:
    """One case: a title, and a line per provider."""
    first = results[0]
    lines = [f"{first.name} ({first.dtype}; {first.what})"]
    for r in results:
        if r.status != "timed" or r.total is None:
            if r.status != "skipped":
                text = f"  {r.provider:<11} {r.status.upper()}: {r.reason}"
                lines += textwrap.wrap(text, WIDTH, subsequent_indent=" " * 14)
            continue
        both = r.both.median if r.both else None
        span = f"{ms(r.total.p20)}–{ms(r.total.p80)}"
        line = f"  {r.provider:<11}{ms(r.forward.median if r.forward else None):>8}"
        line += f"{ms(r.backward.median if r.backward else None):>9}{ms(both):>9}{span:>16}"
        line += f"{rate(r.gb_per_s):>7}{share(r.floor_share):>7}{megabytes(r.memory):>7}"
        lines.append(line + (f"{r.launches:>6}" if r.launches else ""))
    return "\n".join(lines)


def is_ours(provider: str) -> bool:
    return provider in (*BACKENDS, *OURS)


def cases(results: Iterable[Result]) -> list[list[Result]]:
    return [list(group) for _, group in groupby(results, key=lambda r: (r.name, r.dtype, r.batch))]


def comparison(results: Sequence[Result]) -> tuple[Result, Result] | None:
    """Our fastest provider and the fastest of the others."""
    timed = [r for r in results if r.total is not None and r.provider != "reference"]
    ours = min((r for r in timed if is_ours(r.provider)), key=lambda r: r.total.median, default=None)
    others = min((r for r in timed if not is_ours(r.provider)), key=lambda r: r.total.median, default=None)
    return (ours, others) if ours and others else None


def verdict(factor: float) -> str:
    """In words: how many times as fast as the others."""
    if 0.95 < factor < 1.05:
        return "equal"
    times = max(factor, 1 / factor)
    return f"{times:.{0 if times >= 100 else 1}f}× {'faster' if factor > 1 else 'SLOWER'}"


def summary(results: Sequence[Result], machine: Machine) -> str:
    lines = ["ours against the fastest of the others (ms; losses: forward + backward)"]
    lines.append("-" * WIDTH)
    for group in cases(results):
        pair = comparison(group)
        if pair is None:
            continue
        ours, other = pair
        speed = verdict(other.total.median / ours.total.median)
        where = f"{ours.name} {ours.dtype}" + (f" B={ours.batch}" if len({r.batch for r in results}) > 1 else "")
        lines.append(
            f"{where:<24}{ours.provider:<8}{ms(ours.total.median):>8}   {other.provider:<12}"
            f"{ms(other.total.median):>8}  {speed}"
        )
    skipped: dict[str, list[str]] = {}
    for r in results:
        if r.status == "skipped":
            skipped.setdefault(f"{r.provider}: {r.reason.replace(r.stem, 'it')}", []).append(f"{r.name} {r.dtype}")
    if skipped:
        lines += ["", "not timed"]
        for reason, names in skipped.items():
            shown = ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
            lines += textwrap.wrap(f"- {reason} ({shown})", WIDTH, subsequent_indent="  ")
    bad = [r for r in results if r.status in ("wrong", "failed")]
    if bad:
        lines += ["", "wrong or failed"]
        for r in bad:
            text = f"- {r.name} {r.dtype} {r.provider}: {r.reason}"
            lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    return "\n".join([*lines, "", steadiness(machine)])


def steadiness(machine: Machine) -> str:
    """How steady the machine was, by the log1p that ran between everything."""
    values = sorted(1e3 * v for v in machine.log1p)
    if not values:
        return "log1p: not timed"
    low, middle, high = values[len(values) // 10], statistics.median(values), values[len(values) * 9 // 10]
    text = f"log1p of 2^20 numbers between the turns: median {ms(middle)} ms, p10 {ms(low)}, p90 {ms(high)}."
    return wrapped([text + (DISTURBED if high > 1.5 * low else "")])


def finish(
    given: argparse.Namespace,
    results: Sequence[Result],
    machine: Machine,
    *,
    plot: Sequence[Result] = (),
    extra: dict[str, Any] | None = None,
) -> int:
    """Write JSON, and a plot of some results, into the folder `--out`; returns the exit status.

    That is 1 if one of this package's providers is wrong or fails.
    """
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items() if k != "run"}
    record = {
        "stamp": stamp.stamp(),
        "settings": settings | {"threads": torch.get_num_threads()},
        "copy_bytes_per_s": machine.bandwidth,
        "log1p_ms": [round(1e3 * v, 5) for v in machine.log1p],
        "results": [dataclasses.asdict(r) for r in results],
    }
    file = given.out / f"bench_{given.command}.json"
    file.write_text(json.dumps(record | (extra or {}), indent=1, default=str) + "\n")
    written = f"\nwritten: {file}"
    if plot:
        image = file.with_suffix(".png")
        trouble = draw(image, plot, machine)
        written += f"; {trouble}" if trouble else f", {image}"
    print(written)
    return 1 if any(is_ours(r.provider) and r.status in ("wrong", "failed") for r in results) else 0


def draw(path: Path, results: Sequence[Result], machine: Machine) -> str | None:
    """Bars of all cases; returns why there is no plot, None if there is one."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (the extra `bench` has it)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = list(dict.fromkeys((r.dtype, r.batch) for r in results if r.total))
    names = list(dict.fromkeys(r.name for r in results if r.total))
    colours = COLOURS | DETECTOR_COLOURS
    used = [p for p in colours if any(r.provider == p and r.total for r in results)]
    if not used:
        return "no plot: nothing was timed"
    height = 0.8 / len(used)
    size = (2.6 + 3.4 * len(columns), 1.6 + 0.16 * len(names) * max(len(used), 2))
    figure, axes = plt.subplots(1, len(columns), figsize=size, squeeze=False, sharey=True, sharex=True)
    for axis, (dtype, batch) in zip(axes[0], columns):
        for row, name in enumerate(names):
            for r in results:
                if (r.name, r.dtype, r.batch) != (name, dtype, batch) or r.provider not in used:
                    continue
                place = row + (used.index(r.provider) + 0.5) * height - 0.4
                if r.total is None:
                    if r.status in ("wrong", "failed"):
                        axis.text(0.01, place, r.status, transform=axis.get_yaxis_transform(), va="center", fontsize=6)
                    continue
                axis.barh(place, r.total.median, height * 0.92, color=colours[r.provider])
                axis.plot([r.total.p20, r.total.p80], [place, place], color="black", linewidth=0.7)
                if r.floor_share:
                    floor = r.total.median * r.floor_share
                    axis.plot([floor, floor], [row - 0.42, row + 0.42], color="#d93025", linewidth=1.2, zorder=3)
        axis.set_xscale("log")
        axis.set_title(f"{dtype}, batch {batch}", fontsize=10)
        axis.set_xlabel("ms; losses: forward + backward", fontsize=8)
        axis.grid(axis="x", which="major", color="#e0e0e0", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    handles: list[Any] = [Patch(color=colours[p], label=p) for p in used]
    handles.append(Line2D([], [], color="#d93025", label="byte floor"))
    wide = min(len(handles), 2 + 2 * len(columns))
    figure.legend(handles=handles, loc="upper center", ncols=wide, fontsize=8, frameon=False)
    record = stamp.stamp()
    where = record["gpu"] if machine.cuda else f"{record['cpu']}, {record['cores']} cores"
    caption = f"{where} · torch {record['versions']['torch']} · {record['commit']} · {record['date'][:10]}"
    figure.text(0.01, 0.005, caption, fontsize=6)
    figure.tight_layout(rect=(0, 0.02, 1, 1 - 0.5 / size[1]))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return None
