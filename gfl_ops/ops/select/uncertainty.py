# SPDX-License-Identifier: Apache-2.0
"""How sure a head is of each side of a detection: the distributions that its box was read from, and their spread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core import checks
from ..bins.integral import bounded_logits, check_reg_max


def side_distributions(reg_preds: Sequence[Tensor], locations: Tensor, reg_max: int = 16) -> Tensor:
    r"""The four distributions behind each box of `postprocess`.

    .. math:: p_i = \mathrm{softmax}(z)_i, \qquad i = 0 \dots R

    of the logits z of each side, whose expectation is the side's distance in strides (equation 5 of Li et al.,
    Generalized Focal Loss, NeurIPS 2020, arXiv 2006.04388).

    Args:
        reg_preds: levels of floating ``[B, 4(R+1), H, W]``, the maps that `postprocess` was given.
        locations: int64 ``[B, K]``, `Detections.locations`: an index over the locations of all levels, negative in
            unused slots.
        reg_max: R, the last bin.

    Returns:
        fp32 ``[B, K, 4, R+1]``, sides left, top, right, bottom; zero in unused slots. The gradient reaches `reg_preds`.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape or device outside the above.

    Note:
        Plain PyTorch on every backend: gathers K locations per image and never waits for the device.
    """
    op = "side_distributions"
    reg_max = check_reg_max(op, "reg_max", reg_max)
    batch, channels = checks.maps(op, "reg_preds", reg_preds)
    if channels != 4 * (reg_max + 1):
        rule = f"must have 4(R+1) = {4 * (reg_max + 1)} channels"
        raise ValueError(checks.message(op, "reg_preds", rule, channels))
    checks.tensor(op, "locations", locations, (torch.int64,))
    checks.shape(op, "locations", locations, "[B, K]", (batch, None))
    checks.same_device(op, "locations", locations, "reg_preds", reg_preds[0])
    found = reg_preds[0].new_zeros((batch, locations.shape[1], channels), dtype=torch.float32)
    first = 0
    for level in reg_preds:
        here = level.shape[2] * level.shape[3]
        if here == 0:
            continue
        index = (locations - first).clamp(0, here - 1)
        # By its own indices, since a gather of the flattened map would copy one that is not contiguous.
        image = torch.arange(batch, device=level.device)[:, None]
        values = level[image, :, index // level.shape[3], index % level.shape[3]].float()
        inside = (locations >= first) & (locations < first + here)
        found = torch.where(inside[..., None], values, found)
        first += here
    p = bounded_logits(found).unflatten(2, (4, reg_max + 1)).softmax(-1)
    return torch.where((locations >= 0)[..., None, None], p, 0.0)


def side_uncertainty(distributions: Tensor) -> Tensor:
    r"""Variance, entropy and peak of distributions over unit bins.

    .. math:: \sum_i p_i (i - \bar i)^2, \qquad -\sum_i p_i \log p_i, \qquad \max_i p_i

    Args:
        distributions: floating ``[…, R+1]``, as `side_distributions` gives them.

    Returns:
        ``[…, 3]``: the variance in bins² (times the level's stride², pixels²), the entropy in nats, and the probability
        of the likeliest bin; fp32, or fp64 for fp64. Zero where all of the distribution is. The gradient reaches
        `distributions`.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: no dimension, or one without bins.
    """
    op = "side_uncertainty"
    checks.tensor(op, "distributions", distributions)
    if distributions.dim() < 1 or distributions.shape[-1] < 1:
        raise ValueError(checks.message(op, "distributions", "must have shape […, R+1]", list(distributions.shape)))
    p = distributions if distributions.dtype == torch.float64 else distributions.float()
    bins = torch.arange(p.shape[-1], dtype=p.dtype, device=p.device)
    away = bins - (p * bins).sum(-1, keepdim=True)
    return torch.stack([(p * away.square()).sum(-1), torch.special.entr(p).sum(-1), p.amax(-1)], -1)
