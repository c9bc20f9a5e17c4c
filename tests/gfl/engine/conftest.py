# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CUDA graphs where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor


class Recording:
    """What a CUDA graph does, on the CPU: inputs have fixed places, and other shapes don't fit."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self.function, self.inputs = function, [x.clone() for x in inputs]

    def __call__(self, *inputs: Tensor) -> Any:
        for mine, given in zip(self.inputs, inputs, strict=True):
            assert mine.shape == given.shape
            mine.copy_(given)
        return self.function(*self.inputs)


@pytest.fixture
def recording() -> type[Recording]:
    return Recording
