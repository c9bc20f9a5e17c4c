# SPDX-License-Identifier: Apache-2.0
"""D-FINE (Peng et al., arXiv 2410.13842; github.com/Peterande/D-FINE): fine-grained localisation with non-uniform bins.

`weighting_function`, `translate_gt`, `bbox2distance`, `distance2bbox` and `unimodal_distribution_focal_loss` take and
give what those of its code do. The two losses of its ``loss_local`` are `unimodal_distribution_focal_loss` (FGL) and
`decoupled_distillation_loss` (DDF).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.dtypes import accumulator
from ..functional import distillation_loss, distribution_focal_loss

__all__ = [
    "bbox2distance",
    "decoupled_distillation_loss",
    "distance2bbox",
    "translate_gt",
    "unimodal_distribution_focal_loss",
    "weighting_function",
]


def weighting_function(reg_max: int, up: Tensor, reg_scale: Tensor | float, deploy: bool = False) -> Tensor:
    r"""Offsets that the bins stand for, dense around 0 and sparse at both ends (section 4.1 of arXiv 2410.13842).

    .. math:: W(n) = \pm (\gamma^{|n - R/2|} - 1), \;\; \gamma = (a c + 1)^{2 / (R - 2)}, \;\; W(0) = -2ac = -W(R)

    with a = |up| and c = |reg_scale|.

    Args:
        reg_max: R, even, at least 4; 32 in the paper.
        up: ``[1]``, bound of the offsets in box sizes.
        reg_scale: curvature.
        deploy: as constants, without a gradient.

    Returns:
        ``[R + 1]``, rising, in up's dtype. The gradient reaches `up` and `reg_scale`.

    Raises:
        ValueError: `reg_max` odd or below 4.
    """
    reg_max, scale = _bins(reg_max), _curvature(reg_scale)
    if deploy:
        up, scale = up.detach(), scale.detach() if isinstance(scale, Tensor) else scale
    bound = up.reshape(-1)[:1].abs() * scale
    power = torch.arange(1, reg_max // 2, device=up.device, dtype=up.dtype)
    right = (bound + 1) ** (2 / (reg_max - 2) * power) - 1
    return torch.cat([-2 * bound, -right.flip(0), torch.zeros_like(bound), right, 2 * bound])


def _bins(reg_max: Any) -> int:
    found = checks.number("compat.dfine", "reg_max", reg_max, integer=True)
    if found < 4 or found % 2:
        raise ValueError(checks.message("compat.dfine", "reg_max", "must be even and at least 4", found))
    return int(found)


def _curvature(reg_scale: Any) -> Any:
    """Its magnitude; a tensor, which may be learned, stays one."""
    return abs(reg_scale if isinstance(reg_scale, Tensor) else checks.number("compat.dfine", "reg_scale", reg_scale))


def translate_gt(gt: Tensor, reg_max: int, reg_scale: Tensor | float, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets as a left bin and the weights of it and the next.

    Args:
        gt: offsets, of any shape, M of them.
        reg_max, reg_scale, up: as of `weighting_function`.

    Returns:
        (left bin as a float, weight of the right bin, weight of the left bin), each ``[M]``. Offsets beyond the first
        or last bin get its whole weight; the left bin is R − 0.1 beyond the last, as theirs. No gradient.
    """
    reg_max = _bins(reg_max)
    gt = gt.detach().reshape(-1)
    values = weighting_function(reg_max, up, reg_scale).detach()
    left = torch.searchsorted(values, gt.to(values.dtype), right=True) - 1
    inner = left.clamp(0, reg_max - 1)
    below, above = (gt - values[inner]).abs(), (values[inner + 1] - gt).abs()
    weight_right = below / (below + above)
    weight_right = torch.where(left < 0, 0.0, torch.where(left >= reg_max, 1.0, weight_right))
    position = torch.where(left >= reg_max, reg_max - 0.1, left.clamp(min=0).to(values.dtype))
    return position, weight_right, 1 - weight_right


def bbox2distance(
    points: Tensor, bbox: Tensor, reg_max: int, reg_scale: Tensor | float, up: Tensor, eps: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes as bins around reference boxes: the targets of FGL.

    Args:
        points: ``[N, 4]`` reference boxes x, y, w, h, x and y the centre.
        bbox: ``[N, 4]`` xyxy.
        reg_max, reg_scale, up: as of `weighting_function`.
        eps: the left bin is at most R − eps.

    Returns:
        As `translate_gt`, each ``[4N]``, sides l, t, r, b of a box together.
    """
    reg_max, scale = _bins(reg_max), _curvature(reg_scale)
    eps = checks.number("compat.dfine.bbox2distance", "eps", eps)
    unit = points[:, 2:] / scale + 1e-16
    sides = torch.cat([(points[:, :2] - bbox[:, :2]) / unit, (bbox[:, 2:] - points[:, :2]) / unit], 1) - 0.5 * scale
    left, weight_right, weight_left = translate_gt(sides, reg_max, reg_scale, up)
    return left.clamp(0, reg_max - eps), weight_right, weight_left


def distance2bbox(points: Tensor, distance: Tensor, reg_scale: Tensor | float) -> Tensor:
    """Boxes from reference boxes and offsets, the inverse of the above.

    Args:
        points: ``[…, 4]`` reference boxes x, y, w, h.
        distance: ``[…, 4]`` offsets of the sides l, t, r, b.
        reg_scale: curvature.

    Returns:
        ``[…, 4]`` boxes x, y, w, h, x and y the centre. The gradient reaches all.
    """
    scale = _curvature(reg_scale)
    side = (0.5 * scale + distance) * (points[..., 2:] / scale).repeat_interleave(2, -1)[..., [0, 2, 1, 3]]
    low, high = points[..., :2] - side[..., :2], points[..., :2] + side[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def unimodal_distribution_focal_loss(
    pred: Tensor,
    label: Tensor,
    weight_right: Tensor,
    weight_left: Tensor,
    weight: Tensor | None = None,
    reduction: str = "sum",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    r"""Fine-grained localisation loss (FGL, section 4.1 of arXiv 2410.13842): two weighted cross entropies.

    .. math:: L = w \, (w_l \, \mathrm{CE}(x, l) + w_r \, \mathrm{CE}(x, l + 1))

    Args:
        pred: floating ``[M, R+1]``, logits.
        label: ``[M]``, the left bin, of which the whole part counts.
        weight_right, weight_left: ``[M]``.
        weight: ``[M]``, the IoU of the box.
        reduction: "none", "mean" or "sum".
        avg_factor: divides the sum, whatever `reduction` says.

    Returns:
        ``[M]`` for "none", else a scalar; fp32, or fp64 for fp64 `pred`. The gradient reaches `pred` and the weights.

    Raises:
        TypeError, ValueError, NotImplementedError: as `gfl_ops.distribution_focal_loss`.
    """
    target = (label.long(), weight_left.reshape(-1), weight_right.reshape(-1))
    if avg_factor is None:
        return distribution_focal_loss(pred, target, weight, reduction=reduction)
    if not isinstance(avg_factor, Tensor):
        avg_factor = checks.number("compat.dfine.unimodal_distribution_focal_loss", "avg_factor", avg_factor)
    return distribution_focal_loss(pred, target, weight, reduction="sum") / avg_factor


def decoupled_distillation_loss(
    pred: Tensor,
    teacher: Tensor,
    weight: Tensor,
    matched: Tensor,
    temperature: float = 5.0,
    counts: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""Decoupled distillation focal loss (DDF, section 4.2 of arXiv 2410.13842) of one layer by the last.

    .. math:: L = \frac{\sqrt{N_+} \, \overline{w T^2 \mathrm{KL}}_+ + \sqrt{N_-} \, \overline{w T^2 \mathrm{KL}}_-}
        {\sqrt{N_+} + \sqrt{N_-}}

    the bars being means over the matched (+) and the unmatched rows (−), KL that of ``softmax(teacher/T)`` to
    ``softmax(pred/T)``.

    Args:
        pred: floating ``[M, R+1]``, logits.
        teacher: floating ``[M, R+1]``, logits; without gradient.
        weight: ``[M]``: the IoU of a matched row, the score of an unmatched one.
        matched: bool ``[M]``.
        temperature: T, above 0.
        counts: N₊ and N₋, where they are not those of `matched` (theirs keeps the last layer's for the denoising
            queries).

    Returns:
        A scalar, fp32, or fp64 for fp64 `pred`; 0, attached to the graph, for M = 0. The gradient reaches `pred` and
        `weight`. Nothing is read by the host.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape or number outside the above.
    """
    op = "compat.dfine.decoupled_distillation_loss"
    checks.tensor(op, "pred", pred)
    checks.shape(op, "pred", pred, "[M, R+1]", (None, None))
    checks.tensor(op, "matched", matched, (torch.bool,))
    checks.shape(op, "matched", matched, "[M]", (pred.shape[0],))
    acc = accumulator(pred.dtype)
    # A sum over the bins, where distillation_loss has their mean.
    rows = distillation_loss(pred, teacher, weight, temperature, "none") * pred.shape[1]
    parts = (matched.to(acc), (~matched).to(acc))
    # Not rows[matched].mean(), whose size the host would wait for.
    means = [(rows * part).sum() / part.sum().clamp(min=1) for part in parts]
    roots = [n.to(acc).sqrt() for n in (counts or [part.sum() for part in parts])]
    total = roots[0] + roots[1]
    return (means[0] * roots[0] + means[1] * roots[1]) / torch.where(total > 0, total, 1.0)
