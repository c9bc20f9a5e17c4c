# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``gfl``, one module each: `HELP`, `configure(parser)`, `run(options) -> exit status`.

A module's own imports are light, so that ``gfl --help`` answers at once; what it works with is imported in `run`.
"""
