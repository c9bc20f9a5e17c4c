# SPDX-License-Identifier: Apache-2.0
"""Any convolutional network of timm as a backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .backbone import STRIDES, Backbone


class TimmBackbone(Backbone):
    """The maps of strides 8, 16 and 32 of a timm model, with random weights.

    Args:
        name: of the model, as ``timm.list_models()`` has it.
        frozen_stages: all that comes before the map of stride ``2^(frozen_stages + 1)``, and what makes it, is not
            trained: 0 the stem, 1 the first stage. −1: everything is trained.
        norm_eval: batch norms keep their statistics also in training.

    Raises:
        RuntimeError: timm is not installed.
        ValueError: timm has no model of that name, or it gives no maps of strides 8, 16 and 32.
    """

    def __init__(self, name: str, frozen_stages: int = 1, norm_eval: bool = True) -> None:
        super().__init__()
        self.name = name
        self.body = _create(name)
        info: Any = self.body.feature_info
        reductions = info.reduction()
        self._picked = [reductions.index(stride) for stride in STRIDES]
        c3, c4, c5 = (info.channels()[i] for i in self._picked)
        self.channels = (c3, c4, c5)
        self._last_module = dict(zip(reductions, info.module_name()))
        self.freeze(frozen_stages, norm_eval)

    def as_features(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the whole timm model's weights that make the maps, under the keys of `body`."""
        by_name = {_flat(key): value for key, value in weights.items()}
        return {key: by_name[_flat(key)] for key in self.body.state_dict() if _flat(key) in by_name}

    def stage_parameters(self, stages: int) -> Iterator[nn.Parameter]:
        within = [m for reduction, m in self._last_module.items() if reduction <= 2 ** (stages + 1)]
        if not within:
            return
        last = _flat(within[-1])
        named = list(self.body.named_parameters())
        owned = [i for i, (name, _) in enumerate(named) if f"{_flat(name)}_".startswith(f"{last}_")]
        # A module without parameters, such as an activation, ends where the next stage's first module begins.
        end = owned[-1] + 1 if owned else self._parameters_before(last)
        for _, parameter in named[:end]:
            yield parameter

    def _parameters_before(self, module_name: str) -> int:
        count = 0
        for name, module in self.body.named_modules():
            if _flat(name) == module_name:
                return count
            count += len(list(module.parameters(recurse=False)))
        return 0

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of strides 8, 16 and 32 of normalised images ``[B, 3, H, W]``."""
        maps = self.body(images)
        found = []
        for position, channels in zip(self._picked, self.channels, strict=True):
            x = maps[position]
            # Some of timm's networks give [B, H, W, C].
            found.append(x if x.shape[1] == channels else x.permute(0, 3, 1, 2))
        return found


def _flat(name: str) -> str:
    """timm gives a feature's module by its dotted name, which inside of `body` may be written with underscores."""
    return name.replace(".", "_")


def _create(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise RuntimeError(f"gfl: the backbone timm:{name} needs timm: pip install timm") from error
    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise ValueError(f"gfl.ModelConfig: `backbone`: timm {timm.__version__} has no model {name!r}")
    body: Any = timm.create_model(name, pretrained=False, features_only=True)
    reductions = list(body.feature_info.reduction())
    if any(reductions.count(stride) != 1 for stride in STRIDES):
        raise ValueError(
            f"gfl.ModelConfig: `backbone`: a pyramid needs one map of each of the strides 8, 16 and 32; those of"
            f" timm's {name} have {', '.join(map(str, reductions))}"
        )
    return body
