# SPDX-License-Identifier: Apache-2.0
"""What a program may do during a training: log elsewhere, watch, raise to end it."""

from __future__ import annotations

from collections.abc import Mapping


class Callback:
    """Told of a training's progress, in the process that writes; each method does nothing unless overridden.

    An error that a method raises ends the training, which can be resumed from its last checkpoint.
    """

    def on_step(self, step: int, figures: Mapping[str, float]) -> None:
        """After each line of the log: steps done, and the columns of ``steps.csv``, means since the last line."""

    def on_epoch(self, epoch: int) -> None:
        """After the checkpoint of an epoch: epochs done."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """After an evaluation and its checkpoint: steps done, and what `evaluate` measured."""
