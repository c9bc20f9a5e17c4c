# SPDX-License-Identifier: Apache-2.0
"""Losses of the overlap of aligned boxes: 1 − IoU, GIoU, DIoU and CIoU."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator, as_dtype, clamp_passing_grad, device_type
from ...core.random_inputs import boxes, normal
from ...core.reduction import check_reduction, reduce_loss
from ...core.registry import OpSpec, Sample, register
from . import box_ops

KINDS = ("iou", "giou", "diou", "ciou")
# Beside the losses of KINDS: the IoU itself, for losses of it other than 1 − IoU, which a subtraction would round.
OVERLAP = len(KINDS)


def reference(pred: Tensor, target: Tensor, kind: int, eps: float) -> Tensor:
    """In fp32, or in fp64 for fp64 input; half a gradient where a max or min ties, a whole one at a bound."""
    p, t = pred.to(accumulator(pred.dtype)), target
    side = clamp_passing_grad(torch.minimum(p[:, 2:], t[:, 2:]) - torch.maximum(p[:, :2], t[:, :2]), 0.0, math.inf)
    outer = clamp_passing_grad(torch.maximum(p[:, 2:], t[:, 2:]) - torch.minimum(p[:, :2], t[:, :2]), 0.0, math.inf)
    p_size, t_size = p[:, 2:] - p[:, :2], t[:, 2:] - t[:, :2]
    overlap = side[:, 0] * side[:, 1]
    union = p_size[:, 0] * p_size[:, 1] + t_size[:, 0] * t_size[:, 1] - overlap
    smallest = union.new_full((), eps)

    if kind in (0, 1, OVERLAP):
        union = torch.maximum(union, smallest)
        iou = overlap / union
        if kind == OVERLAP:
            return iou
        if kind == 0:
            return 1 - iou
        enclosing = torch.maximum(outer[:, 0] * outer[:, 1], smallest)
        return 1 - (iou - (enclosing - union) / enclosing)

    iou = overlap / (union + eps)
    centre = (t[:, :2] + t[:, 2:]) - (p[:, :2] + p[:, 2:])
    penalty = (centre**2 / 4).sum(1) / ((outer**2).sum(1) + eps)
    if kind == 2:
        return 1 - (iou - penalty)
    angle = torch.atan(t_size[:, 0] / (t_size[:, 1] + eps)) - torch.atan(p_size[:, 0] / (p_size[:, 1] + eps))
    v = 4 / math.pi**2 * angle**2
    rest = (1 - iou + v).detach()
    # Equal boxes: their rounded IoU may be 1 and the quotient 0/0, which stands for no cost.
    alpha = torch.where((iou > 0.5) & (rest != 0), v / torch.where(rest == 0, 1.0, rest), 0.0).detach()
    return 1 - clamp_passing_grad(iou - (penalty + alpha * v), -1.0, 1.0)


def fake(pred: Tensor, target: Tensor, kind: int, eps: float) -> Tensor:
    return pred.new_empty(pred.shape[0], dtype=accumulator(pred.dtype))


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    acc = accumulator(dtype)
    for kind, name in enumerate((*KINDS, "overlap")):
        eps = 1e-7 if kind < OVERLAP else 1e-6
        for n in (0, 1, 7, 129, 2049):
            # Around the target, as a trained head's boxes are.
            target = boxes(n, device, acc, generator)
            size = target[:, 2:] - target[:, :2]
            near = target + normal((n, 4), device, acc, generator, 0.2) * torch.cat([size, size], 1)
            # CIoU's alpha, tied to a constant in the derivative where IoU > 1/2, is beyond numerical differences.
            near_id = f"near-tied-{name}" if name == "ciou" else f"near-{name}"
            yield Sample(f"{near_id}-n{n}", (near.to(dtype), target, kind, eps))
            if n == 7:
                # Drawn apart, they may meet: there CIoU has that alpha too.
                apart = boxes(n, device, dtype, generator)
                apart = torch.where(box_ops.aligned_iou(apart, target)[:, None] > 0.4, apart + 1000, apart)
                yield Sample(f"apart-{name}-n{n}", (apart, target, kind, eps))
                strides_id = f"strides-tied-{name}" if name == "ciou" else f"strides-{name}"
                small = torch.cat([near[:, :2] / 64, near[:, 2:] / 64], 1).to(dtype)
                yield Sample(f"{strides_id}-n{n}", (small, target / 64, kind, 1e-6))
                sides_first = apart.t().contiguous().t()
                yield Sample(f"strided-{name}-n{n}", (sides_first, target, kind, eps))
        # Equal, sharing sides, touching, one within the other, without area, points, turned round.
        special = [
            [[8, 8, 24, 40], [8, 8, 24, 40]], [[8, 8, 24, 40], [8, 8, 16, 40]], [[0, 0, 8, 8], [8, 0, 16, 8]],
            [[4, 4, 8, 8], [0, 0, 16, 16]], [[4, 4, 4, 8], [4, 4, 8, 8]], [[4, 4, 4, 4], [4, 4, 4, 4]],
            [[4, 4, 4, 4], [9, 9, 9, 9]], [[8, 8, 4, 4], [2, 2, 10, 10]], [[-8, -8, -4, -4], [-6, -7, 2, 2]],
        ]  # fmt: skip
        pairs = torch.tensor(special, device=device, dtype=acc)
        yield Sample(f"tie-{name}", (pairs[:, 0].to(dtype), pairs[:, 1], kind, eps))


IOU = register(
    OpSpec(
        stem="iou",
        schema="(Tensor pred, Tensor target, int kind, float eps) -> Tensor",
        reference=reference,
        fake=fake,
        samples=samples,
        summary="1 − IoU, GIoU, DIoU or CIoU of aligned boxes",
        public=("box_iou_loss", "giou_loss"),
        differentiable=("pred", "target"),
    )
)


def pairs(op: str, pred: Tensor, target: Tensor, kind: int, eps: float) -> Tensor:
    """Loss of each pair in the accumulator's dtype, after the checks."""
    checks.tensor(op, "pred", pred)
    checks.shape(op, "pred", pred, "[N, 4]", (None, 4))
    checks.tensor(op, "target", target)
    checks.shape(op, "target", target, "[N, 4]", pred.shape)
    checks.same_device(op, "target", target, "pred", pred)
    checks.number(op, "eps", eps, 0)
    return IOU(device_type(pred), pred, as_dtype(target, accumulator(pred.dtype)), kind, float(eps))


def box_iou_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    kind: str = "giou",
    eps: float = 1e-7,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    r"""Loss of predicted boxes against aligned target boxes: one minus their IoU, GIoU, DIoU or CIoU.

    .. math:: L = 1 - \frac{I}{U}
        \;\; [\, + \frac{E - U}{E} \,]_{\mathrm{giou}}
        \;\; [\, + \frac{\rho^2}{c^2} \,]_{\mathrm{diou, ciou}}
        \;\; [\, + \frac{v}{1 - I/U + v} v \,]_{\mathrm{ciou},\, I/U > 1/2}

    with I, U, E the areas of overlap, union and enclosing box, c its diagonal, ρ the distance of the centres and
    :math:`v = \frac{4}{\pi^2} (\arctan \frac{w_t}{h_t} - \arctan \frac{w_p}{h_p})^2`: Rezatofighi et al., CVPR 2019
    (arXiv 1902.09630); Zheng et al., AAAI 2020 (arXiv 1911.08287, eq. 7) and TCYB 2022 (arXiv 2005.03572).

    Args:
        pred: fp32, fp16, bf16 or fp64 ``[N, 4]``, boxes xyxy, in any unit of length.
        target: floating ``[N, 4]``, in the same unit.
        weight: ``[N]``, multiplies the loss of each pair.
        kind: "iou", "giou", "diou" or "ciou".
        eps: >= 0. For "iou" and "giou" the least area of union and enclosing box; for "diou" and "ciou" added to the
            area of the union, to c² and to the heights under the arctangent.
        reduction: "none", "mean" or "sum".
        avg_factor: with "mean", the sum is divided by ``avg_factor + 1.19e-07`` instead of by N. A number, or a tensor
            of one element, which is not read by the host.

    Returns:
        ``[N]`` for "none", else a scalar; fp32, or fp64 for fp64 `pred`.

    The gradient reaches `pred`, `target` and `weight`, the factor of CIoU's last v excepted, which is constant in it.
    Where sides of the two boxes coincide, each takes half. With ``eps > 0`` boxes without area have finite losses and
    gradients.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device, kind, reduction or number outside the above; an `avg_factor` with "sum".

    Note:
        Arithmetic in fp32 (fp64 for fp64), whatever autocast says. Repeatable bit for bit. N = 0 gives 0 for "sum" and
        with an `avg_factor`, still attached to the graph, and NaN for a plain mean. Differs from mmdet's in that empty
        input stays attached to the graph there only in DIoU and CIoU, and that CIoU of equal boxes is 0, where there it
        is NaN as soon as eps is lost in rounding.
    """
    op = "box_iou_loss"
    checks.choice(op, "kind", kind, KINDS)
    loss = pairs(op, pred, target, KINDS.index(kind), eps)
    check_reduction(op, pred.shape[:1], "[N]", pred, weight, reduction, avg_factor)
    return reduce_loss(loss, weight, reduction, avg_factor)


def giou_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-7,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    """Generalized IoU loss: `box_iou_loss` with ``kind="giou"``.

    Args:
        pred, target, weight, eps, reduction, avg_factor: as there.

    Returns:
        ``[N]`` for "none", else a scalar; fp32, or fp64 for fp64 `pred`.

    Raises:
        TypeError, ValueError: as there.
    """
    return box_iou_loss(pred, target, weight, "giou", eps, reduction, avg_factor)
