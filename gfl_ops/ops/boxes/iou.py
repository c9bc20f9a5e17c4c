# SPDX-License-Identifier: Apache-2.0
"""Losses of the overlap of aligned boxes: one minus their IoU, GIoU, DIoU, CIoU, EIoU, SIoU or MPDIoU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator, as_dtype, clamp_passing_grad, device_type
from ...core.random_inputs import boxes, normal
from ...core.reduction import check_reduction, reduce_loss
from ...core.registry import OpSpec, Sample, register
from . import box_ops

# (pairs, eps, the kind's own parameter) -> loss ``[N]``.
Formula = Callable[["Pair", float, float], Tensor]
# By the kind's name, the one that csrc/terms/iou.h gives it: the formula, and the parameter for samples.
_FORMULAS: dict[str, tuple[Formula, float]] = {}


def _kind(name: str, parameter: float = 0.0) -> Callable[[Formula], Formula]:
    def add(formula: Formula) -> Formula:
        _FORMULAS[name] = formula, parameter
        return formula

    return add


class Pair:
    """N pairs of boxes, in the pieces that the kinds are made of: ``[N, 2]`` each, along x and along y."""

    def __init__(self, pred: Tensor, target: Tensor) -> None:
        self.pred, self.target = pred.to(accumulator(pred.dtype)), target
        p, t = self.pred, self.target
        self.inner_low, self.inner_high = torch.maximum(p[:, :2], t[:, :2]), torch.minimum(p[:, 2:], t[:, 2:])
        self.outer_low, self.outer_high = torch.minimum(p[:, :2], t[:, :2]), torch.maximum(p[:, 2:], t[:, 2:])
        self.pred_size, self.target_size = p[:, 2:] - p[:, :2], t[:, 2:] - t[:, :2]
        self.centre_distance = (t[:, :2] + t[:, 2:]) - (p[:, :2] + p[:, 2:])  # doubled

    def outer(self, least: float = 0.0) -> Tensor:
        """Width and height of the enclosing box."""
        return clamp_passing_grad(self.outer_high - self.outer_low, least, math.inf)

    def overlap(self) -> Tensor:
        return _product(clamp_passing_grad(self.inner_high - self.inner_low, 0.0, math.inf))

    def union(self, overlap: Tensor) -> Tensor:
        return _product(self.pred_size) + _product(self.target_size) - overlap

    def iou(self, eps: float) -> Tensor:
        """With `eps` added to the area of the union."""
        overlap = self.overlap()
        return overlap / (self.union(overlap) + eps)


def _product(sides: Tensor) -> Tensor:
    return sides[:, 0] * sides[:, 1]


def _at_least(area: Tensor, eps: float) -> Tensor:
    return torch.maximum(area, area.new_full((), eps))


@_kind("overlap")
def _overlap(pair: Pair, eps: float, _: float) -> Tensor:
    """The IoU itself, for losses of it other than 1 − IoU, which a subtraction would round."""
    overlap = pair.overlap()
    return overlap / _at_least(pair.union(overlap), eps)


@_kind("iou")
def _iou(pair: Pair, eps: float, parameter: float) -> Tensor:
    return 1 - _overlap(pair, eps, parameter)


@_kind("giou")
def _giou(pair: Pair, eps: float, _: float) -> Tensor:
    overlap = pair.overlap()
    union = _at_least(pair.union(overlap), eps)
    enclosing = _at_least(_product(pair.outer()), eps)
    return 1 - (overlap / union - (enclosing - union) / enclosing)


def _centre_penalty(pair: Pair, eps: float) -> Tensor:
    return (pair.centre_distance**2 / 4).sum(1) / ((pair.outer() ** 2).sum(1) + eps)


@_kind("diou")
def _diou(pair: Pair, eps: float, _: float) -> Tensor:
    return 1 - (pair.iou(eps) - _centre_penalty(pair, eps))


def _ratio_penalty(pair: Pair, eps: float) -> Tensor:
    """v: how far the ratios of the sides are apart."""
    pred, target = (torch.atan(size[:, 0] / (size[:, 1] + eps)) for size in (pair.pred_size, pair.target_size))
    return 4 / math.pi**2 * (target - pred) ** 2


@_kind("ciou")
def _ciou(pair: Pair, eps: float, _: float) -> Tensor:
    iou, v = pair.iou(eps), _ratio_penalty(pair, eps)
    rest = (1 - iou + v).detach()
    # Equal boxes: their rounded IoU may be 1 and the quotient 0/0, which stands for no cost.
    alpha = torch.where((iou > 0.5) & (rest != 0), v / torch.where(rest == 0, 1.0, rest), 0.0).detach()
    return 1 - clamp_passing_grad(iou - (_centre_penalty(pair, eps) + alpha * v), -1.0, 1.0)


def full_ciou(pred: Tensor, target: Tensor, eps: float) -> Tensor:
    """CIoU's loss ``[N]`` whose ratio counts at every IoU, and without bounds: ultralytics'."""
    pair = Pair(pred, target)
    iou, v = pair.iou(eps), _ratio_penalty(pair, eps)
    alpha = (v / (1 - iou + v + eps)).detach()
    return 1 - (iou - (_centre_penalty(pair, eps) + alpha * v))


@_kind("eiou", parameter=0.1)
def _eiou(pair: Pair, eps: float, smooth_point: float) -> Tensor:
    x1, x2 = pair.inner_low - pair.outer_low, pair.inner_high - pair.outer_low
    low, high = torch.minimum(x1, x2), torch.maximum(x1, x2)
    overlap = _product(x2) + _product(low) - x1[:, 0] * high[:, 1] - high[:, 0] * x1[:, 1]
    cost = 1 - overlap / (pair.union(overlap) + eps)
    return torch.where(cost < smooth_point, cost**2 / (2 * smooth_point), cost - smooth_point / 2)


@_kind("siou", parameter=1.0)
def _siou(pair: Pair, eps: float, sign: float) -> Tensor:
    s = pair.centre_distance / 2 + eps
    gamma = sign * (2 - 2 * _product(s).abs() / (s**2).sum(1))[:, None]
    low, high = (f(pair.pred_size, pair.target_size) + eps for f in (torch.minimum, torch.maximum))
    cost = 2 + ((1 - torch.exp(low / high - 1)) ** 4 - torch.exp(gamma * (s / pair.outer(eps)) ** 2)).sum(1)
    return 1 - clamp_passing_grad(pair.iou(eps) - cost / 2, -1.0, 1.0)


@_kind("mpdiou", parameter=640.0**2)
def _mpdiou(pair: Pair, eps: float, squared_diagonal: float) -> Tensor:
    return 1 - (pair.iou(eps) - ((pair.pred - pair.target) ** 2 / squared_diagonal).sum(1))


# What `box_iou_loss` takes.
KINDS = tuple(name for name in _FORMULAS if name != "overlap")


def reference(pred: Tensor, target: Tensor, kind: str, eps: float, parameter: float = 0.0) -> Tensor:
    """In fp32, or in fp64 for fp64 input; half a gradient where a max or min ties, a whole one at a bound."""
    return _FORMULAS[kind][0](Pair(pred, target), eps, parameter)


def fake(pred: Tensor, target: Tensor, kind: str, eps: float, parameter: float) -> Tensor:
    return pred.new_empty(pred.shape[0], dtype=accumulator(pred.dtype))


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    acc = accumulator(dtype)
    for kind, (_, parameter) in _FORMULAS.items():
        numbers = (kind, 1e-6 if kind == "overlap" else 1e-7, parameter)
        for n in (0, 1, 7, 129, 2049):
            # Around the target, as a trained head's boxes are.
            target = boxes(n, device, acc, generator)
            size = target[:, 2:] - target[:, :2]
            near = target + normal((n, 4), device, acc, generator, 0.2) * torch.cat([size, size], 1)
            # CIoU's alpha, tied to a constant in the derivative where IoU > 1/2, is beyond numerical differences.
            near_id = f"near-tied-{kind}" if kind == "ciou" else f"near-{kind}"
            yield Sample(f"{near_id}-n{n}", (near.to(dtype), target, *numbers))
            if n == 7:
                # Drawn apart, they may meet: there CIoU has that alpha too.
                apart = boxes(n, device, dtype, generator)
                apart = torch.where(box_ops.aligned_iou(apart, target)[:, None] > 0.4, apart + 1000, apart)
                yield Sample(f"apart-{kind}-n{n}", (apart, target, *numbers))
                strides_id = f"strides-tied-{kind}" if kind == "ciou" else f"strides-{kind}"
                small = torch.cat([near[:, :2] / 64, near[:, 2:] / 64], 1).to(dtype)
                yield Sample(f"{strides_id}-n{n}", (small, target / 64, kind, 1e-6, parameter))
                sides_first = apart.t().contiguous().t()
                yield Sample(f"strided-{kind}-n{n}", (sides_first, target, *numbers))
        # Equal, sharing sides, touching, one within the other, without area, points, inverted.
        special = [
            [[8, 8, 24, 40], [8, 8, 24, 40]], [[8, 8, 24, 40], [8, 8, 16, 40]], [[0, 0, 8, 8], [8, 0, 16, 8]],
            [[4, 4, 8, 8], [0, 0, 16, 16]], [[4, 4, 4, 8], [4, 4, 8, 8]], [[4, 4, 4, 4], [4, 4, 4, 4]],
            [[4, 4, 4, 4], [9, 9, 9, 9]], [[8, 8, 4, 4], [2, 2, 10, 10]], [[-8, -8, -4, -4], [-6, -7, 2, 2]],
        ]  # fmt: skip
        pairs = torch.tensor(special, device=device, dtype=acc)
        yield Sample(f"tie-{kind}", (pairs[:, 0].to(dtype), pairs[:, 1], *numbers))


def large(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    target = boxes(20_011, device, accumulator(dtype), generator)
    near = target + normal(target.shape, device, target.dtype, generator, 4.0)
    yield Sample("giou-n20011", (near.to(dtype), target, "giou", 1e-7, _FORMULAS["giou"][1]))


IOU = register(
    OpSpec(
        stem="iou",
        schema="(Tensor pred, Tensor target, str kind, float eps, float parameter) -> Tensor",
        reference=reference,
        fake=fake,
        samples=samples,
        large=large,
        summary="1 − IoU, GIoU, DIoU, CIoU, EIoU, SIoU or MPDIoU of aligned boxes",
        public=("box_iou_loss", "giou_loss"),
        differentiable=("pred", "target"),
    )
)


def pairs(op: str, pred: Tensor, target: Tensor, kind: str, eps: float, parameter: float = 0.0) -> Tensor:
    """Loss of each pair in the accumulator's dtype, after the checks."""
    checks.tensor(op, "pred", pred)
    checks.shape(op, "pred", pred, "[N, 4]", (None, 4))
    checks.tensor(op, "target", target, checks.FLOATING + checks.INTEGER)
    checks.shape(op, "target", target, "[N, 4]", pred.shape)
    checks.same_device(op, "target", target, "pred", pred)
    acc = accumulator(pred.dtype)
    eps = checks.number(op, "eps", eps, 0, dtype=acc)
    return IOU(device_type(pred), pred, as_dtype(target, acc), kind, eps, parameter)


def box_iou_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    kind: str = "giou",
    eps: float = 1e-7,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    smooth_point: float = 0.1,
    neg_gamma: bool = False,
    image_size: tuple[float, float] | None = None,
) -> Tensor:
    r"""Loss of predicted boxes against aligned target boxes, one minus their IoU or one of its successors.

    .. math:: L = 1 - \frac{I}{U}
        \;\; [\, + \frac{E - U}{E} \,]_{\mathrm{giou}}
        \;\; [\, + \frac{\rho^2}{c^2} \,]_{\mathrm{diou, ciou}}
        \;\; [\, + \frac{v}{1 - I/U + v} v \,]_{\mathrm{ciou},\, I/U > 1/2}

    with I, U, E the areas of overlap, union and enclosing box, c its diagonal, ρ the distance of the centres and
    :math:`v = \frac{4}{\pi^2} (\arctan \frac{w_t}{h_t} - \arctan \frac{w_p}{h_p})^2`: Rezatofighi et al., CVPR 2019
    (arXiv 1902.09630); Zheng et al., AAAI 2020 (arXiv 1911.08287, eq. 7) and TCYB 2022 (arXiv 2005.03572). Further:

    - "eiou": the extended IoU of Peng and Yu (TPAMI 2021, "A systematic IoU-related method"), as mmdet 3.3 has it: the
      intersection is signed where the boxes are apart, and 1 − IoU is smoothed quadratically below `smooth_point`. Not
      the efficient IoU of arXiv 2101.08158, which other libraries call EIoU.
    - "siou": Gevorgyan (arXiv 2205.12740), as mmdet 3.3 has it: costs of angle, distance and shape; within [0, 2].
    - "mpdiou": Ma and Xu (arXiv 2307.07662): :math:`1 - I/U + (d_1^2 + d_2^2) / (w^2 + h^2)` with d the distances of
      the upper left and of the lower right corners, and w, h the size of the image.

    Args:
        pred: fp32, fp16, bf16 or fp64 ``[N, 4]``, boxes xyxy, in any unit of length.
        target: real ``[N, 4]``, in the same unit.
        weight: ``[N]``, multiplies the loss of each pair.
        kind: "iou", "giou", "diou", "ciou", "eiou", "siou" or "mpdiou".
        eps: >= 0. For "iou" and "giou" the least area of union and enclosing box; for the others added to the area of
            the union, with "diou" and "ciou" to c² and to the heights under the arctangent, with "siou" to distances
            and sizes, and there the least side of the enclosing box.
        reduction: "none", "mean" or "sum".
        avg_factor: with "mean", the sum is divided by ``avg_factor + 1.19e-07`` instead of by N. A number, or a tensor
            of one element, which is not read by the host.
        smooth_point: of "eiou", > 0: the 1 − IoU below which the loss is quadratic.
        neg_gamma: of "siou": the paper's sign of the distance cost's exponent; mmdet holds the other to be more stable.
        image_size: of "mpdiou", which needs it: (height, width) in the boxes' unit, each > 0.

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
        input stays attached to the graph there only in DIoU and CIoU, that CIoU of equal boxes is 0, where there it
        is NaN as soon as eps is lost in rounding, and that SIoU adds eps to widths too, where two widths of 0 are NaN
        there.
    """
    op = "box_iou_loss"
    checks.choice(op, "kind", kind, KINDS)
    parameters: dict[str, float] = {
        "eiou": checks.number(op, "smooth_point", smooth_point, 0, exclusive=True),
        "siou": -1.0 if checks.flag(op, "neg_gamma", neg_gamma) else 1.0,
    }
    if kind == "mpdiou":
        if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
            raise ValueError(checks.message(op, "image_size", 'must be (height, width) for kind="mpdiou"', image_size))
        sizes = [checks.number(op, f"image_size[{i}]", x, 0, exclusive=True) for i, x in enumerate(image_size)]
        parameters["mpdiou"] = sum(size * size for size in sizes)
    loss = pairs(op, pred, target, kind, eps, parameters.get(kind, 0.0))
    avg_factor = check_reduction(op, pred.shape[:1], "[N]", pred, weight, reduction, avg_factor)
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
