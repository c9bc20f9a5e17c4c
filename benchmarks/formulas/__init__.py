# SPDX-License-Identifier: Apache-2.0
"""What people use today, in plain PyTorch after the definitions of mmdet 3.3.0: the providers "eager" and "compiled".

One file per family. A function has the name of its operator's stem and takes the public function's arguments;
``dense_<stem>`` is the form that torch.compile makes the most of: no nonzero, no indexed writes, one expression over
all elements. An operator without a form here is compared with its own reference. 16-bit logits are widened to fp32
first, as detectors do in mixed precision.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def find(family: str, stem: str) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """The eager and the dense form of an operator, None where there is none; the eager one may serve as both."""
    forms = importlib.import_module(f"{__name__}.{family}")
    eager = getattr(forms, stem, None)
    return eager, getattr(forms, f"dense_{stem}", eager)
