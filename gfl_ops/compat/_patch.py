# SPDX-License-Identifier: Apache-2.0
"""Replacing parts of another package, so that all of it can be taken back."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch

_ABSENT = object()


class Change(NamedTuple):
    """`attribute` of `owner`, a class or a module, becomes `new`; `label` is what a user calls it.

    With `everywhere`, modules that have imported the old value by this name get the new one too. It has to be in no
    other place then, see `stand_in`, since every module that has it by this name gets the old one at the end.
    """

    label: str
    owner: Any
    attribute: str
    new: Any
    everywhere: bool = False


def graft(theirs: type, ours: type, attributes: Sequence[str] = ("forward",)) -> Iterator[Change]:
    """Changes that give a class of theirs some of ours, so that objects, subclasses and configs stay theirs."""
    for name in attributes:
        new, old = getattr(ours, name), getattr(theirs, name, None)
        if isinstance(new, types.FunctionType) and isinstance(old, types.FunctionType):
            new = stand_in(new, old)
        yield Change(f"{theirs.__module__}.{theirs.__qualname__}", theirs, name, new)


def exporting() -> bool:
    """Whether a graph is being taken for another runtime, which knows nothing of our operators."""
    # torch 2.6 has not all of them.
    compiler = getattr(torch.compiler, "is_exporting", None)
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or bool(compiler and compiler())


def stand_in(ours: Callable[..., Any], theirs: types.FunctionType) -> types.FunctionType:
    """A function in the place of `theirs` that calls `ours`, but for exporters and for torch.jit, which get theirs."""
    for_export = exporting

    def call(*arguments: Any, **named: Any) -> Any:
        return (theirs if for_export() else ours)(*arguments, **named)

    # torch.jit reads the source of what is wrapped, and looks its names up in these globals.
    new = types.FunctionType(call.__code__, theirs.__globals__, theirs.__name__, None, call.__closure__)
    functools.update_wrapper(new, theirs)
    new.__prepare_scriptable__ = lambda: theirs  # type: ignore[attr-defined]
    return new


def holders(name: str, value: object) -> list[Any]:
    """The modules imported so far in which `name` is `value`."""
    return [m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get(name, _ABSENT) is value]


class Replaced(list[str]):
    """What a call of ``patch()`` finds replaced, by name. As a context manager, takes back at its end what it did."""

    def __init__(self, names: Iterable[str], undo: Callable[[], object]) -> None:
        super().__init__(names)
        self.undo = undo

    def __enter__(self) -> Replaced:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


class Patch:
    """A set of changes that is made and taken back as a whole.

    Args:
        plan: gives the changes; called by `apply`, so that the other package is imported only then.
    """

    def __init__(self, plan: Callable[[], Iterable[Change]]) -> None:
        self._plan = plan
        self._names: list[str] = []
        self._done: list[tuple[Change, object]] = []

    def apply(self) -> Replaced:
        """Make the changes, unless they are made already. An error leaves none of them."""
        if self._done:
            return Replaced(self._names, lambda: None)
        try:
            for change in self._plan():
                self._make(change)
        except BaseException:
            self.remove()
            raise
        self._names = list(dict.fromkeys(change.label for change, _ in self._done))
        return Replaced(self._names, self.remove)

    def _make(self, change: Change) -> None:
        old = vars(change.owner).get(change.attribute, _ABSENT)
        if change.everywhere:
            for module in holders(change.attribute, old):
                setattr(module, change.attribute, change.new)
        setattr(change.owner, change.attribute, change.new)
        self._done.append((change, old))

    def remove(self) -> list[str]:
        """Take the changes back, those of modules imported since too. Returns their names; none, if there were none."""
        names, self._names = self._names, []
        while self._done:
            change, old = self._done.pop()
            owners = holders(change.attribute, change.new) if change.everywhere else []
            for owner in [change.owner, *(o for o in owners if o is not change.owner)]:
                if old is _ABSENT:
                    delattr(owner, change.attribute)
                else:
                    setattr(owner, change.attribute, old)
        return names
