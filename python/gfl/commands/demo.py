# SPDX-License-Identifier: Apache-2.0
"""``gfl demo``: from nothing to pictures in minutes."""

from __future__ import annotations

import argparse

from ..demo.course import ITERATIONS, run_demo

HELP = "draw a data set, train a small detector on it from scratch, evaluate it, show what it finds"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="gfl-demo", metavar="DIR", help="folder to write to [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of scenes, weights and order [%(default)s]")
    parser.add_argument(
        "--iterations", type=int, default=ITERATIONS, metavar="N", help="training steps of 8 images [%(default)s]"
    )
    parser.add_argument("--device", default="cpu", metavar="TEXT", help="cpu, cuda, cuda:1, … [%(default)s]")


def run(options: argparse.Namespace) -> int:
    run_demo(options.out, seed=options.seed, iterations=options.iterations, device=options.device)
    return 0
