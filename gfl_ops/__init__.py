# SPDX-License-Identifier: Apache-2.0
"""Fused losses, decoding, assignment and NMS of Generalized Focal Loss (arXiv 2006.04388) for PyTorch detectors."""

from .core.backends import get_backend, set_backend
from .doctor import explain_backend
from .functional import *  # noqa: F403
from .functional import __all__ as _functions
from .kernel_check import self_check
from .losses import *  # noqa: F403
from .losses import __all__ as _modules

__all__ = ["explain_backend", "get_backend", "self_check", "set_backend", *_functions, *_modules]
