# SPDX-License-Identifier: Apache-2.0
"""``gfl train``: a detector from images and annotations in COCO's format."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import config

HELP = "train a detector on images and annotations in COCO's format, or go on with a training"
SECTIONS = ("model", "data", "train", "test")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "gfl train --config NAME --data DIR --out DIR [option …]"
    parser.epilog = (
        "Every option after --resume overrides a field of the configuration; in brackets is gfl_r50_1x's value. "
        "Several processes: torchrun --nproc-per-node N -m gfl.cli train …"
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help=f"{', '.join(config.PRESETS)}, or a config.json; a training that is resumed has its own",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of this training")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … [a GPU if there is one]")
    parser.add_argument("--resume", action="store_true", help="go on with the training in --out")
    config.add_options(parser, *SECTIONS)


def run(options: argparse.Namespace) -> int:
    from ..engine.train import CONFIG, train

    if options.config is None and not options.resume:
        raise ValueError(f"--config must be given: one of {', '.join(config.PRESETS)}, or a JSON file")
    source = options.config
    if options.resume and source is None:
        source = str(options.out / CONFIG)
        if not Path(source).is_file():
            raise ValueError(f"{options.out} holds no training to resume: {CONFIG} is not there")
    chosen = config.overrides(config.preset(source), options)
    metrics = train(chosen, options.out, resume=options.resume, device=options.device)
    if metrics:
        print(f"AP {metrics['AP']:.4f}; the best weights are in {options.out / 'best.pt'}")
    return 0
