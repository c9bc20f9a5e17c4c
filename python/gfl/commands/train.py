# SPDX-License-Identifier: Apache-2.0
"""``gfl train``: a detector from images and annotations in COCO format."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import config
from . import check_kernels

CONFIGS = f"{', '.join(config.PRESETS)}, or a TOML, YAML or JSON file"
HELP = "train a detector on data in COCO format, or resume a training"
EPILOG = """\
An option that is not given keeps the value of --config; in brackets is that of
gfl_r50_1x. A configuration file has the sections data, train, model and test,
and the options' names with _ for - as keys:

  [train]
  lr = 0.005                 # TOML; YAML and JSON work too
  train_short_side = [480, 800]

  gfl train --config gfl_r50_1x --data coco --out runs/r50 \\
    --backbone-weights torchvision --amp bf16
  gfl train --config mine.toml --out runs/mine
  gfl train --out runs/mine --resume
  torchrun --nproc-per-node 8 -m gfl.cli train --config …"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "gfl train --config NAME|FILE --out DIR [option …]"
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", metavar="NAME|FILE", help=f"{CONFIGS}; --resume takes that of --out")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of checkpoints and logs")
    parser.add_argument("--resume", action="store_true", help="resume the training in --out")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … [a GPU if there is one]")
    first = ("data", "backbone_weights", "epochs", "batch_size", "lr", "amp")
    config.add_options(parser, "data", "train", "model", "test", first=first)


def run(options: argparse.Namespace) -> int:
    from ..engine.train import CONFIG, train

    if options.config is None and not options.resume:
        raise ValueError(f"--config must be given: one of {CONFIGS}")
    source = options.config
    if source is None:
        source = str(options.out / CONFIG)
        if not Path(source).is_file():
            raise ValueError(f"{options.out} holds no training to resume: {CONFIG} is not there")
    chosen = config.overrides(config.preset(source), options)
    check_kernels(options.device)
    metrics = train(chosen, options.out, resume=options.resume, device=options.device)
    if metrics:
        print(f"AP {metrics['AP']:.4f}; the best weights are in {options.out / 'best.pt'}")
    return 0
