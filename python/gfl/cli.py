# SPDX-License-Identifier: Apache-2.0
"""The command ``gfl``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import gfl_ops
from gfl_ops._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gfl", description="Generalized Focal Loss: operators and detector.")
    parser.add_argument("--version", action="version", version=f"gfl-ops {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="say what is installed and what serves each operator",
        description="Say what is installed, which backend serves each operator on this machine, and why not another.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    print(gfl_ops.explain_backend(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
