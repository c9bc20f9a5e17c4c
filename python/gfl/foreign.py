# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint, whoever wrote it: its weights under our keys, and the network that they are of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .config import Config, ModelConfig, replace
from .models.resnet import ARCHITECTURES

# Of our own files; a reader refuses a number that it doesn't know.
FORMAT = "gfl-ops 1"
# Under which other programs put the weights of a network, the averaged ones first.
WRAPPERS = ("state_dict_ema", "state_dict", "model_ema", "model", "params")
# Of the head of GFocal V1 and V2.
V1_BINS = "bbox_head.distribution_project.project"
V2_QUALITY = "bbox_head.reg_conf."


@dataclass
class Weights:
    """A checkpoint's weights.

    Attributes:
        state_dict: by our keys.
        source: who wrote it.
        config: of our own files, the whole of it.
        classes: names in the order of the labels, if the file has them.
        category_ids: of the annotation file, in that order, if the file has them.
        legacy: it goes with GFocal v1's geometry.
        notes: what was renamed or left out, in lines.
    """

    state_dict: dict[str, Tensor]
    source: str
    config: Config | None = None
    classes: list[str] | None = None
    category_ids: list[int] | None = None
    legacy: bool = False
    notes: list[str] = field(default_factory=list)


def normalise(content: Mapping[str, Any]) -> Weights:
    """Weights under our keys, out of what `gfl.checkpoint.read` gives.

    Known are our own files, those of mmdet 2 and 3, GFocal v1 and V2, and plain dictionaries of weights, also those of
    a module wrapped for several devices (keys with ``module.``).

    Raises:
        ValueError: there are no weights in it, or it is our own of a format that this version doesn't know.
    """
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
    found = content if wrapper is None else content[wrapper]
    weights = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not weights:
        keys = ", ".join(map(str, list(content)[:8])) or "none"
        raise ValueError(f"no weights in it; its keys are {keys}")
    result = Weights(weights, "a dictionary of weights", classes=_classes(meta), category_ids=_category_ids(meta))
    _note_left_out(result, found)
    stated = meta.get("format")
    if isinstance(stated, str) and stated.startswith("gfl-ops"):
        if stated != FORMAT:
            raise ValueError(f"its format is {stated!r}, this version knows {FORMAT!r}")
        if not isinstance(meta.get("config"), Mapping):
            raise ValueError("it has no configuration, which our own files have as meta.config")
        result.source, result.config = stated, Config.from_dict(meta["config"])
        return result
    if "mmdet_version" in meta:
        result.source = f"mmdet {meta['mmdet_version']}"
    elif "mmengine_version" in meta:
        result.source = f"mmengine {meta['mmengine_version']}"
    _rename(result)
    _from_gfocal(result)
    return result


def _note_left_out(result: Weights, found: Mapping[str, Any]) -> None:
    left_out = [str(key) for key, value in found.items() if not isinstance(value, Tensor)]
    if left_out:
        result.notes.append(f"left out, not being weights: {', '.join(left_out)}")


def _category_ids(meta: Mapping[str, Any]) -> list[int] | None:
    ids = meta.get("category_ids")
    return [int(i) for i in ids] if isinstance(ids, Sequence) else None


def _classes(meta: Mapping[str, Any]) -> list[str] | None:
    dataset = meta.get("dataset_meta")
    for place, name in ((meta, "classes"), (meta, "CLASSES"), (dataset, "classes"), (dataset, "CLASSES")):
        names = place.get(name) if isinstance(place, Mapping) else None
        if isinstance(names, (list, tuple)) and all(isinstance(item, str) for item in names):
            return list(names)
    return None


def _rename(result: Weights) -> None:
    """Keys of wrapped modules, of averages kept beside the weights, and of offsets as older mmdet had them."""
    weights = result.state_dict
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
        result.notes.append("keys began with module.")
    averages = [key for key in weights if key.startswith("ema_")]
    if averages:
        weights = {key: value for key, value in weights.items() if key not in set(averages)}
        result.notes.append(f"left out: {len(averages)} weights of mmdet 2's average, ema_…")
    result.state_dict = {re.sub(r"\.conv2_offset\.", ".conv2.conv_offset.", key): v for key, v in weights.items()}


def _from_gfocal(result: Weights) -> None:
    weights = result.state_dict
    if V1_BINS in weights:
        weights["bbox_head.integral.project"] = weights.pop(V1_BINS)
        result.source, result.legacy = "GFocal v1", True
        result.notes.append("GFocal v1's geometry: centres (s-1)/2, boxes one pixel wider, the best locations a level")
    if any(key.startswith(V2_QUALITY) for key in weights):
        result.source = "GFocal V2"
        channels = len(weights.get("bbox_head.gfl_cls.bias", ()))
        # It has one channel more than classes, which it never reads.
        if channels > 1 and (result.classes is None or len(result.classes) != channels):
            for name in ("weight", "bias"):
                key = f"bbox_head.gfl_cls.{name}"
                weights[key] = weights[key][:-1].clone()
            result.notes.append(f"the last of the {channels} class channels, which GFocal V2 doesn't use, is left out")


def infer_model(weights: Weights) -> ModelConfig:
    """The network that another system's weights are of, read off their keys and shapes.

    Raises:
        ValueError: not a GFL detector on a backbone that there is here; says what is missing.
    """
    shapes = {key: list(value.shape) for key, value in weights.state_dict.items()}
    needed = ("backbone.conv1", "neck.lateral_convs.0.conv", "bbox_head.gfl_cls", "bbox_head.gfl_reg")
    missing = [f"{key}.weight" for key in needed if len(shapes.get(f"{key}.weight", ())) != 4]
    if missing:
        hint = "; of a backbone alone: give it as backbone_weights" if "conv1.weight" in shapes else ""
        raise ValueError(f"not a GFL detector on a ResNet: it has no {', '.join(missing)}{hint}")
    backbone, dcn, dcn_stages = _backbone(shapes)
    convs = _count(shapes, r"bbox_head\.cls_convs\.(\d+)\.")
    first_conv = shapes.get("bbox_head.cls_convs.0.conv.weight", shapes["bbox_head.gfl_cls.weight"][1:])
    quality = any(key.startswith(V2_QUALITY) for key in shapes)
    return replace(
        ModelConfig(),
        backbone=backbone,
        width=shapes["backbone.conv1.weight"][0],
        num_classes=shapes["bbox_head.gfl_cls.weight"][0],
        dcn=dcn,
        **({"dcn_stages": dcn_stages} if dcn else {}),
        neck_channels=shapes["neck.lateral_convs.0.conv.weight"][0],
        head_channels=first_conv[0],
        head_convs=convs,
        reg_max=shapes["bbox_head.gfl_reg.weight"][0] // 4 - 1,
        strides=tuple(8 * 2**level for level in range(_count(shapes, r"neck\.fpn_convs\.(\d+)\."))),
        quality_branch=quality,
        legacy=weights.legacy,
        # Both versions of GFocal are of the time when mmdet chose locations, not pairs.
        topk_mode="anchor" if weights.legacy or quality else "pair",
    )


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def _backbone(shapes: Mapping[str, list[int]]) -> tuple[str, str | None, tuple[int, ...]]:
    """Name, version of its deformable convolutions, and the stages that have them."""
    blocks = tuple(_count(shapes, rf"backbone\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    bottleneck = "backbone.layer1.0.conv3.weight" in shapes
    grouped = shapes.get("backbone.layer1.0.conv2.weight", [1, 1])
    groups = grouped[0] // grouped[1]
    known: dict[tuple[tuple[int, ...], bool, int], str] = {
        (a.blocks, a.bottleneck, a.groups): name for name, a in ARCHITECTURES.items()
    }
    name = known.get((blocks, bottleneck, groups))
    if name is None:
        kind = "1x1-3x3-1x1" if bottleneck else "3x3-3x3"
        raise ValueError(
            f"its backbone has {'-'.join(map(str, blocks))} blocks of {kind} in {groups} groups, which is none of"
            f" {', '.join(ARCHITECTURES)}"
        )
    offsets = {
        int(match[1]) + 1: shape[0]
        for key, shape in shapes.items()
        if (match := re.match(r"backbone\.layer(\d)\.\d+\.conv2\.conv_offset\.weight", key))
    }
    channels = set(offsets.values())
    if not channels:
        return name, None, ()
    if channels not in ({18}, {27}):
        raise ValueError(f"its deformable convolutions have {sorted(channels)} offset channels, not 18 (v1) or 27 (v2)")
    return name, "v1" if channels == {18} else "v2", tuple(sorted(offsets))
