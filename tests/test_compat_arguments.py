# SPDX-License-Identifier: Apache-2.0
"""Whatever form of an argument a replaced function takes, ours takes, with the same result: numbers of numpy and in
tensors, integers for floats, other dtypes, lists for tuples."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

import pytest
import torch
from argument_forms import Entry, Made, entries, find
from contract import tensors
from peers import mmdet_stub
from torch import Tensor

ENTRIES = list(entries())


def call(entry: Entry, function: Any, changed: str = "", value: Any = None) -> list[Tensor]:
    """The results with one argument replaced."""
    init, arguments = dict(entry.init or {}), dict(entry.call)
    if changed.startswith("init."):
        init[changed.removeprefix("init.")] = value
    elif "." in changed:
        name, key = changed.split(".")
        old = arguments[name]
        arguments[name] = Made(old.path, {**old.values, key: value}) if isinstance(old, Made) else {**old, key: value}
    elif changed:
        arguments[changed] = value
    if entry.init is not None:
        function = getattr(function(**{k: passed(a) for k, a in init.items()}), entry.method)
    copied = {k: passed(a) for k, a in arguments.items()}
    # An object by position, since a forward method may call its arguments otherwise.
    result = function(*copied.values()) if entry.init is not None else function(**copied)
    return [t for part in (result if isinstance(result, (list, tuple)) else [result]) for t in parts(part)]


def passed(value: Any) -> Any:
    """A value as it is given to a function: copied, since theirs may write to a target."""
    if isinstance(value, Made):
        inner = value.values
        return Made(
            value.path, {k: passed(v) for k, v in inner.items()} if isinstance(inner, dict) else passed(inner)
        )()
    return value.clone() if isinstance(value, Tensor) else value


def parts(result: Any) -> list[Tensor]:
    """The tensors of a result, also of one of mmdet's objects."""
    if hasattr(result, "gt_inds"):
        return [result.gt_inds, result.max_overlaps, result.labels]
    return tensors(list(result.values()) if hasattr(result, "all_keys") else result)


def assert_same(got: list[Tensor], want: list[Tensor], what: str, tolerance: float) -> None:
    for g, w in zip(got, want, strict=True):
        # A divisor of shape [1] makes theirs a loss of that shape.
        torch.testing.assert_close(
            g.double().reshape(w.shape),
            w.double(),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m: f"{what}: {m}",
        )


def plain(value: Any) -> Any:
    """The usual form of a number."""
    return value.item() if hasattr(value, "item") and (getattr(value, "ndim", 0) == 0 or value.size == 1) else value


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.ours is not None], ids=str)
def test_ours_takes_every_form(entry: Entry) -> None:
    ours = find(f"gfl_ops.{entry.ours}")
    usual = call(entry, ours)
    assert usual
    for argument, forms in entry.forms.items():
        for form, value in forms.items():
            got, what = call(entry, ours, argument, value), f"{entry}, `{argument}` as {form}"
            if not isinstance(value, Tensor) or value.dim() == 0:
                assert_same(got, call(entry, ours, argument, plain(value)), what, 1e-6)


@pytest.mark.peers
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.theirs is not None], ids=str)
def test_theirs_gives_the_same(entry: Entry) -> None:
    """Where the original takes a form, what stands in its place does, and gives what the original gives.

    What the original refuses is an error of the same class here, a named one, or taken.
    """
    pytest.importorskip(str(entry.theirs).split(".")[0])
    mmdet_stub.install()
    path = str(entry.theirs)
    forms = [(a, f, v) for a, forms in entry.forms.items() for f, v in forms.items()]
    wanted: dict[tuple[str, str], list[Tensor]] = {}
    refused: dict[tuple[str, str], type] = {}
    for argument, form, value in [("", "", None), *forms]:
        try:
            wanted[argument, form] = call(entry, find(path), argument, value)
        except Exception as error:  # whatever theirs raises
            refused[argument, form] = type(error)
    print(f"{path} refuses {refused}")
    assert ("", "") in wanted, refused
    if entry.patch is None:
        undo, ours = lambda: None, find(f"gfl_ops.{entry.ours}")
    else:
        module = importlib.import_module(f"gfl_ops.compat.{entry.patch}")
        module.patch()
        undo, ours = module.unpatch, find(path)
    try:
        for (argument, form), want in wanted.items():
            value = entry.forms[argument][form] if argument else None
            got = call(entry, ours, argument, value)
            half = any(w.dtype in (torch.float16, torch.bfloat16) for w in want)
            assert_same(got, want, f"{entry}, `{argument}` as {form}", 2e-2 if half else 1e-4)
        for (argument, form), theirs in refused.items():
            with suppress(theirs, TypeError, ValueError, NotImplementedError):
                call(entry, ours, argument, entry.forms[argument][form])
    finally:
        undo()
