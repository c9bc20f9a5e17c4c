# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user passes. Every error text has one form: function, argument, rule, what was passed."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_INTEGERS = (int, torch.SymInt)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
REDUCTIONS = ("none", "mean", "sum")

# Checks that would make the host wait for the device run only on request.
SYNCHRONISING = os.environ.get("GFL_OPS_CHECK", "0") == "1"


def message(op: str, argument: str, rule: str, got: object) -> str:
    return f"gfl_ops.{op}: `{argument}` {rule}, got {got}"


def tensor(op: str, argument: str, value: object, dtypes: Sequence[torch.dtype] = FLOATING) -> None:
    """`value` is a tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(message(op, argument, "must be a tensor", type(value).__name__))
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(message(op, argument, f"must have one of the dtypes {names}", value.dtype))


def shape(op: str, argument: str, value: Tensor, names: str, sizes: Sequence[int | None]) -> None:
    """`value` has the given sizes; None matches any. `names` is the shape as the documentation writes it, "[N, C]"."""
    found = value.shape
    if found == sizes:
        return
    if len(found) == len(sizes):
        for got, want in zip(found, sizes):  # not all(…): a generator costs a microsecond
            if want is not None and got != want:
                break
        else:
            return
    known = [str(s) if s is not None else name.strip() for s, name in zip(sizes, names.strip("[]").split(","))]
    stated = f"[{', '.join(known)}]"
    expected = "" if stated == names else f" = {stated}"
    raise ValueError(message(op, argument, f"must have shape {names}{expected}", list(value.shape)))


def same_device(op: str, argument: str, value: Tensor, other_argument: str, other: Tensor) -> None:
    if not (value.is_cpu and other.is_cpu) and value.device != other.device:
        raise ValueError(
            message(op, argument, f"must be on the device of `{other_argument}`, {other.device}", value.device)
        )


def maps(op: str, argument: str, value: object) -> tuple[int, int]:
    """A list of floating ``[B, channels, H, W]`` that differ only in H and W. Returns B and the channels."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(message(op, argument, "must be a list of tensors", type(value).__name__))
    if not value:
        raise ValueError(message(op, argument, "must hold at least one level", "none"))
    for level in value:
        tensor(op, argument, level)
        same_device(op, argument, level, argument, value[0])
        if level.dtype != value[0].dtype:
            raise TypeError(message(op, argument, f"must be of one dtype, {value[0].dtype}", level.dtype))
        if level.dim() != 4 or level.shape[:2] != value[0].shape[:2]:
            expected = (
                f"[B, channels, H, W], B and channels of every level those of the first, {list(value[0].shape[:2])}"
            )
            raise ValueError(message(op, argument, f"must have shape {expected}", list(level.shape)))
    if value[0].shape[1] < 1:
        raise ValueError(message(op, argument, "must have at least one channel", list(value[0].shape)))
    return value[0].shape[0], value[0].shape[1]


def choice(op: str, argument: str, value: object, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(message(op, argument, f"must be one of {', '.join(map(repr, options))}", repr(value)))


def number(
    op: str,
    argument: str,
    value: object,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    exclusive: bool = False,
    integer: bool = False,
) -> None:
    """`value` is a plain number in [minimum, maximum], or in (minimum, maximum] if `exclusive`."""
    kinds = _INTEGERS if integer else _NUMBERS
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "an integer" if integer else "a number"
        raise TypeError(message(op, argument, f"must be {kind}", type(value).__name__))
    if not integer and value != value:
        raise ValueError(message(op, argument, "must not be NaN", value))
    if minimum is not None and (value < minimum or (exclusive and value == minimum)):
        raise ValueError(message(op, argument, f"must be {'>' if exclusive else '>='} {minimum}", value))
    if maximum is not None and value > maximum:
        raise ValueError(message(op, argument, f"must be <= {maximum}", value))
