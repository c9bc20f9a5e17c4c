# SPDX-License-Identifier: Apache-2.0
"""``gfl doctor``: what is installed and what serves each operator."""

from __future__ import annotations

import argparse

HELP = "say what is installed, which backend serves each operator on this machine, and why not another"


def configure(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(options: argparse.Namespace) -> int:
    import gfl_ops

    print(gfl_ops.explain_backend(), end="")
    return 0
