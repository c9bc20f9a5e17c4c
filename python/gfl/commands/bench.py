# SPDX-License-Identifier: Apache-2.0
"""``gfl bench``: images per second of whole detectors, from uint8 images in memory to boxes there."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

from .. import files
from ..config import PRESETS
from ..files import say
from . import DTYPES, check_kernels, parse_size

HELP = "time whole detectors, in images per second"
ALL = "all"
# Models, size and batches per device where none are given.
DEFAULTS = {"cpu": (["gfl_r18_1x"], (320, 320), [1]), "cuda": (["gfl_r50_1x"], (800, 1344), [1, 16])}
# Pairs of location and class above the score threshold: per image as many as a trained network finds in COCO's images,
# or this share of all pairs of a small image.
CANDIDATES, SHARE = 3000, 0.02


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Times gfl.Detector(..., optimize=True) with random weights and a threshold that
lets as many candidates pass as a trained network has. Against plain eager
PyTorch, part by part: python benchmarks/bench.py detectors, in the sources.

  gfl bench                                          this machine's default
  gfl bench --models all --batch 1 8 32 --dtype all  everything
  gfl bench --device cpu --threads 2 --clock cpu     for a busy CPU"""
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME", help=f"{', '.join(PRESETS)}, or all [gfl_r18_1x; on a GPU gfl_r50_1x]")
    add("--batch", nargs="+", type=int, metavar="N", help="images at a time, 1 to 32 [1; on a GPU 1 16]")
    add("--size", metavar="HxW", help="of the network's input, multiples of 32 [320x320; on a GPU 800x1344]")
    add("--device", default=None, help="cpu, cuda, cuda:1, …, or all [a GPU if there is one]")
    add("--dtype", nargs="+", choices=(*DTYPES, ALL), default=None, help="precisions [fp32; on a GPU bf16]")
    add("--threads", type=int, metavar="N", help="CPU threads [torch's default]")
    add("--seconds", type=float, default=3.0, metavar="X", help="per case [%(default)s]")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, on a CPU only [%(default)s]")
    add("--compile", action="store_true", help="let torch.compile make the network's kernels: minutes per case")
    add("--seed", type=int, default=0, metavar="N", help="random seed (weights and images) [%(default)s]")
    add("--json", type=Path, metavar="FILE", help="write all figures to this file")
    add("--plot", type=Path, metavar="FILE", help="draw images per second (needs matplotlib)")


def run(options: argparse.Namespace) -> int:
    """A case that can't run (memory, a missing package) is reported; the exit status is 1 if one failed."""
    import torch

    from ..engine.distributed import choose_device, current_device

    for file, option, suffix in ((options.json, "--json", ".json"), (options.plot, "--plot", "")):
        if file is not None:
            files.check_output(file, option, (), suffix or file.suffix)
    if options.seconds <= 0:
        raise ValueError(f"`--seconds` must be positive, got {options.seconds}")
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"`--threads` must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    names = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])] if options.device == ALL else [options.device]
    cases = [case for name in names for case in _cases(options, choose_device(name))]
    if options.clock == "cpu" and any(case["device"].type != "cpu" for case in cases):
        raise ValueError("`--clock cpu` does not see a GPU's work: add --device cpu")
    for device in dict.fromkeys(case["device"] for case in cases):
        check_kernels(device)
    setting = {"threads": torch.get_num_threads(), "clock": options.clock, "torch": torch.__version__}
    say(f"torch {torch.__version__}, {setting['threads']} threads\n{'images/s':>8}{'ms':>9}{'p20–p80':>15}")
    records: dict[str, dict[str, Any]] = {}
    for case in cases:
        label = "{model} {size[0]}x{size[1]} {device.type} {dtype} batch {batch}".format(**case)
        try:
            with current_device(case["device"]):
                seconds = _times(options, **case)
        except (RuntimeError, NotImplementedError) as error:
            say(f"{label}: {str(error).splitlines()[0]}")
            continue
        p20, p50, p80 = (statistics.quantiles(seconds, n=10)[i] for i in (1, 4, 7))
        rate = case["batch"] / p50
        say(f"{rate:>8.4g}{1e3 * p50:>9.4g}{f'{1e3 * p20:.4g}–{1e3 * p80:.4g}':>15}  {label}")
        figures = {"runs": len(seconds), "p20": p20, "p50": p50, "p80": p80, "images_per_second": rate}
        records[label] = case | {"device": str(case["device"])} | figures
        if options.json is not None:
            files.write_json(options.json, setting | {"timings": list(records.values())}, indent=1)
    if options.plot is not None and records:
        _plot({label: record["images_per_second"] for label, record in records.items()}, options.plot)
    return 0 if len(records) == len(cases) else 1


def _cases(options: argparse.Namespace, device: Any) -> list[dict[str, Any]]:
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
    dtypes = list(DTYPES) if ALL in dtypes else dtypes
    names = ("model", "size", "device", "dtype", "batch")
    return [dict(zip(names, (m, size, device, d, b))) for m, d, b in itertools.product(models, dtypes, batches)]


def _times(
    options: argparse.Namespace, model: str, size: tuple[int, int], device: Any, dtype: str, batch: int
) -> list[float]:
    """Seconds of each run after those that do not count, three at least."""
    import torch

    from ..data import transforms
    from ..detector import Detector
    from ..models import create_model

    torch.manual_seed(options.seed)
    network = create_model(model).eval().to(device)
    network.test = dataclasses.replace(network.test, short_side=min(size), long_side=max(size))
    for layer in network.bbox_head.class_layers():
        torch.nn.init.normal_(layer.weight, std=0.05)
    images = torch.randint(256, (batch, 3, *size), dtype=torch.uint8)
    with torch.no_grad():
        sizes = torch.tensor([size], dtype=torch.float32, device=device)
        cls_scores, _ = network.predict_maps(transforms.normalise(images[:1].to(device), sizes, network.config))
    scores = torch.cat([x.flatten() for x in cls_scores]).sigmoid()
    threshold = float(scores.topk(max(1, min(CANDIDATES, int(SHARE * scores.numel())))).values[-1])
    settings = {"score_threshold": threshold, "batch_size": batch, "optimize": True, "compile": options.compile}
    detector = Detector(network, device, getattr(torch, DTYPES[dtype]), **settings)
    now = time.process_time if options.clock == "cpu" else time.perf_counter
    for _ in range(2):  # the second run of a batch captures its graph
        detector(list(images))
    times: list[float] = []
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(times) < 3:
        begin = now()
        detector(list(images))  # ends with the boxes on the CPU, so that nothing is left in a GPU's queue
        times.append(now() - begin)
    return times


def _plot(rates: dict[str, float], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"`--plot` needs matplotlib: pip install 'gfl-ops[bench]' ({error})") from None
    figure = Figure(figsize=(8, 1 + 0.35 * len(rates)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(rates), list(rates.values()))
    axes.invert_yaxis()
    axes.set_xlabel("images per second, from uint8 images to boxes")
    with files.replacing(file) as part:
        figure.savefig(part, dpi=150)
