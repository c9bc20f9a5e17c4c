# SPDX-License-Identifier: Apache-2.0
"""Decoded images, kept for later epochs where all worker processes find them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where torch puts what processes share; containers often have little of it.
SHARED = Path("/dev/shm")


class ImageCache:
    """The pixels of a data set's images, each kept when it is first read: in shared memory, or in a file.

    Space for all images, of (height, width) `sizes` ``[n, 2]``, is taken at once, or a ValueError says what is missing.
    """

    def __init__(self, sizes: Tensor, file: Path | None = None) -> None:
        self.sizes, self.file = sizes, file
        self.ends = (3 * sizes.prod(1)).cumsum(0)
        self.total = int(self.ends[-1])
        where = SHARED if file is None else file.parent
        free = shutil.disk_usage(where).free if where.exists() else self.total
        if free < self.total:
            need = f"{self.total / 2**30:.1f} GiB for decoded images, {where} has {free / 2**30:.1f}"
            other = "disk" if file is None else "ram"
            raise ValueError(f"`cache` needs {need}: set it to {other} or none")
        self.there = torch.zeros(len(sizes), dtype=torch.bool).share_memory_()
        if file is None:
            # Pages are taken when they are written to.
            storage: Any = torch.UntypedStorage._new_shared(self.total)
            self.pixels = torch.empty(0, dtype=torch.uint8).set_(storage)
        else:
            with file.open("wb") as opened:
                # Reserved, since a full disk would end the process in the middle of a write.
                os.posix_fallocate(opened.fileno(), 0, self.total)
            self._map()

    def _map(self) -> None:
        self.pixels = torch.from_file(str(self.file), shared=True, size=self.total, dtype=torch.uint8)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if self.file is not None:
            del state["pixels"]  # which would be copied to a worker that is not forked
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.file is not None:
            self._map()

    def get(self, index: int, read: Callable[[], Tensor]) -> Tensor:
        """An image uint8 ``[3, H, W]`` in channels-last memory format, the caller's own, by `read` the first time."""
        height, width = self.sizes[index].tolist()
        last = int(self.ends[index])
        place = self.pixels[last - 3 * height * width : last].view(height, width, 3).permute(2, 0, 1)
        if not self.there[index]:
            place.copy_(read())
            self.there[index] = True
        return place.clone()

    def close(self) -> None:
        """Removes the file."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
