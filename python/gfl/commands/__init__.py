# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``gfl``, one module each: `HELP`, `configure(parser)`, `run(options) -> exit status`.

Modules import torch only in `run`, so that ``gfl --help`` answers at once.
"""

from pathlib import Path


def require_folder(file: str | Path | None) -> None:
    """Fail before the work, not after it, where a file can't be written.

    Raises:
        FileNotFoundError: the folder of `file` does not exist.
    """
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise FileNotFoundError(f"{Path(file).parent}, the folder of {file}, is not there")
