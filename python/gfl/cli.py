# SPDX-License-Identifier: Apache-2.0
"""The command ``gfl``."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from .config import did_you_mean
from .files import error_text, printable, say

# Modules of `gfl.commands`, in the order of the help.
COMMANDS = ("detect", "models", "serve", "data", "train", "eval", "export", "convert", "bench", "demo", "doctor")
# Of a program that a signal ended: 128 + SIGINT.
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0, 1 after an error of the input, 2 for a wrong command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal has no letters for
            stream.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    formatting = warnings.formatwarning
    # Names of files are in warnings too.
    warnings.formatwarning = lambda message, *_: f"warning: {printable(message)}\n"
    try:
        return options.run(options)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, OSError, ImportError) as error:
        say(f"gfl {options.command}: {error_text(error)}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        say(f"\ngfl {options.command}: interrupted", sys.stderr)
        return INTERRUPTED
    finally:
        warnings.formatwarning = formatting


class Parser(argparse.ArgumentParser):
    """A parser that answers an unknown option with its own usage, and an unknown word with the nearest one it knows."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, rest = super().parse_known_args(args, namespace)
        known = [
            option for action in self._actions if action.help != argparse.SUPPRESS for option in action.option_strings
        ]
        # Here and not at the end of `parse_args`, where only the whole program's usage is known.
        for word in rest:
            if word.startswith("-"):
                self.error(f"unknown option {word}{did_you_mean(word.split('=')[0], known)}")
        if rest:
            self.error(f"too many arguments: {' '.join(rest)}")
        return options, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), [str(choice) for choice in action.choices or ()])
            raise

    def error(self, message: str) -> NoReturn:
        """Usage and message in the form of all errors, and the status of a wrong command line."""
        self.print_usage(sys.stderr)
        say(f"{self.prog}: {printable(message)}", sys.stderr)
        raise SystemExit(2)


class Version(argparse.Action):
    """Prints the version; importing it takes as long as torch, so only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from gfl_ops._version import __version__

        say(f"gfl-ops {__version__}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    whole = Parser(
        prog="gfl",
        description="Generalized Focal Loss: operators and detector.",
        epilog="`gfl COMMAND --help` explains the options of a command.",
    )
    whole.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    parsers = whole.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name in COMMANDS:
        command = importlib.import_module(f"gfl.commands.{name}")
        one = parsers.add_parser(name, help=command.HELP, description=f"{command.HELP[0].upper()}{command.HELP[1:]}.")
        command.configure(one)
        one.set_defaults(run=command.run)
    return whole


if __name__ == "__main__":
    raise SystemExit(main())
