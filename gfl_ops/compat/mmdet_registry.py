# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-not-found,import-untyped"
"""Ours under names of their own in mmdet's registries, for configs that choose part by part.

``custom_imports = dict(imports=["gfl_ops.compat.mmdet_registry"])``, then for instance
``loss_cls=dict(type="FusedQualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0)``. The names are those of
mmdet after "Fused": of the losses, of GFLHead, whose predictions and integral are ours, and of the assigners
ATSSAssigner, TaskAlignedAssigner, DynamicSoftLabelAssigner and SimOTAAssigner. Where mmyolo is installed, its registry
has its BatchTaskAlignedAssigner and BatchDynamicSoftLabelAssigner so.

Importing this imports mmdet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmdet.models.dense_heads import GFLHead
from mmdet.models.task_modules import assigners
from mmdet.registry import MODELS, TASK_UTILS

from .. import losses
from .mmdet import ASSIGNERS, BATCH_ASSIGNERS, mmyolo_assigners, predict_by

PREFIX = "Fused"


class FusedGFLHead(GFLHead):
    """mmdet's GFLHead, its integral and its predictions served by ours; losses are as the config names them."""

    predict_by_feat = predict_by(GFLHead.predict_by_feat, GFLHead._predict_by_feat_single)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.integral = losses.Integral(self.reg_max)


def _register(registry: Any, theirs: Any, method: str, by: Callable[[Any], Any]) -> None:
    """A subclass of theirs whose `method` is ours, which falls back on theirs, under its name after the prefix."""
    name = PREFIX + theirs.__name__
    body = {method: by(getattr(theirs, method)), "__module__": __name__, "__doc__": theirs.__doc__}
    globals()[name] = type(name, (theirs,), body)
    registry.register_module(module=globals()[name])


def register_batch_assigners() -> None:
    """mmyolo's, where it is installed and takes the installed mmcv."""
    if theirs := mmyolo_assigners():
        from mmyolo.registry import TASK_UTILS as registry

        for name, by in BATCH_ASSIGNERS.items():
            _register(registry, getattr(theirs, name), "forward", by)


for _name in losses.__all__:
    if _name != "Integral":
        MODELS.register_module(name=PREFIX + _name, module=getattr(losses, _name))
MODELS.register_module(module=FusedGFLHead)
for _name, _by in ASSIGNERS.items():
    _register(TASK_UTILS, getattr(assigners, _name), "assign", _by)
register_batch_assigners()
