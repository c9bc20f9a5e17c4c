# SPDX-License-Identifier: Apache-2.0
"""All benchmarks: python benchmarks/bench.py COMMAND [options], python benchmarks/bench.py COMMAND --help."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from pathlib import Path

# libkineto, which counts memory and launches, would print a line at each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import torch

import commands
import inputs


def parser() -> argparse.ArgumentParser:
    """One subcommand per module of `commands`."""
    whole = argparse.ArgumentParser(description=__doc__)
    subparsers = whole.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in pkgutil.iter_modules(commands.__path__):
        command = importlib.import_module(f"{commands.__name__}.{module.name}")
        description = command.__doc__ or ""
        one = subparsers.add_parser(
            module.name,
            help=description.split(".")[0].replace("\n", " "),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_options(one, module.name)
        command.configure(one)
        one.set_defaults(run=command.run)
    return whole


def add_options(one: argparse.ArgumentParser, name: str) -> None:
    """What every command takes; `configure` sets its own defaults."""
    add = one.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where torch can use a GPU, else cpu")
    add("--threads", type=int, help="CPU threads (default: %(default)s; none means torch's)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of all threads")
    add("--rounds", type=int, default=30, help="turns per provider at most (default %(default)s)")
    add("--seconds", type=float, default=1.0, help="aimed at per case (default %(default)s)")
    add("--limit", type=float, metavar="S", help="seconds for everything; then it stops (default %(default)s)")
    add("--size", type=size, default=(800, 1344), metavar="HxW", help="image height and width (default 800x1344)")
    add("--data", type=Path, default=inputs.DATA, help="folder of real data (default: GFL_TEST_DATA or %(default)s)")
    add("--out", type=Path, default=Path(f"out/bench_{name}"), help="folder of JSON and plot (default %(default)s)")
    add("--seed", type=int, default=0, help="random seed of the inputs (default 0)")


def size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    return int(height), int(width)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    given = parser().parse_args(words)
    given.device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return given


def main(words: list[str] | None = None) -> int:
    given = parse(words)
    if given.threads:
        torch.set_num_threads(given.threads)
    return given.run(given)


if __name__ == "__main__":
    sys.exit(main())
