# SPDX-License-Identifier: Apache-2.0
"""``gfl bench``: whole detectors timed from images to boxes, beside plain eager PyTorch."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PRESETS
from ._size import parse_size

if TYPE_CHECKING:
    from ..engine.bench import Timing

HELP = "time whole detectors against the same networks in eager PyTorch"
ALL = "all"
WIDTH = 80
# Of each device: models, size and batches where none are given.
DEFAULTS = {
    "cpu": (["gfl_r18_1x"], (320, 320), [1]),
    "cuda": (["gfl_r50_1x"], (800, 1344), [1, 16]),
}
DTYPE_NAMES = ("fp32", "bf16", "fp16")
NETWORK = ("backbone", "neck", "head")
COLOURS = {"plain": "#9aa0a6", "ours": "#1a73e8", "compiled": "#f9ab00"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Each case is checked before it is timed: maps of both networks must agree. Both ways take uint8 images from memory
and bring boxes back; they run in turn, with random weights that give as many candidates as a trained network.

  plain     the network as it is written, NCHW, autocast for half precision; the steps of mmdet around torchvision's
            NMS (ours, which is quicker, where torchvision is not installed)
  ours      what gfl.Detector(..., optimize=True) runs: norms folded, few calls; on a GPU one CUDA graph
  compiled  the same by torch.compile, with --compile

`floor` is the share of a run that the operations of the direct convolutions would take at the rate of large matrix
products, measured here; above 100 % where fewer operations were done. Then the shares of input (normalising), backbone,
neck, head and boxes, each timed by itself. `MB` is the peak beyond weights and images; on a CPU of the process.

  gfl bench                                               this machine's default
  gfl bench --models all --batch 1 8 32 --dtype all       everything
  gfl bench --device cuda --models gfl_r50_1x --dtype bf16 --batch 1 16 --json out.json --plot out.png
  gfl bench --device cpu --threads 2 --clock cpu          processor time, beside other programs"""
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help=f"{', '.join(PRESETS)}, or all [gfl_r18_1x; on a GPU gfl_r50_1x]"
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, metavar="N", help="images at a time, 1 to 32 [1; on a GPU 1 16]"
    )
    parser.add_argument(
        "--size", metavar="HxW", help="of the network's input, multiples of 32 [320x320; on a GPU 800x1344]"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, …, or all [a GPU if there is one]")
    parser.add_argument(
        "--dtype", nargs="+", choices=(*DTYPE_NAMES, ALL), default=None, help="precisions [fp32; on a GPU bf16]"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of torch on the CPU [as torch has them]")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="X", help="for each way of a case [%(default)s]")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, on a CPU only [%(default)s]"
    )
    parser.add_argument("--compile", action="store_true", help="time torch.compile too: minutes a case")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and images [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw images a second (needs matplotlib)")


def run(options: argparse.Namespace) -> int:
    """Cases that can't be run (memory, a package) are reported; the exit status is 1 if one failed."""
    import torch

    from ..engine import bench, plain

    for file in (options.json, options.plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"{file.parent}, the folder of {file}, is not there")
    if options.seconds <= 0:
        raise ValueError(f"`--seconds` must be positive, got {options.seconds}")
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"`--threads` must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    devices = _devices(options.device)
    if options.clock == "cpu" and any(device.type != "cpu" for device in devices):
        raise ValueError("`--clock cpu` counts what the CPU does: it goes with --device cpu")
    cases = [case for device in devices for case in _cases(options, device)]
    record = _stamp(devices) | {"nms": plain.available_nms()[1], "clock": options.clock, "timings": []}
    print("\n".join(_lines(record)))
    timings: list[Timing] = []
    rates: dict[Any, float] = {}
    failed = 0
    for device, dtype, name, size, batch in cases:
        key = (device, dtype)
        if key not in rates:
            rates[key] = bench.peak_rate(device, bench.DTYPES[dtype], options.clock == "cpu")
        try:
            found = bench.bench(
                name,
                size,
                batch,
                device,
                bench.DTYPES[dtype],
                seconds=options.seconds,
                processor=options.clock == "cpu",
                compile=options.compile,
                rate=rates[key],
                seed=options.seed,
            )
        except (RuntimeError, NotImplementedError) as error:
            failed += 1
            print(f"\n{name}, {size[0]}x{size[1]}, {device} {dtype}, batch {batch}: {str(error).splitlines()[0]}")
            continue
        print("\n" + table(found, rates[key]), flush=True)
        timings += found
    record["timings"] = [timing.to_dict() for timing in timings]
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot is not None and timings:
        plot(timings, options.plot)
    return 1 if failed else 0


def table(timings: Sequence[Timing], rate: float) -> str:
    """One case in lines of 80 columns at most."""
    one = timings[0]
    widths = {part: max(6, len(part) + 1) for part in one.parts}
    lines = [
        f"{one.model}, {one.size[0]}x{one.size[1]}, {one.device} {one.dtype}, batch {one.batch}",
        f"{one.gflop:.1f} GFLOP an image; {_ms(one.floor)} ms a batch at {rate / 1e9:.3g} GFLOP/s, as matrix products",
        f"{'':<9}{'img/s':>8}{'ms p50':>9}{'p99':>8}{'floor':>7}{'MB':>6}"
        + "".join(f"{part:>{width}}" for part, width in widths.items()),
    ]
    for timing in timings:
        total = sum(timing.parts.values())
        shares = "".join(f"{_percent(timing.parts[part] / total):>{width}}" for part, width in widths.items())
        memory = "-" if timing.memory is None else f"{timing.memory / 1e6:.0f}"
        lines.append(
            f"{timing.provider:<9}{timing.images_per_second:>8.4g}{_ms(timing.p50):>9}{_ms(timing.p99):>8}"
            f"{_percent(timing.share_of_floor):>7}{memory:>6}{shares}"
        )
    for timing in timings[1:]:
        networks = [sum(t.parts[part] for part in NETWORK) for t in (one, timing)]
        lines.append(
            f"{timing.provider}: {one.p50 / timing.p50:.2f} x plain end to end, {networks[0] / networks[1]:.2f} x its "
            f"network; maps within {timing.difference:.0e}"
        )
    return "\n".join(lines)


def plot(timings: Sequence[Timing], file: Path) -> None:
    """Images a second of each case, a bar for each way.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"`--plot` needs matplotlib: pip install 'gfl-ops[bench]' ({error})") from None
    cases = list(dict.fromkeys((t.model, t.device, t.dtype, t.size, t.batch) for t in timings))
    ways = list(dict.fromkeys(t.provider for t in timings))
    figure = Figure(figsize=(8, 1 + 0.35 * len(cases) * len(ways)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, case in enumerate(cases):
        for n, way in enumerate(ways):
            found = [t for t in timings if (t.model, t.device, t.dtype, t.size, t.batch) == case and t.provider == way]
            for timing in found:
                y = row + (n - (len(ways) - 1) / 2) * 0.8 / len(ways)
                label = way if row == 0 else None
                axes.barh(y, timing.images_per_second, 0.8 / len(ways), color=COLOURS[way], label=label)
                axes.annotate(f" {timing.images_per_second:.3g}", (timing.images_per_second, y), va="center")
    axes.set_yticks(range(len(cases)), [f"{m}, {d} {t}\n{s[0]}x{s[1]}, batch {b}" for m, d, t, s, b in cases])
    axes.invert_yaxis()
    axes.set_xlabel("images a second, uint8 images to boxes")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.legend(loc="outside upper right", ncols=len(ways), frameon=False)
    figure.savefig(file, dpi=150)


def _devices(given: str | None) -> list[Any]:
    import torch

    from ..engine.distributed import choose_device

    if given == ALL:
        return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    return [choose_device(given)]


def _cases(options: argparse.Namespace, device: Any) -> list[tuple[Any, str, str, tuple[int, int], int]]:
    models, size, batches = DEFAULTS["cuda" if device.type == "cuda" else "cpu"]
    models = models if options.models is None else list(PRESETS) if ALL in options.models else options.models
    for name in models:
        if name not in PRESETS:
            raise ValueError(f"`--models` must be of {', '.join(PRESETS)}, or all, got {name!r}")
    batches = options.batch or batches
    for batch in batches:
        if not 1 <= batch <= 32:
            raise ValueError(f"`--batch` must be in [1, 32], got {batch}")
    size = size if options.size is None else parse_size(options.size, "--size")
    dtypes = options.dtype or ["bf16" if device.type == "cuda" else "fp32"]
    dtypes = list(DTYPE_NAMES) if ALL in dtypes else dtypes
    return [(device, dtype, name, size, batch) for name, dtype, batch in itertools.product(models, dtypes, batches)]


def _stamp(devices: Sequence[Any]) -> dict[str, Any]:
    import torch

    from gfl_ops._version import __version__

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["gfl", *sys.argv[1:]]),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(device) for device in devices if device.type == "cuda"],
        "versions": {"gfl-ops": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _lines(record: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    clock = "processor time" if record["clock"] == "cpu" else "time by the clock"
    return [
        f"{record['date']}  {versions}",
        f"{record['cpu']}, {record['threads']} threads; {', '.join(record['gpu']) or 'no GPU'}"[:WIDTH],
        f"{clock}; plain with {record['nms']}",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"
