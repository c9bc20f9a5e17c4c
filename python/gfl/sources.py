# SPDX-License-Identifier: Apache-2.0
"""Where images come from: files, folders, globs, URLs, videos, cameras, standard input, and what is in memory."""

from __future__ import annotations

import glob
import importlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .data import transforms
from .files import printable, reason
from .zoo.download import is_live, is_url, read_parts, read_url

# Of images in a folder; a file given by its name or by a glob may have any.
SUFFIXES = transforms.IMAGE_SUFFIXES
VIDEOS = (".avi", ".m4v", ".mjpeg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
STREAMS = ("rtsp", "rtsps", "rtmp", "udp", "tcp", "srt")
STDIN = "-"
PATH_LENGTH = 4096


@dataclass(frozen=True)
class Unread:
    """An image by its place: a file, or a URL that the user gave; `given` is false for one that some text names."""

    place: str | Path
    given: bool = True

    @property
    def path(self) -> Path | None:
        return None if is_url(self.place) else Path(self.place)

    def pixels(self) -> Tensor:
        """uint8 ``[3, H, W]``; ValueError, which names the image, if it can't be read or decoded."""
        name = printable(self.place)
        if self.path is None:
            return decoded(_from_web(str(self.place), self.given), name)
        try:
            return transforms.read_image(self.path)
        except OSError as error:
            raise ValueError(f"gfl: {name} can't be read: {reason(error)}") from error


def _from_web(url: str, given: bool = True) -> bytes:
    try:
        return read_url(url, transforms.LARGEST_FILE, given)
    except OSError as error:
        raise ValueError(f"gfl: {error}") from None


@dataclass(frozen=True)
class Named:
    """Pixels that are there, uint8 ``[3, H, W]``, under a name such as that of a frame."""

    name: str
    pixels: Tensor


# One image, unless it is the path of a folder or a glob pattern.
Source = Union[str, "os.PathLike[str]", bytes, Image.Image, np.ndarray, Tensor, Unread, Named]


def decoded(content: bytes, name: str) -> Tensor:
    """Pixels of an image file's bytes; UnreadableImage, which says the name, if they are none."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return transforms.to_tensor(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types.
        raise transforms.UnreadableImage(f"{name} can't be decoded: {reason(error)}") from error


def find_images(source: str | os.PathLike[str], suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The image files of a folder (by suffix, without subfolders), or those of a glob, sorted by name; at least one."""
    folder = Path(source)
    if folder.is_dir():
        paths = [path for path in folder.iterdir() if path.suffix.lower() in suffixes]
        problem = f"no image files ({', '.join(suffixes)}) in the folder {folder}"
    else:
        paths = [Path(name) for name in glob.glob(str(source), recursive=True)]
        problem = f"no file, no folder and no file by the pattern {source}"
    if not (found := sorted(path for path in paths if path.is_file())):
        raise ValueError(f"gfl: {problem}")
    return found


def is_several(source: object) -> bool:
    """Whether it is the path of a folder, or a pattern and no file."""
    if not isinstance(source, (str, os.PathLike)) or is_url(source):
        return False
    return Path(source).is_dir() or (glob.has_magic(str(source)) and not Path(source).is_file())


class Sources:
    """What a command line names, image by image: nothing is read before it is asked for, files are looked up at once.

    Each of `given` is a file, a folder, a glob, a URL (of an image, a video or a network camera), a video file, a
    number (of a camera), a stream such as rtsp://…, or - for standard input: an image, or lines that name images.

    Raises:
        ValueError: no such file, folder or pattern.
        RuntimeError: a video, a camera or a stream, and neither OpenCV nor PyAV is installed.
    """

    def __init__(self, given: Iterable[str], stdin: Any = None) -> None:
        self._stdin = stdin
        self.live = False  # frames have to be taken as they come
        self.paths: list[Path] = []
        self._parts: list[Callable[[], Iterator[Source]]] = []
        for one in given:
            self._add(one)

    def __iter__(self) -> Iterator[Source]:
        for part in self._parts:
            yield from part()

    def _add(self, one: str) -> None:
        scheme = re.match(r"(\w+)://", one)
        camera = one.isdecimal() and not os.path.lexists(one)
        video = one.lower().partition("?")[0].endswith(VIDEOS)
        if one == STDIN:
            self._parts.append(self._from_stdin)
        elif camera or (scheme and scheme[1].lower() in STREAMS):
            self.live = True
            self._add_video(int(one) if camera else one)
        elif is_url(one):
            self._add_video(one) if video else self._add_url(one)
        elif scheme:
            raise ValueError(f"gfl: {printable(one)}: only http, https, {', '.join(STREAMS)} are taken")
        else:
            # A file that is named is taken whatever its suffix.
            for path in [Path(one)] if Path(one).is_file() else find_images(one, SUFFIXES + VIDEOS):
                self.paths.append(path)
                if path.suffix.lower() in VIDEOS:
                    self._add_video(path)
                else:
                    self._parts.append(lambda path=path: iter([Unread(path)]))  # type: ignore[misc]

    def _add_video(self, place: str | Path | int) -> None:
        reader = _video_reader()
        self._parts.append(lambda: _web_frames(reader, str(place)) if is_url(place) else frames(reader, place))

    def _add_url(self, url: str) -> None:
        # What is named as an image is one, and is asked for when it is read.
        live = not urlsplit(url).path.lower().endswith(SUFFIXES) and is_live(url)
        self.live |= live
        self._parts.append(lambda: _live_frames(url) if live else iter([Unread(url)]))

    def _from_stdin(self) -> Iterator[Source]:
        stream = sys.stdin.buffer if self._stdin is None else self._stdin
        head = stream.read(PATH_LENGTH)
        if _is_text(head):
            for line in _lines(head, stream):
                # The text may be anyone's, so it leads to no place in the local network.
                yield Unread(line, given=False)
            return
        content = head + stream.read(transforms.LARGEST_FILE + 1 - len(head))
        if len(content) > transforms.LARGEST_FILE:
            raise ValueError(f"gfl: standard input is larger than {transforms.LARGEST_FILE >> 20} MiB")
        yield Named("stdin", decoded(content, "standard input"))


def _is_text(head: bytes) -> bool:
    try:
        return "\0" not in head[: head.rfind(b"\n") + 1 or None].decode()
    except UnicodeDecodeError:
        return False


def _lines(head: bytes, stream: Any) -> Iterator[str]:
    rest = head
    while rest:
        *whole, rest = rest.split(b"\n")
        block = stream.read(PATH_LENGTH)
        if not block or len(rest) > 16 * PATH_LENGTH:
            whole, rest = [*whole, rest], b""
        for line in whole:
            if text := os.fsdecode(line.rstrip(b"\r")).strip():
                yield text
        rest += block


def _video_reader() -> Callable[[str | Path | int], Iterator[np.ndarray]]:
    """Of OpenCV, or else of PyAV: gives frames ``[H, W, 3]`` in RGB."""
    for name, reader in (("cv2", _by_opencv), ("av", _by_pyav)):
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        return reader
    raise RuntimeError("videos, cameras and streams need OpenCV or PyAV: pip install 'gfl-ops[video]'")


def _by_opencv(place: str | Path | int) -> Iterator[np.ndarray]:
    cv2: Any = importlib.import_module("cv2")
    capture = cv2.VideoCapture(place if isinstance(place, int) else str(place))
    try:
        if not capture.isOpened():
            raise ValueError(f"gfl: {_name(place)} can't be opened as a video")
        while True:
            there, frame = capture.read()
            if not there:
                return
            yield np.ascontiguousarray(frame[:, :, ::-1])
    finally:
        capture.release()


def _by_pyav(place: str | Path | int) -> Iterator[np.ndarray]:
    av: Any = importlib.import_module("av")
    camera = isinstance(place, int)
    try:
        with av.open(f"/dev/video{place}" if camera else str(place), format="v4l2" if camera else None) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"gfl: {_name(place)} can't be opened as a video: {reason(error)}") from None


def frames(reader: Callable[[str | Path | int], Iterator[np.ndarray]], place: str | Path | int) -> Iterator[Named]:
    """The frames of a video, a camera or a stream, numbered from 1."""
    empty = True
    for number, frame in enumerate(reader(place), 1):
        empty = False
        yield Named(f"{_name(place)}#{number}", torch.from_numpy(frame).permute(2, 0, 1))
    if empty:
        raise ValueError(f"gfl: {_name(place)} has no frame that can be decoded")


def _live_frames(url: str) -> Iterator[Named]:
    """The images of a network camera as they come; damaged ones are left out."""
    number = 0
    try:
        for content in read_parts(url, transforms.LARGEST_FILE):
            try:
                pixels = decoded(content, _name(url))
            except transforms.UnreadableImage:
                continue
            number += 1
            yield Named(f"{_name(url)}#{number}", pixels)
    except OSError as error:
        raise ValueError(f"gfl: {error}") from None
    if not number:
        raise ValueError(f"gfl: {_name(url)} has no frame that can be decoded")


def _web_frames(reader: Callable[[str | Path | int], Iterator[np.ndarray]], url: str) -> Iterator[Named]:
    """Of a video on the web, which is fetched first: a decoder would follow any redirection."""
    with tempfile.NamedTemporaryFile(suffix=Path(url.partition("?")[0]).suffix) as file:
        file.write(_from_web(url))
        file.flush()
        for frame in frames(reader, Path(file.name)):
            yield Named(frame.name.replace(file.name, _name(url)), frame.pixels)


def _name(place: str | Path | int) -> str:
    # A stream's address may hold a password.
    return f"camera {place}" if isinstance(place, int) else re.sub(r"//[^/@]*@", "//", str(place))


def in_memory(source: Any) -> Tensor:
    """uint8 ``[3, H, W]`` of an image in memory."""
    if isinstance(source, Image.Image):
        return transforms.to_tensor(ImageOps.exif_transpose(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decoded(bytes(source), "gfl.Detector: the bytes of an image")
    if not isinstance(source, (np.ndarray, Tensor)):
        kinds = "a path, a URL, a file's bytes, a pillow image, an array, a tensor or a sequence of these"
        raise TypeError(f"gfl.Detector: `source` must be {kinds}, got {type(source).__name__}")
    array = isinstance(source, np.ndarray)
    if str(source.dtype).removeprefix("torch.") != "uint8":
        kind = "array" if array else "tensor"
        raise TypeError(f"gfl.Detector: the {kind} of an image must be uint8 (levels of 0 to 255), got {source.dtype}")
    if array and source.ndim == 2:
        source = source[..., None]
    channels = source.shape[2 if array else 0] if source.ndim == 3 else 0
    if channels not in ((1, 3, 4) if array else (3,)) or 0 in source.shape:
        layout = "an array must have shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        layout = layout if array else "a tensor must have shape [3, H, W]"
        raise ValueError(f"gfl.Detector: {layout}, got {list(source.shape)}")
    pixels = torch.from_numpy(source.copy()).permute(2, 0, 1) if array else source.cpu()
    # Transparency is dropped, as of files.
    return pixels.expand(3, -1, -1).contiguous() if channels == 1 else pixels[:3]
