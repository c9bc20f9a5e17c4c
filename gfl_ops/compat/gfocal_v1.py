# SPDX-License-Identifier: Apache-2.0
"""The authors' first code (github.com/implus/GFocal, on mmdet 1): its losses, geometry and top-k.

Labels are 1 to C there and 0 is the background, the score is an argument of its own, and QFL has no sum over the
classes, so that a mean is one over N·C. Boxes name their last pixel: `postprocess` and `atss_assign` take the arguments
of `gfl_ops`, with ``legacy=True`` and, for `postprocess`, ``topk_mode="anchor"`` set.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .. import functional
from ..core import checks
from ..core.reduction import AVG_FACTOR_EPS
from ..losses import DistributionFocalLoss, GIoULoss, Integral

__all__ = [
    "DistributionFocalLoss",
    "GIoULoss",
    "Integral",
    "QualityFocalLoss",
    "atss_assign",
    "postprocess",
    "quality_focal_loss",
]

postprocess = functools.partial(functional.postprocess, legacy=True, topk_mode="anchor")
atss_assign = functools.partial(functional.atss_assign, legacy=True)


def quality_focal_loss(
    pred: Tensor,
    label: Tensor,
    score: Tensor,
    weight: Tensor | None = None,
    beta: float = 2.0,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    r"""Quality focal loss (arXiv 2006.04388, eq. 2) of every class by itself.

    .. math:: L(x_c, t_c) = |t_c - \sigma(x_c)|^\beta \; \mathrm{BCE}(\sigma(x_c), t_c)

    Args:
        pred: floating ``[N, C]``, logits.
        label: integer ``[N]``, 0 for background, 1 to C for class 0 to C − 1 of `pred`.
        score: floating ``[N]``, the target at the label.
        weight: ``[N, C]``, or ``[N, 1]``.
        beta: exponent of the modulating factor, >= 0. (Theirs has no absolute value: the same for 2.)
        reduction: "none", "mean" or "sum".
        avg_factor: with "mean", the sum is divided by ``avg_factor + 1.19e-07`` instead of by N·C.

    Returns:
        ``[N, C]`` for "none", else a scalar; fp32, or fp64 for fp64 `pred`. The gradient reaches `pred`, `score` and
        `weight`.

    Raises:
        TypeError, ValueError: as `gfl_ops.quality_focal_loss`.
    """
    op = "compat.gfocal_v1.quality_focal_loss"
    checks.tensor(op, "pred", pred)
    checks.shape(op, "pred", pred, "[N, C]", (None, None))
    checks.tensor(op, "label", label, checks.INTEGER)
    checks.choice(op, "reduction", reduction, checks.REDUCTIONS)
    if reduction == "sum" and avg_factor is not None:
        raise ValueError('avg_factor can not be used with reduction="sum"')
    n, classes = pred.shape
    if weight is not None and weight.shape not in ((n, classes), (n, 1)):
        rule = f"must have shape [N, C] = [{n}, {classes}] or [N, 1]"
        raise ValueError(checks.message(op, "weight", rule, list(weight.shape)))
    if reduction == "none" or (weight is not None and weight.shape[1] != 1):
        # One class a row: its own sum.
        here = label.long()[:, None] == torch.arange(1, classes + 1, device=pred.device)
        dense = torch.where(here, score[:, None], 0.0)
        loss = functional.quality_focal_loss(
            pred.reshape(-1, 1), dense.reshape(-1, 1), beta=beta, reduction="none"
        ).reshape(n, classes)
        loss = loss if weight is None else loss * weight
        if reduction == "none":
            return loss
        total = loss.sum()
    else:
        rows = None if weight is None else weight[:, 0]
        total = functional.quality_focal_loss(pred, (label.long() - 1, score), rows, beta=beta, reduction="sum")
    if reduction == "sum":
        return total
    return total / (n * classes if avg_factor is None else avg_factor + AVG_FACTOR_EPS)


class QualityFocalLoss(nn.Module):
    """`quality_focal_loss` as a module.

    Args:
        use_sigmoid: True; theirs refuses anything else, and so does this.
        beta: exponent of the modulating factor, >= 0.
        reduction: "none", "mean" or "sum".
        loss_weight: factor of the result.
    """

    def __init__(
        self, use_sigmoid: bool = True, beta: float = 2.0, reduction: str = "mean", loss_weight: float = 1.0
    ) -> None:
        super().__init__()
        if use_sigmoid is not True:
            raise NotImplementedError(checks.message(type(self).__name__, "use_sigmoid", "must be True", use_sigmoid))
        self.use_sigmoid = use_sigmoid
        self.beta = beta
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        score: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Loss of `pred` ``[N, C]`` against the labels `target` ``[N]``, 0 for background, and `score` ``[N]``."""
        reduction = reduction_override or self.reduction
        return self.loss_weight * quality_focal_loss(pred, target, score, weight, self.beta, reduction, avg_factor)
