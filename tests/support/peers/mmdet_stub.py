# SPDX-License-Identifier: Apache-2.0
"""Makes the real mmdet importable on a CPU: stands in for mmcv's compiled extension, which mmcv-lite leaves out.

Call `install()` before the first import of mmdet. It needs the packages of requirements.txt beside this file and
changes nothing where the extension is there, or where mmdet is not installed. Of the extension's functions only `nms`
works, as a plain loop; the others exist, since mmcv looks for them at import, and raise when called.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types

import torch
from torch import Tensor

EXTENSION = "mmcv._ext"


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Greedy NMS: int64 indices by falling score, ties by lower index; `offset` 1 counts both borders of a side."""
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    area = ((boxes[:, 2:] - boxes[:, :2]) + offset).prod(1)
    keep = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if not keep[i]:
            continue
        rest = boxes[i + 1 :]
        side = torch.minimum(rest[:, 2:], boxes[i, 2:]) - torch.maximum(rest[:, :2], boxes[i, :2]) + offset
        overlap = side.clamp(min=0).prod(1)
        keep[i + 1 :] &= overlap / (area[i + 1 :] + area[i] - overlap) <= iou_threshold
    return order[keep]


class _Extension(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"{EXTENSION}.{name} has no stand-in here")

        return absent


def install() -> None:
    """Put the stand-in into `sys.modules`, where mmcv is installed without its extension."""
    # albumentations, where it is installed, asks the network for its newest version at import otherwise.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    if EXTENSION in sys.modules or importlib.util.find_spec("mmcv") is None:
        return
    if importlib.util.find_spec(EXTENSION) is not None:
        return
    module = _Extension(EXTENSION)
    module.nms = nms
    sys.modules[EXTENSION] = module
