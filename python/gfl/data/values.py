# SPDX-License-Identifier: Apache-2.0
"""Values of JSON files by their types: a function per kind, None for what is not of it.

Numbers of numpy and tensors of one number are taken for what they hold. Text is never a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

ImageId = int | str
_TRUTH = {"true": True, "false": False, "1": True, "0": False}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0 else value


def number(value: Any) -> float | None:
    """a finite number, not a truth value"""
    if type(value) is float:
        return value if value - value == 0 else None
    if type(value) is not int:
        value = _plain(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def whole(value: Any) -> int | None:
    """a whole number of at most 64 bits, also written as 7.0"""
    if type(value) is not int:
        value = _plain(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            return None
    return value if -(2**63) <= value < 2**63 else None


def text(value: Any) -> str | None:
    """a text"""
    return value if isinstance(value, str) else None


def image_id(value: Any) -> ImageId | None:
    """a whole number or a text, as pycocotools takes ids of images"""
    return value if isinstance(value, str) else whole(value)


def truth(value: Any) -> bool | None:
    """true or false, 1 or 0, also as a text; nothing (null) is false"""
    if value is None or value is False:
        return False
    value = _plain(value)
    if isinstance(value, str):
        return _TRUTH.get(value.strip().lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def numbers(value: Any, count: int) -> list[float] | None:
    """that many finite numbers"""
    if type(value) is not list and isinstance(value, (np.ndarray, Tensor)):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        return None
    found = [number(one) for one in value]
    return None if None in found else found  # type: ignore[return-value]
