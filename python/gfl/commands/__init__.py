# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``gfl``, one module each: `HELP`, `configure(parser)`, `run(options) -> exit status`.

Modules import torch only in `run`, so that ``gfl --help`` answers at once.
"""

import argparse
from typing import Any

from .. import config

# The dtypes of --dtype, by their names in torch.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_kernels(device: Any) -> None:
    """Check the kernels of the GPU that a command is about to use, unless that was done before on this machine.

    A CPU is left to `gfl doctor --check`: the kernels for it were compiled by the machine's own compiler, and the check
    takes longer than many a command. Neither is a device that doesn't exist, of which the command itself will speak.
    """
    import torch

    from gfl_ops.kernel_check import ensure_checked

    from ..engine.distributed import choose_device

    if not torch.cuda.is_available():
        return
    if device is None:
        ensure_checked(None)
        return
    try:
        wanted = choose_device(str(device))
    except ValueError:
        return
    if wanted.type == "cuda":
        ensure_checked(wanted)


def add_config(parser: argparse.ArgumentParser) -> None:
    """The option that says what a file of weights alone can't; `given_config` reads it."""
    text = "configuration of a checkpoint that has weights alone: a preset, or a TOML, YAML or JSON file"
    parser.add_argument("--config", metavar="NAME|FILE", help=text)


def given_config(options: argparse.Namespace) -> config.Config | None:
    """The configuration of --config, if it was given."""
    return None if options.config is None else config.preset(options.config)


def parse_size(text: str, option: str) -> tuple[int, int]:
    """(height, width) of "HxW", multiples of 32; ValueError for anything else, which names the option."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 and int(part) % 32 == 0 for part in parts):
        raise ValueError(f"`{option}` must be HEIGHTxWIDTH in multiples of 32, as 320x320, got {text!r}")
    return int(parts[0]), int(parts[1])
