# SPDX-License-Identifier: Apache-2.0
"""Published weights by name: one table, and where their files are.

A name is a preset's in `gfl.PRESETS`; the configuration is the preset's too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from ..config import PRESETS, Config, did_you_mean
from .coco import CATEGORIES
from .download import cache_path, cached

MMDET = "https://download.openmmlab.com/mmdetection/v2.0/gfl/"
NANODET = "https://github.com/RangiLyu/nanodet/releases/download/v1.0.0-alpha-1/"


class Published(NamedTuple):
    """Weights trained on COCO, whose classes they have."""

    preset: str
    url: str  # its file name ends with the first digits of its SHA-256, if that was published
    box_ap: float  # of COCO val2017, as published
    licence: str = "Apache-2.0"

    @property
    def config(self) -> Config:
        return PRESETS[self.preset]()

    @property
    def classes(self) -> list[str]:
        return list(CATEGORIES.values())

    @property
    def category_ids(self) -> list[int]:
        return list(CATEGORIES)

    @property
    def path(self) -> Path:
        """Of its file in torch.hub's cache, where it may not be yet."""
        return cache_path(self.url)


# mmdetection's configs/gfl/metafile.yml, and the README of NanoDet.
TABLE = {
    entry.preset: entry
    for entry in (
        Published("gfl_r50_1x", f"{MMDET}gfl_r50_fpn_1x_coco/gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth", 40.2),
        Published(
            "gfl_r50_2x",
            f"{MMDET}gfl_r50_fpn_mstrain_2x_coco/gfl_r50_fpn_mstrain_2x_coco_20200629_213802-37bb1edc.pth",
            42.9,
        ),
        Published(
            "gfl_r101_2x",
            f"{MMDET}gfl_r101_fpn_mstrain_2x_coco/gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth",
            44.7,
        ),
        Published(
            "gfl_r101_dcn",
            f"{MMDET}gfl_r101_fpn_dconv_c3-c5_mstrain_2x_coco/"
            "gfl_r101_fpn_dconv_c3-c5_mstrain_2x_coco_20200630_102002-134b07df.pth",
            47.1,
        ),
        Published(
            "gfl_x101_32x4d_2x",
            f"{MMDET}gfl_x101_32x4d_fpn_mstrain_2x_coco/"
            "gfl_x101_32x4d_fpn_mstrain_2x_coco_20200630_102002-50c1ffdb.pth",
            45.9,
        ),
        Published(
            "gfl_x101_32x4d_dcn",
            f"{MMDET}gfl_x101_32x4d_fpn_dconv_c4-c5_mstrain_2x_coco/"
            "gfl_x101_32x4d_fpn_dconv_c4-c5_mstrain_2x_coco_20200630_102002-14a2bf25.pth",
            48.1,
        ),
        Published("nanodet_plus_m_416", f"{NANODET}nanodet-plus-m_416_checkpoint.ckpt", 30.4),
    )
}


def find(source: object) -> Published | None:
    """The published weights of that name; a file of that name comes first.

    Raises:
        ValueError: neither a file nor published, but a name like those.
    """
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    # What looks like a path is one, so that its own error names it.
    if not isinstance(name, str) or not name or Path(name).name != name or os.path.lexists(name):
        return None
    if name not in TABLE and not (name in PRESETS or "." not in name):
        return None
    if name not in TABLE:
        known = did_you_mean(name, TABLE) or f"; there are {', '.join(TABLE)}"
        raise ValueError(f"no file {name!r}, and no published weights of that name{known}")
    return TABLE[name]


def locate(source: str | os.PathLike[str]) -> Path:
    """The file that a path or the name of published weights stands for; these are downloaded the first time."""
    entry = find(source)
    return Path(source) if entry is None else cached(entry.url)
