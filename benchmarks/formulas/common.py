# SPDX-License-Identifier: Apache-2.0
"""Widening and averaging, which every family's forms share."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN_EPS = 1.1920929e-07


def widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def average(loss: Tensor, weight: Tensor | None, avg_factor: Tensor | float) -> Tensor:
    return (loss if weight is None else loss * weight).sum() / (avg_factor + MEAN_EPS)
