# SPDX-License-Identifier: Apache-2.0
"""``gfl doctor``: what is installed, which backend each operator runs on, and whether its kernels are right."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import require_folder

HELP = "show what is installed and which backend runs each operator"


def configure(parser: argparse.ArgumentParser) -> None:
    text = "run every kernel of this machine's devices and compare with the reference"
    parser.add_argument("--check", action="store_true", help=text)
    parser.add_argument("--json", metavar="FILE", help="with --check, write the verdicts to this file too")


def run(options: argparse.Namespace) -> int:
    import gfl_ops

    if options.json and not options.check:
        raise ValueError("`--json` needs --check")
    require_folder(options.json)
    if not options.check:
        print(gfl_ops.explain_backend(), end="")
        return 0
    from gfl_ops.kernel_check import devices

    reports = [gfl_ops.self_check(device) for device in devices()]
    print("\n".join(str(report) for report in reports), end="")
    if options.json:
        Path(options.json).write_text(json.dumps([json.loads(report.to_json()) for report in reports], indent=2) + "\n")
    return 0 if all(report.ok for report in reports) else 1
