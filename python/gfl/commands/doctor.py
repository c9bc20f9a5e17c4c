# SPDX-License-Identifier: Apache-2.0
"""``gfl doctor``: what is installed, which backend each operator runs on, and whether its kernels are right."""

from __future__ import annotations

import argparse
import json

from .. import files
from ..files import say

HELP = "show what is installed and which backend runs each operator"


def configure(parser: argparse.ArgumentParser) -> None:
    text = "run every kernel of this machine's devices and compare with the reference"
    parser.add_argument("--check", action="store_true", help=text)
    parser.add_argument("--json", metavar="FILE", help="with --check, write the verdicts to this file too")


def run(options: argparse.Namespace) -> int:
    import gfl_ops

    if options.json and not options.check:
        raise ValueError("`--json` needs --check")
    if options.json:
        files.check_output(options.json, "--json", (), ".json")
    if not options.check:
        say(gfl_ops.explain_backend().rstrip("\n"))
        return 0
    from gfl_ops.kernel_check import devices

    reports = [gfl_ops.self_check(device) for device in devices()]
    if options.json:
        files.write_json(options.json, [json.loads(report.to_json()) for report in reports], indent=2)
    say("\n".join(str(report) for report in reports).rstrip("\n"))
    return 0 if all(report.ok for report in reports) else 1
