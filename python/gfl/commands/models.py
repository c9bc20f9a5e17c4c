# SPDX-License-Identifier: Apache-2.0
"""``gfl models``: the published models by name."""

from __future__ import annotations

import argparse

from ..files import say

HELP = "list the published models, which every command takes by name"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--urls", action="store_true", help="also show where the files come from")


def run(options: argparse.Namespace) -> int:
    from .. import zoo
    from ..zoo.cost import cost

    say(f"{'name':<22}{'params':>9}{'GFLOPs':>9}{'at':>11}{'AP':>7}{'file':>10}  on disk")
    for name, entry in zoo.TABLE.items():
        found = cost(entry.config)
        size = entry.path.stat().st_size if entry.path.is_file() else found.bytes
        row = f"{name:<22}{found.parameters / 1e6:>7.2f} M{found.multiply_adds / 1e9:>9.2f}"
        row += f"{found.size[0]:>6}×{found.size[1]:<4}{entry.box_ap:>7.1f}{size / 1e6:>7.0f} MB"
        say(f"{row}  {'yes' if entry.path.is_file() else 'no'}")
        if options.urls:
            say(f"  {entry.licence}, {entry.url}")
    say("\nGFLOPs: billions of multiply-adds per image, at the padded test size")
    say("AP: of COCO val2017, as published; they know COCO's 80 classes")
    return 0
