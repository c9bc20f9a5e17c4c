# SPDX-License-Identifier: Apache-2.0
"""torchvision's functions of these names, by ours; and torchvision's detectors with ours inside.

`sigmoid_focal_loss`, `generalized_box_iou_loss`, `nms` and `batched_nms` take and give what those of `torchvision.ops`
do, and need no torchvision. ``patch()`` puts them in their place there, and wherever they were imported to by name, so
that RetinaNet, FCOS, Faster R-CNN and others call them; ``unpatch()`` takes them out again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core import checks
from ..functional import batched_nms, nms, sigmoid_focal_loss
from ..ops.boxes.iou import pairs
from ._patch import Change, Patch, Replaced, stand_in

__all__ = ["batched_nms", "generalized_box_iou_loss", "nms", "patch", "sigmoid_focal_loss", "unpatch"]


def generalized_box_iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    r"""Generalized IoU loss of aligned boxes, :math:`1 - I/U + (E - U)/E`; torchvision's signature.

    Rezatofighi et al., CVPR 2019 (arXiv 1902.09630); see `gfl_ops.box_iou_loss`.

    Args:
        boxes1: fp32, fp16, bf16, fp64 or integer ``[..., 4]``, boxes xyxy.
        boxes2: real ``[..., 4]``; the shapes broadcast.
        reduction: "none", "mean" or "sum".
        eps: least area of union and enclosing box, >= 0.

    Returns:
        ``[...]`` for "none", else a scalar; fp32, or fp64 for fp64 `boxes1`. The mean of no boxes is 0 and attached to
        the graph, as there.

    The gradient reaches both.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device, reduction or number outside the above.

    Note:
        torchvision adds `eps` to the areas, which makes a difference of at most ``2·eps / area of the union``: 1e-5 of
        a box of 0.02 square pixels, but seen in boxes whose image is of side 1.
    """
    op = "generalized_box_iou_loss"
    checks.choice(op, "reduction", reduction, checks.REDUCTIONS)
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        checks.tensor(op, name, boxes, checks.FLOATING + checks.INTEGER)
        if boxes.dim() < 1 or boxes.shape[-1] != 4:
            raise ValueError(checks.message(op, name, "must have shape [..., 4]", list(boxes.shape)))
    try:
        shape = torch.broadcast_shapes(boxes1.shape, boxes2.shape)
    except RuntimeError:
        rule = f"must have a shape that broadcasts with that of `boxes1`, {list(boxes1.shape)}"
        raise ValueError(checks.message(op, "boxes2", rule, list(boxes2.shape))) from None
    boxes1 = boxes1 if boxes1.is_floating_point() else boxes1.float()
    loss = pairs(op, boxes1.expand(shape).reshape(-1, 4), boxes2.expand(shape).reshape(-1, 4), "giou", eps)
    if reduction == "none":
        return loss.reshape(shape[:-1])
    return loss.mean() if reduction == "mean" and loss.numel() else loss.sum()


def _plan() -> Iterator[Change]:
    import torchvision

    for name in ("sigmoid_focal_loss", "generalized_box_iou_loss", "nms", "batched_nms"):
        new = stand_in(globals()[name], getattr(torchvision.ops, name))
        yield Change(f"torchvision.ops.{name}", torchvision.ops, name, new, everywhere=True)


_PATCH = Patch(_plan)


def patch() -> Replaced:
    """Let torchvision's detectors call ours, from now on and for models built before.

    Returns:
        The names of what is replaced, a list. As a context manager (``with patch():``) it is undone at the end of the
        block. A call while all is replaced changes nothing, at the end of its block neither. torch.jit scripts and
        traces torchvision's own, and so does export.

    Raises:
        ImportError: torchvision is not installed; nothing is replaced then.
    """
    return _PATCH.apply()


def unpatch() -> list[str]:
    """Give torchvision its own back. Returns the names of what was replaced; an empty list if nothing was."""
    return _PATCH.remove()
