# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint, whoever wrote it: its weights under this package's keys, and the network they belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .config import Config, ModelConfig, replace
from .models.resnet import ARCHITECTURES, Architecture

# Of this package's files; a reader refuses a number that it doesn't know.
FORMAT = "gfl-ops 1"
# Under which other programs put the weights of a network, the averaged ones first.
WRAPPERS = ("state_dict_ema", "state_dict", "model_ema", "model", "params")


@dataclass
class Weights:
    """A checkpoint's weights, and what the file says beside them."""

    state_dict: dict[str, Tensor]  # by this package's keys
    source: str  # who wrote it
    config: Config | None = None  # the whole configuration, from this package's files only
    classes: list[str] | None = None  # names in the order of the labels
    category_ids: list[int] | None = None  # of the annotation file, in that order
    notes: list[str] = field(default_factory=list)  # what was renamed or left out, in lines

    @property
    def legacy(self) -> bool:
        """Whether it needs GFocal v1's geometry."""
        return self.source == V1


class Dialect(NamedTuple):
    """Keys of another system, found by `pattern`; a `replacement` of None leaves the weight out."""

    pattern: str
    replacement: str | None
    note: str = ""
    source: str = ""


# The only weights whose shape depends on the number of classes.
CLASS_KEYS = ("bbox_head.gfl_cls.weight", "bbox_head.gfl_cls.bias")
QUALITY = r"^bbox_head\.reg_conf\."
V1, V2 = "GFocal v1", "GFocal V2"
DIALECTS = (
    Dialect(r"^module\.", "", "keys began with module."),
    Dialect(r"^ema_", None, "left out: {} weights of mmdet 2's average, ema_…"),
    Dialect(r"\.conv2_offset\.", ".conv2.conv_offset."),
    Dialect(
        r"^bbox_head\.distribution_project\.project$",
        "bbox_head.integral.project",
        f"{V1}'s geometry: centres (s-1)/2, boxes one pixel wider, the best locations per level",
        V1,
    ),
    Dialect(QUALITY, r"\g<0>", source=V2),
)


def normalise(content: Mapping[str, Any]) -> Weights:
    """Weights under this package's keys, out of what `gfl.checkpoint.read` gives.

    Known are this package's files, those of mmdet 2 and 3, GFocal v1 and V2, and plain dictionaries of weights, also
    those of a module wrapped for several devices (keys with ``module.``).

    Raises:
        ValueError: there are no weights in it, or it is this package's in a format that this version doesn't know.
    """
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    found = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), content)
    weights = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not weights:
        keys = ", ".join(map(str, list(content)[:8])) or "none"
        raise ValueError(f"no weights in it; its keys are {keys}")
    ids = meta.get("category_ids")
    ids = [int(i) for i in ids] if isinstance(ids, Sequence) else None
    result = Weights(weights, "a dictionary of weights", None, _classes(meta), ids)
    if left_out := [str(key) for key in found if str(key) not in weights]:
        result.notes.append(f"left out, not being weights: {', '.join(left_out)}")
    stated = meta.get("format")
    if isinstance(stated, str) and stated.startswith("gfl-ops"):
        if stated != FORMAT:
            raise ValueError(f"its format is {stated!r}, this version knows {FORMAT!r}")
        if not isinstance(meta.get("config"), Mapping):
            raise ValueError("it has no configuration, which our own files have as meta.config")
        result.source, result.config = stated, Config.from_dict(meta["config"])
        return result
    for system in ("mmengine", "mmdet"):
        if f"{system}_version" in meta:
            result.source = f"{system} {meta[f'{system}_version']}"
    _translate(result)
    return result


def _classes(meta: Mapping[str, Any]) -> list[str] | None:
    dataset = meta.get("dataset_meta")
    for place in (meta, dataset if isinstance(dataset, Mapping) else {}):
        for names in (place.get("classes"), place.get("CLASSES")):
            if isinstance(names, (list, tuple)) and all(isinstance(item, str) for item in names):
                return list(names)
    return None


def _translate(result: Weights) -> None:
    for pattern, replacement, note, source in DIALECTS:
        keys = {key for key in result.state_dict if re.search(pattern, key)}
        if not keys:
            continue
        if note:
            result.notes.append(note.format(len(keys)))
        result.source = source or result.source
        result.state_dict = {
            re.sub(pattern, replacement or "", key): value
            for key, value in result.state_dict.items()
            if replacement is not None or key not in keys
        }
    channels = len(result.state_dict.get("bbox_head.gfl_cls.bias", ()))
    # Its class layer has one channel that the head never reads.
    if result.source == V2 and channels > 1 and (result.classes is None or len(result.classes) != channels):
        for key in CLASS_KEYS:
            result.state_dict[key] = result.state_dict[key][:-1].clone()
        result.notes.append(f"the last of the {channels} class channels, which {V2} doesn't use, is left out")


def infer_model(weights: Weights) -> ModelConfig:
    """The network that another system's weights belong to, read off their keys and shapes.

    It is a ValueError if they are not of a GFL detector on a backbone of this package; the text says what is missing.
    """
    shapes = {key: list(value.shape) for key, value in weights.state_dict.items()}
    needed = ("backbone.conv1", "neck.lateral_convs.0.conv", "bbox_head.gfl_cls", "bbox_head.gfl_reg")
    missing = [f"{key}.weight" for key in needed if len(shapes.get(f"{key}.weight", ())) != 4]
    if missing:
        hint = "; of a backbone alone: give it as backbone_weights" if "conv1.weight" in shapes else ""
        raise ValueError(f"not a GFL detector on a ResNet: it has no {', '.join(missing)}{hint}")
    first_conv = shapes.get("bbox_head.cls_convs.0.conv.weight", shapes["bbox_head.gfl_cls.weight"][1:])
    quality = any(re.match(QUALITY, key) for key in shapes)
    return replace(
        ModelConfig(),
        **_backbone(shapes),
        num_classes=shapes["bbox_head.gfl_cls.weight"][0],
        neck_channels=shapes["neck.lateral_convs.0.conv.weight"][0],
        head_channels=first_conv[0],
        head_convs=_count(shapes, r"bbox_head\.cls_convs\.(\d+)\."),
        reg_max=shapes["bbox_head.gfl_reg.weight"][0] // 4 - 1,
        strides=[8 * 2**level for level in range(_count(shapes, r"neck\.fpn_convs\.(\d+)\."))],
        quality_branch=quality,
        legacy=weights.legacy,
        # Both versions of GFocal are of the time when mmdet chose locations, not pairs.
        topk_mode="anchor" if weights.legacy or quality else "pair",
    )


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def _backbone(shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """The fields of the backbone: its name, width and deformable convolutions."""
    one, two, three, four = (_count(shapes, rf"backbone\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    grouped = shapes.get("backbone.layer1.0.conv2.weight", [1, 1])
    bottleneck = "backbone.layer1.0.conv3.weight" in shapes
    found = Architecture((one, two, three, four), bottleneck, grouped[0] // grouped[1])
    name = next((name for name, known in ARCHITECTURES.items() if known == found), None)
    if name is None:
        kind = "1x1-3x3-1x1" if bottleneck else "3x3-3x3"
        raise ValueError(
            f"its backbone has {'-'.join(map(str, found.blocks))} blocks of {kind} in {found.groups} groups, which is"
            f" none of {', '.join(ARCHITECTURES)}"
        )
    fields = {"backbone": name, "width": shapes["backbone.conv1.weight"][0]}
    offsets = {
        int(match[1]) + 1: shape[0]
        for key, shape in shapes.items()
        if (match := re.match(r"backbone\.layer(\d)\.\d+\.conv2\.conv_offset\.weight", key))
    }
    if not offsets:
        return fields
    channels = set(offsets.values())
    if channels not in ({18}, {27}):
        raise ValueError(f"its deformable convolutions have {sorted(channels)} offset channels, not 18 (v1) or 27 (v2)")
    return {**fields, "dcn": "v1" if channels == {18} else "v2", "dcn_stages": sorted(offsets)}
