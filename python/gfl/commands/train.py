# SPDX-License-Identifier: Apache-2.0
"""``gfl train``: a detector from images and annotations in COCO format."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

from .. import config
from ..files import say
from . import check_kernels

CONFIGS = f"{', '.join(config.PRESETS)}, or a TOML, YAML or JSON file"
HELP = "train a detector on data of your own, or resume a training"
EPILOG = """\
An option that is not given keeps the value of --config; in brackets is that of
gfl_r50_1x. A configuration file has the sections data, train, model and test,
and the options' names with _ for - as keys:

  [train]
  lr = 0.005                 # TOML; YAML and JSON work too
  train_short_side = [480, 800]

  gfl train --config gfl_r50_1x --data coco --out runs/r50 \\
    --backbone-weights torchvision --amp bf16
  gfl train --recipe finetune --init best.pt --data mine --out runs/mine
  gfl train --config mine.toml --out runs/toml
  gfl train --out runs/mine --resume
  torchrun --nproc-per-node 8 -m gfl.cli train --config …"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "gfl train --config NAME|FILE --out DIR [option …]"
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", metavar="NAME|FILE", help=f"{CONFIGS}; --resume takes that of --out")
    parser.add_argument(
        "--recipe",
        choices=config.RECIPES,
        help="settings for a purpose, in place of the configuration's; finetune: for data of one's own",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of checkpoints and logs")
    parser.add_argument("--resume", action="store_true", help="resume the training in --out")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … [a GPU if there is one]")
    first = ("data", "init", "backbone_weights", "epochs", "batch_size", "lr", "amp")
    config.add_options(parser, "data", "train", "model", "test", first=first)


def run(options: argparse.Namespace) -> int:
    from ..engine.folder import BEST, LAST
    from ..engine.train import train

    chosen = config.overrides(_start(options), options)
    check_kernels(options.device)
    metrics = train(chosen, options.out, resume=options.resume, device=options.device)
    best, last = options.out / BEST, options.out / LAST
    if metrics and math.isnan(metrics["AP"]):
        say("no AP: the validation data have no object to find")
    elif metrics:
        say(f"AP {metrics['AP']:.4f}")
    say(f"the best weights are in {best}" if best.exists() else f"the last weights are in {last}")
    return 0


def _start(options: argparse.Namespace) -> config.Config:
    """The configuration that the typed options change."""
    from ..engine.folder import stored_config

    if options.config is None and options.resume:
        return stored_config(options.out)
    init = getattr(options, "init", "")
    if options.config is not None:
        start = config.preset(options.config)
    elif init:
        # The network and its test settings are the checkpoint's.
        from ..checkpoint import model_from

        of_file = model_from(init, strict=True).config
        start = dataclasses.replace(config.Config(), model=of_file.model, test=of_file.test)
        sizes = {name: getattr(of_file.train, name) for name in ("train_short_side", "train_long_side")}
        start = start.replace(**sizes)
    else:
        raise ValueError(f"--config must be given: one of {CONFIGS}; or --init, whose network is taken")
    return start.replace(**config.RECIPES[options.recipe]) if options.recipe else start
