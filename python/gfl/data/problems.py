# SPDX-License-Identifier: Apache-2.0
"""What was wrong with data and what was done about it: in words, how often, and where for the first time."""

from __future__ import annotations

from collections import Counter
from typing import Any


class Problems(Counter[str]):
    """Counts by their texts; `first` has a place of each, where there is one to tell."""

    def __init__(self, *counts: Any) -> None:
        super().__init__(*counts)
        self.first: dict[str, str] = {}
        for other in counts:
            self.first |= getattr(other, "first", {})

    def note(self, what: str, where: object = "", times: int = 1) -> None:
        """Counts a problem so many times, the first of them at a place."""
        if times:
            if what not in self and str(where):
                self.first[what] = str(where)
            self[what] += times

    def add(self, other: Problems) -> None:
        """Takes over the counts of another."""
        for what, times in other.items():
            self.note(what, other.first.get(what, ""), times)

    def lines(self) -> list[str]:
        """A line each: count, text, the first place."""
        places = {what: f" (first: {self.first[what]})" if what in self.first else "" for what in self}
        return [f"{times} {what}{places[what]}" for what, times in self.items() if times]

    def __reduce__(self) -> tuple[Any, ...]:
        # Counter's own would lose the places on the way to a worker process.
        return Problems, (dict(self),), vars(self)
