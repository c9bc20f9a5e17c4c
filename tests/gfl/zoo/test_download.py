# SPDX-License-Identifier: Apache-2.0
"""Downloads from a server that does everything wrong: whole and right, or a clear error and nothing kept."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
from pathlib import Path

import pytest
from file_server import FileServer

from gfl.zoo import download
from gfl.zoo.download import cached, read_url


@pytest.fixture
def content(seed: int) -> bytes:
    return random.Random(seed).randbytes(900_000)


def put(server: FileServer, content: bytes, name: str = "weights") -> str:
    """The URL of a file whose name ends with its hash."""
    name = f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[name] = content
    return server.url(name)


def test_a_file_comes_once(server: FileServer, cache: Path, content: bytes) -> None:
    url = put(server, content)
    for _ in range(2):
        assert cached(url).read_bytes() == content
    assert len(server.requests) == 1 and [p.name for p in cache.iterdir()] == [url.rpartition("/")[2]]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
def test_a_lost_connection_is_taken_up_again(ranges: bool, server: FileServer, cache: Path, content: bytes) -> None:
    server.ranges, server.cuts = ranges, [300_000, 300_000]
    assert cached(put(server, content)).read_bytes() == content
    starts = [asked for _, asked in server.requests]
    assert len(starts) == 3 and starts[0] is None and starts[1] == "bytes=300000-"


def test_the_next_call_goes_on_where_this_one_ended(server: FileServer, cache: Path, content: bytes) -> None:
    url, server.cuts = put(server, content), [200_000, 100_000, 100_000]
    with pytest.raises(OSError, match=rf"not downloaded \(the connection ended.*fetch {url} and put it into {cache}"):
        cached(url)
    assert [p.name for p in cache.iterdir()] == [url.rpartition("/")[2] + download.PARTIAL]
    assert cached(url).read_bytes() == content and server.requests[-1][1] == "bytes=400000-"


def test_what_is_there_may_be_no_beginning_of_it(server: FileServer, cache: Path, content: bytes) -> None:
    url = put(server, content)
    cache.mkdir(parents=True)
    part = cache / (url.rpartition("/")[2] + download.PARTIAL)
    part.write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="its SHA-256 begins with"):
        cached(url)
    assert not list(cache.iterdir()) and cached(url).read_bytes() == content
    (cache / part.name.removesuffix(download.PARTIAL)).unlink()
    part.write_bytes(b"x" * 1_000_000)  # longer than the file
    assert cached(url).read_bytes() == content


@pytest.mark.parametrize("wrong", ["hash", "cut", "page", "page-as-file", "no-archive"])
def test_another_file_is_refused_and_not_kept(wrong: str, server: FileServer, cache: Path, content: bytes) -> None:
    url = put(server, content)
    name = url.rpartition("/")[2]
    page = b"<!DOCTYPE html><html><body>Sign in</body></html>"
    says = "web page" if "page" in wrong else "its SHA-256 begins with"
    if wrong == "no-archive":  # of a file whose hash nobody published
        name, says = "weights.ckpt", "it is cut, or no archive"
    served = {"hash": content[::-1], "cut": content[:-1]}.get(wrong, content if wrong == "no-archive" else page)
    server.files[name], url = served, server.url(name)
    server.kinds[name] = "text/html; charset=utf-8" if wrong == "page" else "application/octet-stream"
    with pytest.raises(ValueError, match=rf"{url}: .*{says}.*nothing of it is kept"):
        cached(url)
    assert not list(cache.iterdir())


def test_what_is_not_there(server: FileServer, cache: Path) -> None:
    with pytest.raises(
        OSError, match=r"not downloaded \(HTTP status 404\): fetch http.*-00000000\.pth and put it into"
    ):
        cached(server.url("none-00000000.pth"))
    with pytest.raises(OSError, match=r"not downloaded \(.*refused\): fetch http"):
        cached("http://127.0.0.1:9/none-00000000.pth")
    assert not list(cache.iterdir())


def test_a_file_put_there_is_checked(server: FileServer, cache: Path, content: bytes) -> None:
    url = put(server, content)
    cache.mkdir(parents=True)
    (cache / url.rpartition("/")[2]).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"damaged or another file: its SHA-256 begins .*delete it and fetch http"):
        cached(url)
    assert not server.requests


def test_of_many_processes_one_downloads(server: FileServer, cache: Path, content: bytes) -> None:
    url = put(server, content)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=cached, args=(url,)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4 and len(server.requests) == 1
    assert cached(url).read_bytes() == content and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("name", ["..", "%2e%2e", ".hidden", "", "a%5cb", "a%00b"])
def test_a_name_leads_nowhere_else(name: str, cache: Path) -> None:
    with pytest.raises(ValueError, match="names no file"):
        cached(f"https://example.org/x/{name}")
    assert download.cache_path("https://example.org/x/..%2f..%2fetc%2fpasswd-00000000.pth").parent == cache


# The local network


def test_only_what_was_given_is_reached_there(server: FileServer) -> None:
    server.files["a.txt"] = b"secret"
    assert read_url(server.url("a.txt"), 100) == b"secret"
    with pytest.raises(OSError, match=r"127\.0\.0\.1 is in the local network"):
        read_url(server.url("a.txt"), 100, given=False)
    assert len(server.requests) == 1


def test_a_redirection_leads_to_no_other_place_there(server: FileServer) -> None:
    server.files["a.txt"] = b"secret"
    server.redirects = {
        "same": "/a.txt",
        "name": f"http://localhost:{server.port}/a.txt",
        "file": "file:///etc/passwd",
        "loop": "/loop",
    }
    assert read_url(server.url("same"), 100) == b"secret"
    for name, says in (("name", "localhost is in the local network"), ("file", "not allowed|302"), ("loop", "302")):
        with pytest.raises(OSError, match=says):
            read_url(server.url(name), 100)
    assert not any(name == "a.txt" for name, _ in server.requests[2:])


@pytest.mark.parametrize(
    ("address", "local"),
    [("127.0.0.1", True), ("10.1.2.3", True), ("192.168.0.7", True), ("169.254.169.254", True), ("::1", True),
     ("::ffff:127.0.0.1", True), ("fe80::1%eth0", True), ("0.0.0.0", True), ("localhost", True), ("db.internal", True),
     ("8.8.8.8", False), ("2606:4700::1", False), ("example.org", False)],
)  # fmt: skip
def test_local_addresses(address: str, local: bool) -> None:
    assert download._is_local(address) is local


def test_limits(server: FileServer) -> None:
    server.files["big"] = bytes(3 << 20)
    with pytest.raises(OSError, match=r"big: larger than 1 MiB"):
        read_url(server.url("big"), 1 << 20)
    for url in ("file:///etc/passwd", "ftp://example.org/x", "data:,x"):
        with pytest.raises(OSError, match="only http and https"):
            read_url(url, 100)
