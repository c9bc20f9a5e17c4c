# SPDX-License-Identifier: Apache-2.0
"""``gfl doctor``: what is installed and which backend each operator runs on."""

from __future__ import annotations

import argparse

HELP = "show what is installed and which backend runs each operator"


def configure(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(options: argparse.Namespace) -> int:
    import gfl_ops

    print(gfl_ops.explain_backend(), end="")
    return 0
