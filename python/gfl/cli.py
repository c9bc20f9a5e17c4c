# SPDX-License-Identifier: Apache-2.0
"""The command ``gfl``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

from gfl_ops._version import __version__

from . import commands

# Of a program that a signal ended: 128 + SIGINT.
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0, 1 after an error of the input, 2 for a wrong command line."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, OSError, ImportError) as error:
        print(f"gfl {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ngfl {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    whole = argparse.ArgumentParser(prog="gfl", description="Generalized Focal Loss: operators and detector.")
    whole.add_argument("--version", action="version", version=f"gfl-ops {__version__}")
    parsers = whole.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in pkgutil.iter_modules(commands.__path__):
        if module.name.startswith("_"):
            continue
        command = importlib.import_module(f"{commands.__name__}.{module.name}")
        one = parsers.add_parser(
            module.name, help=command.HELP, description=f"{command.HELP[0].upper()}{command.HELP[1:]}."
        )
        command.configure(one)
        one.set_defaults(run=command.run)
    return whole


if __name__ == "__main__":
    raise SystemExit(main())
