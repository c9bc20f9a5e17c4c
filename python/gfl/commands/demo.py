# SPDX-License-Identifier: Apache-2.0
"""``gfl demo``: from scratch to pictures in minutes."""

from __future__ import annotations

import argparse

from ..demo import ITERATIONS
from . import check_kernels

HELP = "draw a data set, train a detector on it, show what it detects"


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", default="gfl-demo", metavar="DIR", help="folder to write to [%(default)s]")
    add("--seed", type=int, default=0, metavar="N", help="random seed (scenes, weights, shuffling) [%(default)s]")
    add("--iterations", type=int, default=ITERATIONS, metavar="N", help="training steps of 8 images [%(default)s]")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, … [%(default)s]")


def run(options: argparse.Namespace) -> int:
    from ..demo.course import run_demo

    check_kernels(options.device)
    run_demo(options.out, seed=options.seed, iterations=options.iterations, device=options.device)
    return 0
