# SPDX-License-Identifier: Apache-2.0
"""Every public function; each is written and documented beside its operator in `gfl_ops.ops`."""

from .ops.postprocess import Detections, postprocess
from .ops.qfl import quality_focal_loss

__all__ = [
    "Detections",
    "postprocess",
    "quality_focal_loss",
]
