# SPDX-License-Identifier: Apache-2.0
"""The losses as modules that take the place of mmdet 3.3.0's: same constructors, calls, attributes and state dicts.

Every loss is called ``loss(pred, target, weight=None, avg_factor=None, reduction_override=None)``, computes in fp32
(fp64 for fp64 input) and is multiplied by `loss_weight`. Each class states the shapes; what else an input may be is
stated in the function of `gfl_ops` that it calls, and what differs from mmdet there and in the class's own note.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .core import checks
from .core.dtypes import accumulator
from .core.reduction import check_element_reduction, check_reduction, reduce_loss
from .ops.bins.dfl import distribution_focal_loss
from .ops.bins.integral import integral
from .ops.bins.ld import distillation_loss
from .ops.boxes.iou import box_iou_loss, pairs
from .ops.score.focal import focal_loss
from .ops.score.qfl import quality_focal_loss
from .ops.score.score_loss import Target
from .ops.score.vfl import varifocal_loss

_Weight = Tensor | None
_AvgFactor = float | Tensor | None

__all__ = [
    "CIoULoss",
    "DIoULoss",
    "DistributionFocalLoss",
    "EIoULoss",
    "FocalLoss",
    "GIoULoss",
    "Integral",
    "IoULoss",
    "KnowledgeDistillationKLDivLoss",
    "QualityFocalLoss",
    "SIoULoss",
    "VarifocalLoss",
]


class _Loss(nn.Module):
    """What all have in common: a reduction that a call may override, and a factor."""

    def __init__(self, reduction: str, loss_weight: float) -> None:
        super().__init__()
        checks.choice(type(self).__name__, "reduction", reduction, checks.REDUCTIONS)
        self.reduction = reduction
        self.loss_weight = checks.parameter(self, "loss_weight", loss_weight)

    def forward(
        self,
        pred: Tensor,
        target: Any,
        weight: _Weight = None,
        avg_factor: _AvgFactor = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """`loss_weight` times the loss; `reduction_override` takes the place of `reduction`. The class says shapes."""
        reduction = self.reduction
        if reduction_override:
            checks.choice(type(self).__name__, "reduction_override", reduction_override, checks.REDUCTIONS)
            reduction = reduction_override
        return self.loss_weight * self._loss(pred, target, weight, reduction, avg_factor)

    def _loss(self, pred: Tensor, target: Any, weight: _Weight, reduction: str, avg_factor: _AvgFactor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The attributes that a constructor takes."""
        constructors = [c.__init__ for c in type(self).__mro__ if issubclass(c, _Loss)]
        shown = {name for init in constructors for name in inspect.signature(init).parameters if name != "linear"}
        return ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if name in shown)


class QualityFocalLoss(_Loss):
    """Quality focal loss (arXiv 2006.04388, eq. 2) as a module; see `gfl_ops.quality_focal_loss`.

    `pred` is ``[N, C]``, against ``(label[N], score[N])`` or a dense target of its shape; weight ``[N]``.

    Args:
        use_sigmoid: `pred` holds logits. False, which mmdet refuses: it holds probabilities, as in GFLv2 and Paddle.
        beta: exponent of the modulating factor, >= 0.
        reduction: "none", "mean" or "sum".
        loss_weight: factor of the result.
        activated: `pred` holds probabilities; either this or ``use_sigmoid=False`` says so.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        beta: float = 2.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
    ) -> None:
        super().__init__(reduction, loss_weight)
        self.use_sigmoid = use_sigmoid
        self.beta = checks.parameter(self, "beta", beta)
        self.activated = activated

    def _loss(self, pred: Tensor, target: Target, weight: _Weight, reduction: str, avg_factor: _AvgFactor) -> Tensor:
        activated = self.activated or not self.use_sigmoid
        return quality_focal_loss(pred, target, weight, self.beta, reduction, avg_factor, activated)


class DistributionFocalLoss(_Loss):
    """Distribution focal loss (arXiv 2006.04388, eq. 6) as a module; see `gfl_ops.distribution_focal_loss`.

    The logits `pred` are ``[M, R+1]``, the positions `target` ``[M]`` in bins; weight ``[M]``.

    Args:
        reduction: "none", "mean" or "sum".
        loss_weight: factor of the result.

    Note:
        A target outside [0, R] counts as the nearest of the two and NaN as no loss; mmdet extrapolates below, and above
        fails with an index error or, on a GPU, a device assert.
    """

    def __init__(self, reduction: str = "mean", loss_weight: float = 1.0) -> None:
        super().__init__(reduction, loss_weight)

    def _loss(self, pred: Tensor, target: Any, weight: _Weight, reduction: str, avg_factor: _AvgFactor) -> Tensor:
        return distribution_focal_loss(pred, target, weight, reduction, avg_factor)


class _BoxLoss(_Loss):
    """A loss of the boxes `pred` ``[N, 4]`` against `target` ``[N, 4]``, both xyxy; weight ``[N]`` or ``[N, 4]``."""

    _kind = ""
    _options: tuple[str, ...] = ()  # attributes that are the kind's own arguments

    def __init__(self, eps: float = 1e-6, reduction: str = "mean", loss_weight: float = 1.0) -> None:
        super().__init__(reduction, loss_weight)
        self.eps = checks.parameter(self, "eps", eps)

    def _loss(self, pred: Tensor, target: Tensor, weight: _Weight, reduction: str, avg_factor: _AvgFactor) -> Tensor:
        checks.tensor(type(self).__name__, "pred", pred)
        if isinstance(weight, Tensor) and weight.dim() > 1:
            # mmdet also takes a weight per coordinate, and takes the mean of the four.
            if weight.shape != pred.shape:
                rule = f"must have shape [N] = {list(pred.shape[:1])} or pred's, {list(pred.shape)}"
                raise ValueError(checks.message(type(self).__name__, "weight", rule, list(weight.shape)))
            weight = weight.to(accumulator(pred.dtype)).mean(-1)
        # mmdet gives 0 for no pairs if there is a weight; if there is none NaN, torch's mean of nothing.
        if isinstance(weight, Tensor) and weight.numel() == 0 and reduction == "mean" and avg_factor is None:
            reduction = "sum"
        return self._pairs(pred, target, weight, reduction, avg_factor)

    def _pairs(self, pred: Tensor, target: Tensor, weight: _Weight, reduction: str, avg_factor: _AvgFactor) -> Tensor:
        options = {name: getattr(self, name) for name in self._options}
        return box_iou_loss(pred, target, weight, self._kind, self.eps, reduction, avg_factor, **options)


class GIoULoss(_BoxLoss):
    """1 − GIoU (arXiv 1902.09630) as a module; see `gfl_ops.box_iou_loss`.

    Args:
        eps: least area of union and enclosing box, >= 0.
        reduction: "none", "mean" or "sum".
        loss_weight: factor of the result.

    Note:
        If no weight is above 0, "none" still gives ``[N]``, where mmdet gives a scalar, having asked the host.
    """

    _kind = "giou"


class DIoULoss(_BoxLoss):
    """1 − DIoU (arXiv 1911.08287) as a module; see `gfl_ops.box_iou_loss`.

    Args:
        eps: added to the union's area and to the squared diagonal, >= 0.
        reduction: "none", "mean" or "sum".
        loss_weight: factor of the result.

    Note:
        If no weight is above 0, "none" still gives ``[N]``, where mmdet gives a scalar, having asked the host.
    """

    _kind = "diou"


class CIoULoss(_BoxLoss):
    """1 − CIoU (arXiv 2005.03572) as a module; see `gfl_ops.box_iou_loss`.

    Args:
        eps: added to the union's area, to the squared diagonal and to the heights, >= 0.
        reduction: "none", "mean" or "sum".
        loss_weight: factor of the result.

    Note:
        Equal boxes cost 0, where mmdet gives NaN as soon as eps is lost in rounding. If no weight is above 0, "none"
        still gives ``[N]``, where mmdet gives a scalar, having asked the host.
    """

    _kind = "ciou"


class EIoULoss(_BoxLoss):
    """The smoothed extended IoU loss that mmdet has under this name, as a module; see `gfl_ops.box_iou_loss`.

    Args:
        eps: added to the union's area, >= 0.
        reduction: "none", "mean" or "sum".
        loss_weight: factor of the result.
        smooth_point: the 1 − IoU below which the loss is quadratic, > 0.

    Note:
        If no weight is above 0, "none" still gives ``[N]``, where mmdet gives a scalar, having asked the host.
    """

    _kind, _options = "eiou", ("smooth_point",)

    def __init__(
        self, eps: float = 1e-6, reduction: str = "mean", loss_weight: float = 1.0, smooth_point: float = 0.1
    ) -> None:
        super().__init__(eps, reduction, loss_weight)
        self.smooth_point = smooth_point


class SIoULoss(_BoxLoss):
    """1 − SIoU (arXiv 2205.12740) as a module; see `gfl_ops.box_iou_loss`.

    Args:
        eps: added to the union's area, to distances and to sizes, and the least side of the enclosing box; >= 0.
        reduction: "none", "mean" or "sum".
        loss_weight: factor of the result.
        neg_gamma: the paper's sign of the distance cost's exponent; mmdet holds the other to be more stable.

    Note:
        eps is added to widths too, where mmdet adds it to heights alone and gives NaN for two widths of 0. If no weight
        is above 0, "none" still gives ``[N]``, where mmdet gives a scalar, having asked the host.
    """

    _kind, _options = "siou", ("neg_gamma",)

    def __init__(
        self, eps: float = 1e-6, reduction: str = "mean", loss_weight: float = 1.0, neg_gamma: bool = False
    ) -> None:
        super().__init__(eps, reduction, loss_weight)
        self.neg_gamma = neg_gamma


class IoULoss(_BoxLoss):
    """−log IoU, 1 − IoU or 1 − IoU² as a module; the logarithm by default, after UnitBox (arXiv 1608.01471).

    Args:
        linear: another, deprecated, way to say ``mode="linear"``.
        eps: least IoU, so that the logarithm is finite; boxes below it have no gradient.
        reduction: "none", "mean" or "sum".
        loss_weight: factor of the result.
        mode: "log", "linear" or "square".
    """

    # The least area of a union. Not `eps`, which bounds the IoU: mmdet leaves this one at its default.
    _AREA_EPS = 1e-6

    def __init__(
        self,
        linear: bool = False,
        eps: float = 1e-6,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        mode: str = "log",
    ) -> None:
        _Loss.__init__(self, reduction, loss_weight)
        checks.choice("IoULoss", "mode", mode, ("linear", "square", "log"))
        if linear:
            mode = "linear"
            warnings.warn("IoULoss: linear=True is deprecated; say mode='linear'", DeprecationWarning, stacklevel=2)
        self.mode = mode
        self.linear = linear
        self.eps = checks.parameter(self, "eps", eps)

    def _pairs(self, pred: Tensor, target: Tensor, weight: _Weight, reduction: str, avg_factor: _AvgFactor) -> Tensor:
        iou = pairs("IoULoss", pred, target, "overlap", self._AREA_EPS).clamp(min=self.eps)
        avg_factor = check_reduction("IoULoss", pred.shape[:1], "[N]", pred, weight, reduction, avg_factor)
        if self.mode == "linear":
            loss = 1 - iou
        elif self.mode == "square":
            loss = 1 - iou**2
        else:
            loss = -iou.log()
        return reduce_loss(loss, weight, reduction, avg_factor)


class VarifocalLoss(_Loss):
    """Varifocal loss (arXiv 2008.13367, eq. 2) as a module, without a sum over the classes; see
    `gfl_ops.varifocal_loss`.

    `pred` is ``[N, C]``, against `target` ``[N, C]``; weight ``[N, C]``, ``[N]`` or ``[N, 1]``.

    Args:
        use_sigmoid: `pred` holds logits. False, which mmdet refuses: it already holds probabilities.
        alpha: weight of the negatives, >= 0.
        gamma: exponent of the negatives' modulating factor, >= 0.
        iou_weighted: a positive counts by its target; else by 1.
        reduction: "none", "mean" (over N·C) or "sum".
        loss_weight: factor of the result.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        alpha: float = 0.75,
        gamma: float = 2.0,
        iou_weighted: bool = True,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(reduction, loss_weight)
        checks.number("VarifocalLoss", "alpha", alpha, 0)
        self.use_sigmoid = use_sigmoid
        self.alpha = checks.parameter(self, "alpha", alpha)
        self.gamma = checks.parameter(self, "gamma", gamma)
        self.iou_weighted = iou_weighted

    def _loss(self, pred: Tensor, target: Tensor, weight: _Weight, reduction: str, avg_factor: _AvgFactor) -> Tensor:
        options = (self.alpha, self.gamma, self.iou_weighted, reduction, avg_factor, not self.use_sigmoid)
        return varifocal_loss(pred, target, weight, *options)


class FocalLoss(_Loss):
    """Focal loss (arXiv 1708.02002, eq. 5) of labels or of a dense target, as a module, without a sum over the classes.

    `pred` is ``[N, C]``: logits, or probabilities in [0, 1] if `activated` or not `use_sigmoid`. `target` is an integer
    ``[N]``, where a label outside [0, C) is background (mmdet: C only), or ``[N, C]``, one-hot or soft. weight: ``[N]``
    or ``[N, 1]``, one per row; ``[N, C]``, or the same flat, one per element. With "mean" and an `avg_factor`, the sum
    is divided by ``avg_factor + 1.19e-07`` instead of by N·C.

    Args:
        use_sigmoid: `pred` holds logits. False, which mmdet refuses: it already holds probabilities.
        gamma: exponent of the modulating factor, >= 0.
        alpha: balance of positives against negatives in [0, 1]; −1 for none.
        reduction: "none", "mean" (over N·C) or "sum".
        loss_weight: factor of the result.
        activated: `pred` holds probabilities; either this or ``use_sigmoid=False`` says so.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: float = 0.25,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
    ) -> None:
        super().__init__(reduction, loss_weight)
        self.use_sigmoid = use_sigmoid
        self.gamma = gamma
        self.alpha = alpha
        self.activated = activated

    def _loss(self, pred: Tensor, target: Tensor, weight: _Weight, reduction: str, avg_factor: _AvgFactor) -> Tensor:
        op = "FocalLoss"
        checks.tensor(op, "pred", pred)
        if isinstance(target, Tensor) and target.dim() != pred.dim():
            checks.shape(op, "pred", pred, "[N, C]", (None, None))
            checks.tensor(op, "target", target, checks.INTEGER)
            checks.shape(op, "target", target, "[N]", (pred.shape[0],))
            checks.same_device(op, "target", target, "pred", pred)
            target = target[:, None] == torch.arange(pred.shape[1], device=pred.device)
        activated = self.activated or not self.use_sigmoid
        flat = isinstance(weight, Tensor) and weight.shape == (pred.numel(),) != pred.shape[:1]
        if weight is not None and flat:
            weight = weight.reshape(pred.shape)
        weight, avg_factor = check_element_reduction(op, pred, weight, reduction, avg_factor)
        scalars = (self.alpha, self.gamma, activated, weight, reduction, avg_factor)
        return focal_loss(op, ("pred", "target"), pred, target, *scalars)


class KnowledgeDistillationKLDivLoss(_Loss):
    """Distillation with a temperature (of a box's sides: arXiv 2102.12252); see `gfl_ops.distillation_loss`.

    `pred` ``[M, n]`` and the teacher's `soft_label` ``[M, n]`` are logits; weight ``[M]``.

    Args:
        reduction: "none", "mean" or "sum".
        loss_weight: factor of the result.
        T: temperature, above 0 (mmdet: 1 or more).
    """

    def __init__(self, reduction: str = "mean", loss_weight: float = 1.0, T: float = 10) -> None:
        super().__init__(reduction, loss_weight)
        checks.number("KnowledgeDistillationKLDivLoss", "T", T, 0, exclusive=True)
        self.T = checks.parameter(self, "T", T)

    def forward(
        self,
        pred: Tensor,
        soft_label: Tensor,
        weight: _Weight = None,
        avg_factor: _AvgFactor = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """`loss_weight` times the loss; `reduction_override` takes the place of `reduction`."""
        return _Loss.forward(self, pred, soft_label, weight, avg_factor, reduction_override)

    def _loss(self, pred: Tensor, target: Tensor, weight: _Weight, reduction: str, avg_factor: _AvgFactor) -> Tensor:
        return distillation_loss(pred, target, weight, self.T, reduction, avg_factor)


class Integral(nn.Module):
    r"""Distance that a distribution over bins expects, four sides a box; see `gfl_ops.integral`.

    .. math:: \hat y = \sum_{i=0}^{R} i \cdot \mathrm{softmax}(x)_i

    Equation 5 of Li et al., Generalized Focal Loss, NeurIPS 2020 (arXiv 2006.04388), with unit bins.

    Args:
        reg_max: R, the last bin.

    Note:
        The buffer `project` holds 0 … R, as mmdet's does in its checkpoints; the arithmetic knows them without it. The
        result is fp32 (fp64 for fp64), where mmdet's has the input's dtype.
    """

    project: Tensor

    def __init__(self, reg_max: int = 16) -> None:
        super().__init__()
        reg_max = self.reg_max = checks.number("Integral", "reg_max", reg_max, 1, integer=True)
        self.register_buffer("project", torch.linspace(0, reg_max, reg_max + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[…, 4(R+1)]``, or of any shape of as many, -> distances ``[-1, 4]`` in bins, order l, t, r, b."""
        checks.tensor("Integral", "x", x)
        width = 4 * (self.reg_max + 1)
        if x.numel() % width:
            rule = f"must hold a multiple of 4(R+1) = {width} logits"
            raise ValueError(checks.message("Integral", "x", rule, list(x.shape)))
        return integral(x.reshape(x.numel() // width, width), self.reg_max)

    def extra_repr(self) -> str:
        return f"reg_max={self.reg_max}"
