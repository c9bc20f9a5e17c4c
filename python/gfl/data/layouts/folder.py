# SPDX-License-Identifier: Apache-2.0
"""The files of a data set's folder: which part of the data they belong to, and which image a name means."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from ..transforms import IMAGE_SUFFIXES

PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
PARTS |= {"test": "test", "testing": "test"}
# What Label Studio puts before the name of an uploaded file.
UPLOADED = re.compile(r"[0-9a-f]{8}-")
SKIPPED = ("__MACOSX", "node_modules")
# Pictures that `gfl data` and a training make, which are no images of the set.
SHEET, BATCH = "data_sheet.jpg", "train_batch.jpg"
DEEPEST = 8


def part_of(words: Iterable[str]) -> str | None:
    """train, val or test where one of the words says so, of several the last."""
    said = [PARTS[token] for word in words for token in re.split(r"[^a-z]+", word.lower()) if token in PARTS]
    return said[-1] if said else None


class Folder:
    """All files below a folder, sorted; links are followed, hidden folders are not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[Path] = []
        self._images: dict[str, list[Path]] = {}
        seen: set[str] = set()
        for place, folders, names in os.walk(root, followlinks=True):
            real, here = os.path.realpath(place), Path(place)
            deep = len(here.parts) - len(root.parts) >= DEEPEST
            again = real in seen
            seen.add(real)
            folders[:] = [] if deep or again else sorted(f for f in folders if f[0] != "." and f not in SKIPPED)
            if not again:
                self.files += [here / name for name in sorted(names) if name[0] != "." and name not in (SHEET, BATCH)]
        for path in self.files:
            if path.suffix.lower() in IMAGE_SUFFIXES:
                self._images.setdefault(path.stem.lower(), []).append(path)

    def only(self, path: Path) -> Folder:
        """The same with one file that may have annotations."""
        folder = copy.copy(self)
        folder.files = [path]
        return folder

    def of(self, *suffixes: str) -> list[Path]:
        """Files by suffix, those of the outer folders first."""
        found = [path for path in self.files if path.suffix.lower() in suffixes]
        return sorted(found, key=lambda path: (len(path.parts), path))

    def images(self) -> list[Path]:
        """All image files."""
        return sorted(path for paths in self._images.values() for path in paths)

    def words(self, path: Path) -> tuple[str, ...]:
        """The parts of a path below the root."""
        return path.relative_to(self.root).parts if path.is_relative_to(self.root) else path.parts

    def image(self, name: str, near: Path) -> Path | None:
        """The image file that a name in a file of the folder `near` means, None if there is none, or more than one.

        A name may have backslashes, be a link, or start with folders that are elsewhere by now.
        """
        name = name.partition("?d=")[2] or name.partition("?")[0]
        for text in (name, unquote(name)):
            path = PurePosixPath(text.replace("\\", "/"))
            if not path.name:
                return None
            for base in (near, self.root):
                whole = Path(os.path.normpath(base / path))
                if whole.suffix and whole.is_file():
                    return whole
            stems = [path.stem.lower()]
            # "cat.001" has no suffix: it is the whole name.
            stems += [path.name.lower(), UPLOADED.sub("", path.stem.lower(), count=1)]
            for stem in stems:
                if found := self._images.get(stem):
                    return self._fitting(found, path, near)
        return None

    def _fitting(self, found: list[Path], wanted: PurePosixPath, near: Path) -> Path | None:
        """Of files of one name that with the longest common end, then with the longest common beginning."""

        def common(one: Iterable[str], other: Iterable[str]) -> int:
            equal = [a == b for a, b in zip(one, other)]
            return (*equal, False).index(False)

        def fit(path: Path) -> tuple[bool, int, int]:
            same = path.name.lower() == wanted.name.lower()
            end = common(reversed(path.parent.parts), reversed(wanted.parent.parts))
            return same, end, common(path.parent.parts, near.parts)

        best = max(map(fit, found))
        fitting = [path for path in found if fit(path) == best]
        return fitting[0] if len(fitting) == 1 else None
