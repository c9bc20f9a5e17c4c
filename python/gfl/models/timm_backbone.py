# SPDX-License-Identifier: Apache-2.0
"""Any convolutional timm model as a backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .backbone import STRIDES, Backbone


class TimmBackbone(Backbone):
    """The maps of strides 8, 16 and 32 of a timm model, with random weights; `name` as in ``timm.list_models()``.

    Everything up to the map of stride ``2^(frozen_stages + 1)`` is frozen: 0 the stem, 1 the first stage too. It is a
    RuntimeError without timm, and a ValueError if timm has no such model or that has no such maps.
    """

    def __init__(self, name: str, frozen_stages: int = 1, norm_eval: bool = True) -> None:
        super().__init__()
        self.name, self.body = name, _create(name)
        info: Any = self.body.feature_info
        reductions = info.reduction()
        self._picked = [reductions.index(stride) for stride in STRIDES]
        self.channels = tuple(info.channels()[i] for i in self._picked)
        self._last_module = dict(zip(reductions, info.module_name()))
        self.freeze(frozen_stages, norm_eval)

    def as_features(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole timm model's weights, as far as the maps need them, under the keys of `body`."""
        by_name = {_flat(key): value for key, value in weights.items()}
        return {key: by_name[_flat(key)] for key in self.body.state_dict() if _flat(key) in by_name}

    def stage_parameters(self, stages: int) -> Iterator[nn.Parameter]:
        within = [m for reduction, m in self._last_module.items() if reduction <= 2 ** (stages + 1)]
        reached = not within
        for name, module in self.body.named_modules():
            # The last module ends where the first one outside of it follows.
            inside = bool(within) and f"{_flat(name)}_".startswith(f"{_flat(within[-1])}_")
            if reached and not inside:
                return
            reached |= inside
            yield from module.parameters(recurse=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of strides 8, 16 and 32 of normalised images ``[B, 3, H, W]``."""
        maps = self.body(images)
        picked = zip((maps[i] for i in self._picked), self.channels, strict=True)
        # Some of timm's networks give [B, H, W, C].
        return [x if x.shape[1] == channels else x.permute(0, 3, 1, 2) for x, channels in picked]


def _flat(name: str) -> str:
    """A module's name as it may stand in `body`: timm writes dots of a feature's name as underscores there."""
    return name.replace(".", "_")


def _create(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise RuntimeError(f"gfl: the backbone timm:{name} needs timm: pip install timm") from error
    # A name with a scheme would be one of a model elsewhere.
    if ":" in name or name.split(".")[0] not in timm.list_models():
        raise ValueError(f"gfl.ModelConfig: `backbone`: timm {timm.__version__} has no model {name!r}")
    body: Any = timm.create_model(name, pretrained=False, features_only=True)
    reductions = list(body.feature_info.reduction())
    if any(reductions.count(stride) != 1 for stride in STRIDES):
        raise ValueError(
            f"gfl.ModelConfig: `backbone`: a pyramid needs one map of each of the strides 8, 16 and 32; those of"
            f" timm's {name} have {', '.join(map(str, reductions))}"
        )
    return body
