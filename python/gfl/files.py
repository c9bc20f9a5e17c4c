# SPDX-License-Identifier: Apache-2.0
"""How files are read and written, and lines printed: nothing hangs, is overwritten or left half done."""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import secrets
import socket
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

# What is being written; a killed process leaves it behind.
PART = ".part-"
LOCK = ".lock"
# Folders that this process has locked: the system would give it the lock again.
_HELD: set[Path] = set()


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file for reading; OSError for a pipe or a device, which may give nothing for ever, or no end."""
    file = open(  # noqa: SIM115  # the caller closes it
        path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return file


def read_bytes(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """The contents of a regular file; OSError for another kind, and for one of more than `limit` bytes."""
    with open_regular(path) as file:
        content = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit >> 20} MiB", os.fspath(path))
    return content


@contextmanager
def replacing(path: str | os.PathLike[str], keep: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A new file to write in the block, which then takes the place of `path`.

    At every moment `path` is the whole old file or the whole new one, flushed to the disk. A link is replaced, not
    followed. The old file is kept under the name `keep`. A device or a pipe is written to as it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    # The suffix stays, since some writers choose their format by it.
    suffix = path.suffix if len(path.suffix) < 16 else ""
    part = path.with_name(f"{PART}{secrets.token_hex(8)}{suffix}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _keep(path, Path(keep))
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # The renaming itself; not every file system can.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _keep(path: Path, kept: Path) -> None:
    link = path.with_name(f"{PART}{secrets.token_hex(8)}")
    try:
        os.link(path, link)
    except OSError:  # No links on this file system: for a moment there is no file `path`.
        os.replace(path, kept)
        return
    try:
        os.replace(link, kept)
    finally:
        link.unlink(missing_ok=True)  # Renaming to another link of the same file does nothing either.


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a whole file, or leaves what was there; text is UTF-8."""
    with replacing(path) as part:
        part.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = None) -> None:
    """Writes a value as JSON, in ASCII."""
    write(path, json.dumps(value, indent=indent) + "\n")


@contextmanager
def lines(path: Path, keep: bool = False) -> Iterator[Callable[[Any], None]]:
    """Gives a function that adds a value to a file as a line of JSON, at once, so that a run that ends loses nothing.

    At the end of the block, when its contents are elsewhere, the file is removed, unless it is to `keep`; after an
    error it stays and is named.
    """
    path.unlink(missing_ok=True)
    try:
        with path.open("xb", buffering=0) as file:

            def add(value: Any) -> None:
                # By one call of the system, so that no line is there by half.
                line = f"{json.dumps(value)}\n".encode("ascii")
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

            yield add
    except BaseException:
        if path.exists() and path.stat().st_size:
            say(f"what was found before is in {path}", sys.stderr)
        raise
    if not keep:
        path.unlink(missing_ok=True)


def check_output(
    path: str | os.PathLike[str], option: str, inputs: Collection[str | os.PathLike[str] | None], suffix: str = ""
) -> None:
    """Fails before the work, not after it, where a file can't or mustn't be written.

    `inputs` are files, or folders of files, that the command reads. An existing file is replaced only if it has the
    suffix of what is written, so that a slip does not cost a file of another kind.

    Raises:
        ValueError: it is an input, by whatever name or link, or a file of another kind. Names the option.
        OSError: its folder is not there or can't be written to, or it is a folder itself.
    """
    path = Path(path)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path.parent}, the folder of {path}, is not there")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"`{option}` is a folder", str(path))
    if path.exists() and not path.is_file():
        return
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, f"`{option}` can't be written there", str(path))
    for given in (Path(name) for name in inputs if name):
        own = path.exists() and given.is_file() and path.samefile(given)
        if own or (given.is_dir() and path.exists() and path.resolve().is_relative_to(given.resolve())):
            raise ValueError(f"`{option}` {path} is an input, {given}: choose another file")
    if path.exists() and suffix and path.suffix.lower() != suffix:
        raise ValueError(f"`{option}` {path} is there already and is no {suffix} file: choose another name")


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """Holds a folder for this process, made if missing; gives the owner that left it without a word, if there is one.

    The system drops the lock with its process, so a killed one's is taken over.

    Raises:
        ValueError: another process has it; the text names that.
    """
    try:
        import fcntl
    except ImportError:  # Not a POSIX system.
        yield ""
        return
    folder.mkdir(parents=True, exist_ok=True)
    path, name = folder / LOCK, folder.resolve()
    owner = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    if name in _HELD:
        raise ValueError(f"{folder} is in use by this process: choose another folder")
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                other = file.read().strip() or "another process"
                file.close()
                raise ValueError(f"{folder} is in use by {other}: stop it, or choose another folder") from None
            break  # The file system has no locks.
        with suppress(FileNotFoundError):
            # An owner removes its file when it ends: this one may be gone by now.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    _HELD.add(name)
    try:
        file.seek(0)
        before = file.read().strip()
        file.truncate(0)
        file.write(owner + "\n")
        file.flush()
        for part in folder.glob(f"{PART}*"):
            with suppress(OSError):
                part.unlink()
        yield before
    finally:
        _HELD.discard(name)
        with suppress(OSError):
            path.unlink()
        file.close()


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 80, 80, 80


def shown(value: object) -> str:
    """A value for an error text, cut where it is long: a small YAML file can stand for billions of values."""
    return _SHORT.repr(value)


def printable(text: object, keep: str = "") -> str:
    """Text without control characters, which could move a terminal's cursor: they are written as escapes."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


def reason(error: BaseException) -> str:
    """Why something failed, after a text that names it: no file, no number of the system's, no address of an object."""
    inner = getattr(error, "reason", None)  # of what urllib raises
    if isinstance(error, OSError) and isinstance(inner, (str, BaseException)):
        return inner if isinstance(inner, str) else reason(inner)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return re.sub(r" <[\w.]+ object at 0x[0-9a-f]+>", "", str(error)) or type(error).__name__


def error_text(error: Exception) -> str:
    """What went wrong, in one form whoever raised it: no name of the program before it, no number of the system's."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {reason(error)}" if error.filename else reason(error)
    return re.sub(r"^gfl([ .][\w.]+)?: ", "", str(error))


def say(text: object, file: Any = None) -> None:
    """Prints lines whatever is in them, and goes on where nobody reads them any more."""
    stream = sys.stdout if file is None else file
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = printable(text, "\n").encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(shown, file=stream, flush=True)
    except (OSError, ValueError):
        # Or the interpreter would try once more when it ends, and complain.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
