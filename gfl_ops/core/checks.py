# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user passes. Every error text has one form: function, argument, rule, what was passed."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REAL = (*FLOATING, *INTEGER, torch.bool)
REDUCTIONS = ("none", "mean", "sum")

LARGEST = torch.finfo(torch.float32).max

# Checks that would make the host wait for the device run only on request.
SYNCHRONISING = os.environ.get("GFL_OPS_CHECK", "0") == "1"


def message(op: str, argument: str, rule: str, got: object) -> str:
    if isinstance(got, int) and got.bit_length() > 128:  # Python refuses to print one of more than 4300 digits
        got = f"an integer of {got.bit_length()} bits"
    return f"gfl_ops.{op}: `{argument}` {rule}, got {got}"


def tensor(op: str, argument: str, value: object, dtypes: Sequence[torch.dtype] = FLOATING) -> None:
    """`value` is a tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(message(op, argument, "must be a tensor", type(value).__name__))
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(message(op, argument, f"must have one of the dtypes {names}", value.dtype))
    if value.layout is not torch.strided:
        raise TypeError(message(op, argument, "must be a dense tensor; `to_dense()` makes one", value.layout))


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
    if not isinstance(value, str) or value not in options:
        raise ValueError(message(op, argument, f"must be one of {', '.join(map(repr, options))}", repr(value)))


def flag(op: str, argument: str, value: object) -> bool:
    """`value` as True or False; 0 and 1, numpy's and a tensor of one count too."""
    if value is True or value is False:
        return value
    plain = _item_of(op, argument, value)
    if not isinstance(plain, int) or plain not in (0, 1):
        raise TypeError(message(op, argument, "must be True or False", type(value).__name__))
    return bool(plain)


def number(
    op: str,
    argument: str,
    value: object,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    exclusive: bool = False,
    integer: bool = False,
    dtype: torch.dtype | None = None,
) -> Any:
    """`value` as a float, or as an int if `integer`: a number in [minimum, maximum], or in (minimum, maximum] if
    `exclusive`. numpy's numbers are taken, and tensors of one number, which the host reads.

    For arithmetic in fp32, the `dtype`, a number beyond its range is infinite, as it is to every kernel.
    """
    kind = type(value)
    if kind is not float and kind is not int:
        value = _real(op, argument, value, integer)
    elif integer and kind is float:
        raise TypeError(message(op, argument, "must be an integer", kind.__name__))
    found: Any = value
    if integer:
        if type(found) is int and not -(1 << 63) <= found < 1 << 63:
            raise ValueError(message(op, argument, "must be an integer of 64 bits", found))
    else:
        try:
            found = float(found)
        except OverflowError:
            raise ValueError(message(op, argument, "must lie within the range of a float", value)) from None
        if found != found:
            raise ValueError(message(op, argument, "must not be NaN", found))
    if minimum is not None and (found < minimum or (exclusive and found == minimum)):
        raise ValueError(message(op, argument, f"must be {'>' if exclusive else '>='} {minimum}", found))
    if maximum is not None and found > maximum:
        raise ValueError(message(op, argument, f"must be <= {maximum}", found))
    if dtype is torch.float32 and not -LARGEST <= found <= LARGEST:
        found = math.copysign(math.inf, found)
    return found


def parameter(module: object, argument: str, value: Any) -> Any:
    """A number that a module keeps, as Python has it; a tensor, which may be learned, stays one."""
    kept = type(value) in (int, float) or isinstance(value, Tensor)
    return value if kept else number(type(module).__name__, argument, value)


def _item_of(op: str, argument: str, value: Any) -> Any:
    """What a tensor or an array of one number holds, as Python has it; anything else as it is."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(message(op, argument, "must hold one number", list(value.shape)))
        if value.is_meta:
            raise ValueError(message(op, argument, "must be on a device with memory", value.device))
        return value.detach().item()
    # An array or a scalar of numpy, which need not be installed.
    if hasattr(value, "__array__") and hasattr(value, "item"):
        if value.size != 1:
            raise ValueError(message(op, argument, "must hold one number", list(value.shape)))
        return value.item()
    return value


def _real(op: str, argument: str, value: Any, integer: bool) -> Any:
    """`value`, which is neither int nor float, as one of them, or as a symbol that stands for one."""
    if isinstance(value, torch.SymInt) or (isinstance(value, torch.SymFloat) and not integer):
        return value
    plain = _item_of(op, argument, value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Integral if integer else numbers.Real):
        kind = "an integer" if integer else "a number"
        raise TypeError(message(op, argument, f"must be {kind}", type(value).__name__))
    return int(plain) if isinstance(plain, numbers.Integral) else float(plain)
