# SPDX-License-Identifier: Apache-2.0
"""Values as they are found in JSON files of any origin, and small data sets to put them in."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIDE = 32
VALUES: list[Any] = [
    *(0, 1, -1, 2, 7.0, 7.5, 0.0, -0.0, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf"), True, False, None),
    *("", "0", "1", "false", "true", "no", "7", "NaN", "1e400", "\x1b[2J", "\ud800", "a\0b", "x" * 5000),
    *([], [1], [1, 2, 3, 4], ["1", "2", "3", "4"], [None] * 4, [[1, 2, 3, 4]], {}, {"a": 1}),
]


def written(value: Any) -> str:
    """JSON of a value; of an integer with more digits than Python reads by default too."""
    return json.dumps(value, ensure_ascii=True)


def data_set(folder: Path, images: int = 3) -> dict[str, Any]:
    """Grey images with two boxes each, and their annotations."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"categories": [{"id": i, "name": n} for i, n in ((1, "a"), (2, "b"))]}
    content |= {"images": [], "annotations": []}
    for number in range(1, images + 1):
        Image.fromarray(np.full((SIDE, SIDE, 3), 40 * number, np.uint8)).save(folder / "images" / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE})
        for category in (1, 2):
            box = {"image_id": number, "category_id": category, "bbox": [2 * category, 3, 12, 14], "area": 168}
            content["annotations"].append({"id": len(content["annotations"]) + 1, **box, "iscrowd": 0})
    (folder / "annotations.json").write_text(written(content))
    return content


def changes(content: Any, draw: random.Random, count: int) -> Iterator[tuple[str, Any]]:
    """Copies of a JSON value, each with one place of it changed or removed, and which."""
    for _ in range(count):
        changed = copy.deepcopy(content)
        place, path = changed, []
        while True:
            key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
            path.append(key)
            inner = place[key]
            if isinstance(inner, (dict, list)) and inner and draw.random() < 0.85:
                place = inner
                continue
            if isinstance(place, dict) and draw.random() < 0.1:
                del place[key]
                yield f"{path} removed", changed
            else:
                place[key] = value = copy.deepcopy(draw.choice(VALUES))
                yield f"{path} = {value!r:.60}", changed
            break


def damages(content: bytes, draw: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Copies of a file's bytes, each cut, with a bit flipped, or with a block of zeros."""
    kinds: dict[str, Callable[[int], bytes]] = {
        "cut at": lambda k: content[:k],
        "bit flipped at": lambda k: content[:k] + bytes([content[k] ^ 1 << draw.randrange(8)]) + content[k + 1 :],
        "zeros at": lambda k: (content[:k] + bytes(512) + content[k + 512 :])[: len(content)],
        "twice from": lambda k: content[:k] + content[max(0, k - 64) :],
    }
    for _ in range(count):
        kind, place = draw.choice(list(kinds)), draw.randrange(len(content))
        if (changed := kinds[kind](place)) != content:
            yield f"{kind} {place}", changed


def numbers_like(value: float) -> list[Any]:
    """The forms in which Python programs have a number."""
    return [value, np.float32(value), np.float64(value), np.array(value), torch.tensor(value)]
