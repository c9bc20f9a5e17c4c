# SPDX-License-Identifier: Apache-2.0
"""Sizes of a network's input as they are typed."""

from __future__ import annotations


def parse_size(text: str, option: str) -> tuple[int, int]:
    """(height, width) of "HxW", multiples of 32.

    Raises:
        ValueError: anything else; it names the option.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 and int(part) % 32 == 0 for part in parts):
        raise ValueError(f"`{option}` must be HEIGHTxWIDTH in multiples of 32, as 320x320, got {text!r}")
    return int(parts[0]), int(parts[1])
