# SPDX-License-Identifier: Apache-2.0
"""The command ``gfl convert``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import Config

HELP = "turn a checkpoint of mmdet 2 or 3, GFocal v1 or V2 into one of ours, or back into mmdet's"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="checkpoint of any known kind; it is not changed")
    parser.add_argument("target", metavar="OUT", help="file to write; there must be none of that name")
    parser.add_argument(
        "--to", choices=("own", "mmdet"), default="own", help="format to write: our own, or mmdet 3's [own]"
    )


def run(options: argparse.Namespace) -> int:
    from .. import checkpoint

    target = Path(options.target)
    if target.exists():
        raise ValueError(f"{target} is there already")
    content = checkpoint.read(options.source)
    try:
        weights = checkpoint.normalise(content)
        model, config, classes, ids = checkpoint.model_from(content)
    except ValueError as error:
        raise ValueError(f"{options.source}: {error}") from None
    print(f"{options.source}: {weights.source}")
    for note in weights.notes:
        print(f"  {note}")
    print(f"  model: {described(config)}")
    names = classes if classes is not None else [f"class {i}" for i in range(config.model.num_classes)]
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    print(f"  classes: {shown}" if classes is not None else "  classes: not named in it")
    state_dict = model.state_dict()
    written: dict[str, Any]
    if options.to == "own":
        written = {"meta": checkpoint.meta(config, names, ids), "state_dict": state_dict}
    else:
        _check_mmdet(config)
        written = {"meta": {"dataset_meta": {"classes": tuple(names)}}, "state_dict": state_dict}
    checkpoint.write(target, written)
    print(
        f"{target}: {len(state_dict)} tensors, {sum(v.numel() for v in state_dict.values()) / 1e6:.1f} million numbers"
    )
    return 0


def described(config: Config) -> str:
    """The network's fields that are not the default's."""
    default = type(config.model)()
    found = [config.model.backbone]
    for part in dataclasses.fields(default):
        value = getattr(config.model, part.name)
        if part.name != "backbone" and value != getattr(default, part.name):
            found.append(f"{part.name} {value}")
    return ", ".join(found)


def _check_mmdet(config: Config) -> None:
    """mmdet 3's detector has none of these."""
    for name in ("legacy", "quality_branch"):
        if getattr(config.model, name):
            raise NotImplementedError(f"mmdet 3's GFL has no `{name}`: these weights would give other boxes there")
    if config.model.backbone.startswith("timm:"):
        raise NotImplementedError("mmdet's own backbones are ResNets; its keys for timm's are not known here")
