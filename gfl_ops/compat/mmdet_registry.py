# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-not-found,import-untyped"
"""Ours under names of their own in mmdet's registries, for configs that choose part by part.

``custom_imports = dict(imports=["gfl_ops.compat.mmdet_registry"])``, then for instance
``loss_cls=dict(type="FusedQualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0)``. The names are those of
mmdet after "Fused": of the losses, of ATSSAssigner and of GFLHead, whose predictions and integral are ours.

Importing this imports mmdet.
"""

from __future__ import annotations

from typing import Any

from mmdet.models.dense_heads import GFLHead
from mmdet.models.task_modules.assigners import ATSSAssigner, TaskAlignedAssigner
from mmdet.registry import MODELS, TASK_UTILS

from .. import losses
from ._task_aligned import mmdet_assign
from .mmdet import assign_by, predict_by

PREFIX = "Fused"


class FusedATSSAssigner(ATSSAssigner):
    """mmdet's ATSSAssigner with its `assign` served by `gfl_ops.atss_assign`."""

    assign = assign_by(ATSSAssigner.assign)


class FusedTaskAlignedAssigner(TaskAlignedAssigner):
    """mmdet's TaskAlignedAssigner with its `assign` served by `gfl_ops.task_aligned_assign`."""

    assign = mmdet_assign(TaskAlignedAssigner.assign)


class FusedGFLHead(GFLHead):
    """mmdet's GFLHead, its integral and its predictions served by ours; losses are as the config names them."""

    predict_by_feat = predict_by(GFLHead.predict_by_feat, GFLHead._predict_by_feat_single)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.integral = losses.Integral(self.reg_max)


for _name in losses.__all__:
    if _name != "Integral":
        MODELS.register_module(name=PREFIX + _name, module=getattr(losses, _name))
MODELS.register_module(module=FusedGFLHead)
for _assigner in (FusedATSSAssigner, FusedTaskAlignedAssigner):
    TASK_UTILS.register_module(module=_assigner)
