# SPDX-License-Identifier: Apache-2.0
"""``gfl convert``: checkpoints from and to other systems' formats."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..files import say
from . import add_config, given_config

HELP = "convert checkpoints of mmdet and GFocal, or write mmdet's format"


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="IN", help="checkpoint: this package's, mmdet 2 or 3's, GFocal v1 or V2's; or a model's name")
    add("target", metavar="OUT", help="file to write; must not exist")
    formats = "this package's, mmdet 3's, or safetensors with configuration and classes as metadata"
    add("--to", choices=("own", "mmdet", "safetensors"), help=f"{formats} [by OUT's suffix]")
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    from .. import checkpoint

    target = Path(options.target)
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} is there already")
    if options.to == "safetensors" and target.suffix != ".safetensors":
        raise ValueError(f"`--to` safetensors needs a file named so: {target.with_suffix('.safetensors')}")
    model, config, classes, ids = checkpoint.model_from(options.source, given_config(options), strict=True)
    weights = checkpoint.normalise(checkpoint.read(options.source))
    names = classes if classes is not None else [f"class {i}" for i in range(config.model.num_classes)]
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if classes is not None else "not named in it"
    default = vars(ModelConfig())
    changed = [f"{k} {v}" for k, v in vars(config.model).items() if k != "backbone" and v != default[k]]
    notes = [*weights.notes, f"model: {', '.join([config.model.backbone, *changed])}", f"classes: {shown}"]
    say("\n  ".join([f"{options.source}: {weights.source}", *notes]))
    meta: dict[str, Any] = checkpoint.meta(config, names, ids)
    if options.to == "mmdet":
        for name in ("legacy", "quality_branch"):
            if getattr(config.model, name):
                raise NotImplementedError(f"mmdet 3's GFL has no `{name}`: these weights would give other boxes there")
        if config.model.backbone.startswith("timm:"):
            raise NotImplementedError("mmdet's own backbones are ResNets; its keys for timm's are not known here")
        # mmdet leaves our own metadata alone, which say what weights can't.
        meta |= {"dataset_meta": {"classes": tuple(names)}}
    state_dict = model.state_dict()
    checkpoint.write(target, {"meta": meta, "state_dict": state_dict})
    millions = sum(value.numel() for value in state_dict.values()) / 1e6
    say(f"{target}: {len(state_dict)} tensors, {millions:.1f} million numbers")
    return 0
