# SPDX-License-Identifier: Apache-2.0
"""Files of the net: whole and of the published hash or not kept, and no way from there into the local network."""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from ..files import printable, reason

# Seconds without a byte, and for a whole image; tries of one call, each from where the last one ended.
SILENCE, DEADLINE, TRIES = 30.0, 120.0, 3
BLOCK = 1 << 18
PARTIAL = ".partial"
# The first digits of a file's SHA-256 at the end of its name, as torch.hub has them.
HASH = re.compile(r"-([0-9a-f]{8,64})\.[^.]*$")
WEB = ("http", "https")
LIVE = "multipart/x-mixed-replace"


class WrongFile(ValueError):
    """What came is not the file that was asked for."""


def is_url(text: object) -> bool:
    """Whether it is the address of a file on the web."""
    return isinstance(text, str) and urlsplit(text).scheme.lower() in WEB


def cache_path(url: str) -> Path:
    """Where torch.hub keeps the file of that URL."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / _file_name(url)


def cached(url: str) -> Path:
    """The file of a URL in torch.hub's cache, downloaded if it is not there; its hash is checked either way.

    Raises:
        ValueError: the file in the cache, or the one that came, is another one or damaged; the latter is not kept.
        OSError: it can't be downloaded: says what to fetch and where to put it.
    """
    path = cache_path(url)
    if path.exists():
        with path.open("rb") as file:
            if problem := _wrong(file, _hash(url)):
                raise ValueError(f"{path}: damaged or another file: {problem}; delete it and fetch {url} again")
        return path
    try:
        download(url, path)
    except WrongFile as error:
        raise ValueError(f"{url}: {error}; nothing of it is kept") from None
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"not downloaded ({_reason(error)}): fetch {url} and put it into {path.parent}") from None
    return path


def download(url: str, path: Path) -> None:
    """Downloads to a file beside `path` that then takes its place; of several processes one does it, the others wait.

    A download that was stopped goes on where it was, in the next call too if the URL says the file's hash.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PARTIAL)
    with _locked(part) as file:
        if path.exists():  # Another process has done it while this one waited.
            part.unlink(missing_ok=True)
            return
        digest = _hash(url)
        if not digest:
            file.truncate(0)
        try:
            _receive(url, file, path.name)
            if problem := _wrong(file, digest):
                raise WrongFile(problem)
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
        except WrongFile:
            part.unlink(missing_ok=True)
            raise
        except BaseException:
            if not digest or not file.seek(0, os.SEEK_END):
                part.unlink(missing_ok=True)
            raise


def read_url(url: str, limit: int, given: bool = True) -> bytes:
    """The contents of a URL, of at most `limit` bytes.

    The local network is reached only if the user has `given` this very URL, and only its own host and port.

    Raises:
        OSError: not there, not allowed, too large or too slow; names the URL.
    """
    content, start = bytearray(), time.monotonic()
    try:
        with _open(url, url if given else None) as response:
            while block := response.read(BLOCK):
                content += block
                if len(content) > limit:
                    raise OSError(f"larger than {limit >> 20} MiB")
                if time.monotonic() - start > DEADLINE:
                    raise OSError(f"not there after {DEADLINE:.0f} s")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"{printable(url)}: {_reason(error)}") from None
    return bytes(content)


def is_live(url: str) -> bool:
    """Whether a URL gives one image after another, as network cameras do by HTTP; not if it can't be read."""
    try:
        with _open(url, url) as response:
            return response.headers.get_content_type() == LIVE
    except (OSError, ValueError, http.client.HTTPException):
        return False


def read_parts(url: str, limit: int) -> Iterator[bytes]:
    """The images that a live URL gives, of at most `limit` bytes each, until it ends.

    Raises:
        OSError: not there, not allowed, too large or silent; names the URL.
    """
    try:
        with _open(url, url) as response:
            mark = b"--" + (response.headers.get_boundary() or "").encode().removeprefix(b"--")
            _, more = _up_to(response, mark, limit)
            while more:
                length = http.client.parse_headers(response).get("Content-Length", "")
                if length.isdecimal() and int(length) <= limit:
                    yield response.read(int(length))
                    _, more = _up_to(response, mark, limit)
                else:
                    content, more = _up_to(response, mark, limit)
                    yield content
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"{printable(url)}: {_reason(error)}") from None


def _up_to(response: Any, mark: bytes, limit: int) -> tuple[bytes, bool]:
    """What comes before the next line that begins with a mark, and whether another part follows it."""
    content = bytearray()
    while line := response.readline(BLOCK):
        if line.startswith(mark):
            return bytes(content), not line.startswith(mark + b"--")
        content += line
        if len(content) > limit:
            raise OSError(f"an image is larger than {limit >> 20} MiB")
    return bytes(content), False


def _reason(error: BaseException) -> str:
    return f"HTTP status {error.code}" if isinstance(error, urllib.error.HTTPError) else printable(reason(error))


def _file_name(url: str) -> str:
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    if not name or name.startswith(".") or set(name) & {"\\", "\0", ":"}:
        raise ValueError(f"{url} names no file")
    return name


def _hash(url: str) -> str:
    found = HASH.search(_file_name(url))
    return found[1] if found else ""


def _wrong(file: BinaryIO, digest: str) -> str:
    """Why a file is not the published one; nothing if it is."""
    file.seek(0)
    head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, not a file of weights"
    if not digest:  # The end of an archive lists all of it, so a cut one has none.
        return "" if zipfile.is_zipfile(file) else "it is cut, or no archive of weights"
    file.seek(0)
    found = hashlib.sha256()
    while block := file.read(BLOCK):
        found.update(block)
    begin = found.hexdigest()[: len(digest)]
    return "" if begin == digest else f"its SHA-256 begins with {begin}, not with {digest}"


def _receive(url: str, file: BinaryIO, name: str) -> None:
    """Appends the rest of a file; OSError if it is not whole after some tries."""
    etag = ""
    with tqdm(desc=name, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
        for left in reversed(range(TRIES)):
            have = file.seek(0, os.SEEK_END)
            headers = {"Range": f"bytes={have}-"} if have else {}
            if have and etag:
                headers["If-Range"] = etag
            try:
                with _open(url, url, headers) as response:
                    etag = response.headers.get("ETag", "")
                    etag = "" if etag.startswith("W/") else etag
                    whole = _copy(response, file, have, bar)
                if whole:
                    return
                problem: Exception = OSError("the connection ended before the file did")
            except urllib.error.HTTPError as error:
                if error.code != 416:
                    raise
                file.truncate(0)  # What is there is no beginning of this file.
                problem = error
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.URLError) and not have:
                    raise
                problem = error
            if not left:
                raise problem


def _copy(response: Any, file: BinaryIO, have: int, bar: Any) -> bool:
    """Whether all came that the server announced."""
    if "html" in (response.headers.get("Content-Type") or ""):
        raise WrongFile("it is a web page, not a file of weights")
    start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    if have and (response.status != 206 or start is None or int(start[1]) != have):
        if response.status == 206:
            raise WrongFile("the server sent another part than was asked for")
        have = 0
        file.truncate(0)
    file.seek(have)
    length = response.headers.get("Content-Length")
    expected = have + int(length) if length and length.isdigit() else None
    bar.total, bar.n = expected, have
    while block := response.read(BLOCK):
        file.write(block)
        have += len(block)
        bar.update(len(block))
    return expected is None or have >= expected


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """A file to append to, of one process at a time."""
    try:
        import fcntl
    except ImportError:  # Not a POSIX system.
        fcntl = None  # type: ignore[assignment]
    while True:
        file = part.open("a+b")
        if fcntl is None:
            break
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                break
        file.close()  # Its owner has renamed or removed it meanwhile.
        if part.with_name(part.name.removesuffix(PARTIAL)).exists():
            file = open(os.devnull, "r+b")  # noqa: SIM115  # closed below
            break
    try:
        yield file
    finally:
        file.close()


def _open(url: str, given: str | None, headers: dict[str, str] | None = None) -> Any:
    """Opens a URL by http or https; redirections too reach no local address but the host and port of `given`."""
    if not is_url(url):
        raise ValueError("only http and https are taken")
    known = None if given is None else _place(given)

    class Opener(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
        def http_open(self, request: Any) -> Any:
            return self._connect(http.client.HTTPConnection, request)

        def https_open(self, request: Any) -> Any:
            return self._connect(http.client.HTTPSConnection, request, context=ssl.create_default_context())

        def _connect(self, kind: Any, request: Any, **options: Any) -> Any:
            target = _place(request.full_url)
            proxied = request.has_proxy() or getattr(request, "_tunnel_host", None) is not None

            class Checked(kind):
                def connect(self) -> None:
                    super().connect()
                    # Of the connection itself: a name may be resolved to another address a moment later.
                    peer = target[0] if proxied else self.sock.getpeername()[0]
                    if target != known and _is_local(peer):
                        self.close()
                        raise OSError(f"{target[0]} is in the local network, and not what was asked for")

            return self.do_open(Checked, request, **options)

    director = urllib.request.OpenerDirector()
    for handler in (
        *(urllib.request.ProxyHandler(), Opener(), urllib.request.HTTPRedirectHandler()),
        *(urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor()),
        urllib.request.UnknownHandler(),
    ):
        director.add_handler(handler)
    agent = {"User-Agent": "gfl-ops", **(headers or {})}
    return director.open(urllib.request.Request(url, headers=agent), timeout=SILENCE)


def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return (parts.hostname or "").lower(), parts.port or (443 if parts.scheme.lower() == "https" else 80)


def _is_local(host: str) -> bool:
    """Whether an address is none of the public net; a name, which only a proxy resolves, if it is this machine's."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local", ".internal"))
    return not (getattr(address, "ipv4_mapped", None) or address).is_global
