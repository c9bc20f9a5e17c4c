# SPDX-License-Identifier: Apache-2.0
"""What is in a checkpoint, whoever wrote it: its weights under this package's keys, and the network they belong to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import Config, ModelConfig, preset, replace
from .models.auxiliary import without_auxiliary
from .models.gfl import METADATA
from .models.resnet import ARCHITECTURES, Architecture

# Of this package's files; a reader refuses a number that it doesn't know.
FORMAT = "gfl-ops 1"
# Under which other programs put the weights of a network, the averaged ones first; mmengine's `ema_state_dict` has the
# ones that are not averaged.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_model", "ema", "state_dict", "model_state_dict", "ema_state_dict", "model"),
    *("module", "network", "net", "params", "weights"),
)
MAX_DEPTH = 4
# What wraps a module inside another.
INNER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Weights of a detector, of NanoDet-Plus, of a backbone under its name, and of a ResNet alone: what stands before them
# is a wrapper's.
ANCHORS = ("bbox_head.gfl_cls.weight", "head.gfl_cls.0.weight", "backbone.conv1.weight", "conv1.weight")
AVERAGED = re.compile("ema|averaged|avg_|swa|teacher")
# What the maps depend on and weights can't tell, and what images are scaled to.
UNTOLD = ("head_groups", "center_offset", "legacy")
UNTOLD_SIZES = ("short_side", "long_side")
# In the text of mmdet's configuration.
MMDET_FIELDS = {
    "head_groups": r"num_groups\W*(\d+)",
    "score_threshold": r"score_thr\W*([\d.e-]+)",
    "iou_threshold": r"iou_threshold\W*([\d.]+)",
    "nms_pre": r"nms_pre\W*(\d+)",
    "max_detections": r"max_per_img\W*(\d+)",
}
MMDET_SCALE = r"(?s)test(?:_pipeline|\W*dict).*?scale\W*(\d+),\s*(\d+)"


@dataclass
class Weights:
    """A checkpoint's weights, and what the file says beside them."""

    state_dict: dict[str, Tensor]  # by this package's keys
    source: str  # who wrote it
    config: Config | None = None  # the whole configuration, from this package's files only
    classes: list[str] | None = None  # names in the order of the labels
    category_ids: list[int] | None = None  # of the annotation file, in that order
    notes: list[str] = field(default_factory=list)  # what was renamed or left out, in lines
    auxiliary: dict[str, Tensor] = field(default_factory=dict)  # weights that only a training uses
    stated: dict[str, Any] | None = None  # fields that mmdet's own configuration says, if the file is mmdet's

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


# The only weights whose shape depends on the number of classes, which is that of their first outputs.
CLASS_KEYS = re.compile(r"(bbox|aux)_head\.gfl_cls\.(\d+\.)?(weight|bias)")
QUALITY = r"^bbox_head\.reg_conf\."
V1, V2, NANODET = "GFocal v1", "GFocal V2", "NanoDet-Plus"
# The preset of what its weights can't tell.
NANODET_PRESET = "nanodet_plus_m_416"
DIALECTS = (
    Dialect(r"^ema_", None, "left out: {} weights of mmdet 2's average, ema_…"),
    Dialect(r"\.conv2_offset\.", ".conv2.conv_offset."),
    Dialect(
        r"^bbox_head\.distribution_project\.project$",
        "bbox_head.integral.project",
        f"{V1}'s geometry: centres (s-1)/2, boxes one pixel wider, the best locations per level",
        V1,
    ),
    Dialect(QUALITY, r"\g<0>", source=V2),
    Dialect(r"^fpn\.", "neck."),
    Dialect(r"^head\.distribution_project\.", "bbox_head.integral."),
    Dialect(r"^head\.", "bbox_head.", source=NANODET),
)


def normalise(content: Mapping[str, Any]) -> Weights:
    """Weights under this package's keys, out of what `gfl.checkpoint.read` gives.

    Known are this package's files, those of mmdet 2 and 3, GFocal v1 and V2, and dictionaries of weights, also those of
    a wrapped module: for several devices, compiled, averaged, Lightning's.

    Raises:
        ValueError: there are no weights in it, or those of several networks; a tensor claims more numbers than the file
            holds; or it is this package's in a format that this version doesn't know.
    """
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    places = list(_places(content))
    if not places:
        keys = ", ".join(map(str, list(content)[:8])) or "none"
        raise ValueError(f"no weights in it; its keys are {keys}")
    found = next((p for p in places if any(str(key).endswith(ANCHORS) for key in p)), places[0])
    weights = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    for key, value in weights.items():
        _check_storage(key, value)
    result = Weights(weights, "a dictionary of weights", None, _classes(meta))
    if left_out := [str(key) for key in found if str(key) not in weights]:
        result.notes.append(f"left out, not being weights: {', '.join(left_out)}")
    _unwrap(result)
    inference = without_auxiliary(result.state_dict)
    result.auxiliary = {key: value for key, value in result.state_dict.items() if key not in inference}
    result.state_dict = inference
    if result.auxiliary:
        count = len(result.auxiliary)
        result.notes.append(f"left out: {count} weights of the auxiliary head, which only a training uses")
    stated = meta.get("format")
    if isinstance(stated, str) and stated.startswith("gfl-ops"):
        if stated != FORMAT:
            raise ValueError(f"its format is {stated!r}, this version knows {FORMAT!r}")
        if not isinstance(meta.get("config"), Mapping):
            raise ValueError("it has no configuration, which our own files have as meta.config")
        result.source, result.config = stated, Config.from_dict(meta["config"])
        if "classes" in meta and result.classes is None:
            raise ValueError("its meta.classes are not texts, one per class")
        result.category_ids = _category_ids(meta, result.classes)
        return result
    for system in ("mmengine", "mmdet"):
        if f"{system}_version" in meta:
            result.source = f"{system} {meta[f'{system}_version']}"
            result.stated = _mmdet_fields(meta)
    own = getattr(found, "_metadata", None)
    for module in own.values() if isinstance(own, Mapping) else ():
        if isinstance(module, Mapping) and isinstance(module.get(METADATA), Mapping):
            result.config = Config.from_dict(module[METADATA])
            return result
    _translate(result)
    return result


def _places(content: Mapping[Any, Any], depth: int = 0) -> Iterator[Mapping[Any, Any]]:
    """The dictionaries with tensors in a checkpoint, the best first."""
    for name in WRAPPERS if depth < MAX_DEPTH else ():
        if isinstance(content.get(name), Mapping):
            yield from _places(content[name], depth + 1)
    if any(isinstance(value, Tensor) for value in content.values()):
        yield content


def _check_storage(key: str, value: Tensor) -> None:
    if value.layout != torch.strided or value.is_quantized:
        raise ValueError(f"{key} is not a dense tensor of numbers, but {value.layout}, {value.dtype}")
    if value.device.type != "meta" and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{key} claims to have {value.numel()} numbers, which the file doesn't hold")


def _unwrap(result: Weights) -> None:
    """Removes what wrappers of modules put before the keys."""
    weights = {INNER.sub("", key): value for key, value in result.state_dict.items()}
    prefixes: list[str] = []
    for anchor in ANCHORS:
        there = [key.removesuffix(anchor) for key in weights if key == anchor or key.endswith(f".{anchor}")]
        if anchor == ANCHORS[-1]:  # also the name of a convolution in each block
            there = [prefix for prefix in there if f"{prefix}layer1.0.{anchor}" in weights]
        if prefixes := sorted(there, key=len):
            break
    first = {key.partition(".")[0] for key in weights}
    if not prefixes and len(first) == 1 and first <= {*WRAPPERS}:
        prefixes = [f"{next(iter(first))}."]
    if any(not prefix.startswith(prefixes[0]) for prefix in prefixes):
        averaged = [prefix for prefix in prefixes if AVERAGED.search(prefix)]
        if len(averaged) != 1:
            raise ValueError(f"weights of several networks, {', '.join(prefixes)}: save the one to use alone")
        prefixes = averaged
    if prefixes and prefixes[0]:
        inner = {key.removeprefix(prefixes[0]): v for key, v in weights.items() if key.startswith(prefixes[0])}
        rest = len(weights) - len(inner)
        result.notes.append(f"keys began with {prefixes[0]}" + (f"; left out: {rest} others" if rest else ""))
        weights = inner
    result.state_dict = weights


def _category_ids(meta: Mapping[str, Any], classes: list[str] | None) -> list[int] | None:
    ids = meta.get("category_ids")
    if ids is None:
        return None
    whole = isinstance(ids, (list, tuple)) and all(type(i) is int for i in ids)
    if not whole or classes is None or len(ids) != len(classes):
        raise ValueError("its meta.category_ids are not whole numbers, one per class")
    return list(ids)


def _mmdet_fields(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as the configuration's text beside mmdet's weights says them; empty without one."""
    text = next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), "")
    found = {name: match[1] for name, pattern in MMDET_FIELDS.items() if (match := re.search(pattern, text))}
    if scale := re.search(MMDET_SCALE, text):
        long, short = sorted((int(scale[1]), int(scale[2])), reverse=True)
        found |= {"short_side": short, "long_side": long}
    return found | ({"text": True} if text else {})


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
    # Its class layer has one channel that the head never reads; names tell whether, and without them COCO's number.
    if result.source == V2 and channels == (81 if result.classes is None else len(result.classes) + 1):
        for key in filter(CLASS_KEYS.fullmatch, result.state_dict):
            result.state_dict[key] = result.state_dict[key][:-1].clone()
        result.notes.append(f"the last of the {channels} class channels, which {V2} doesn't use, is left out")


def configuration(weights: Weights, given: Config | None) -> tuple[Config, str]:
    """The configuration of a checkpoint, and what had to be assumed for it, a phrase, or nothing.

    A file's own one is taken as it is; else the network is inferred, and `given` says what weights can't tell.
    """
    if weights.config is not None:
        if given is not None:
            raise ValueError("it says its configuration itself: leave `config` out")
        return weights.config, ""
    if given is not None:
        return dataclasses.replace(given, model=infer_model(weights, given.model)), ""
    stated = dict(weights.stated or {})
    known = stated.pop("text", False) or weights.legacy
    nanodet = weights.source == NANODET
    found = (preset(NANODET_PRESET) if nanodet else Config()).replace(**stated)
    found = dataclasses.replace(found, model=infer_model(weights, found.model))
    values = [f"{name} ({getattr(found.model, name)})" for name in (() if nanodet else UNTOLD[:-1])]
    values += [f"{name} ({getattr(found.test, name)})" for name in UNTOLD_SIZES]
    return found, "" if known else f"{weights.source} can't tell {', '.join(values)} and the other test settings"


def check_start(weights: Weights, config: ModelConfig) -> None:
    """ValueError if a file says of its network what the one that is to start from its weights contradicts."""
    if weights.config is None and weights.stated is None and not weights.legacy:
        return
    there = configuration(weights, None)[0].model
    for name in UNTOLD:
        if getattr(there, name) != getattr(config, name):
            raise ValueError(f"its `{name}` is {getattr(there, name)}, this network's {getattr(config, name)}")


def infer_model(weights: Weights, base: ModelConfig | None = None) -> ModelConfig:
    """The network that another system's weights belong to, read off their keys and shapes; the rest is `base`'s.

    It is a ValueError if they are not of a GFL detector on a backbone of this package; the text says what is missing.
    """
    shapes = {key: list(value.shape) for key, value in weights.state_dict.items()}
    base = ModelConfig() if base is None else base
    if weights.source == NANODET:
        return replace(base, **_nanodet(shapes, base))
    needed = ("backbone.conv1", "neck.lateral_convs.0.conv", "bbox_head.gfl_cls", "bbox_head.gfl_reg")
    missing = [f"{key}.weight" for key in needed if len(shapes.get(f"{key}.weight", ())) != 4]
    if missing:
        hint = "; of a backbone alone: give it as backbone_weights" if "conv1.weight" in shapes else ""
        raise ValueError(f"not a GFL detector on a ResNet: it has no {', '.join(missing)}{hint}")
    first_conv = shapes.get("bbox_head.cls_convs.0.conv.weight", shapes["bbox_head.gfl_cls.weight"][1:])
    quality = any(re.match(QUALITY, key) for key in shapes)
    return replace(
        base,
        **_backbone(shapes),
        num_classes=shapes["bbox_head.gfl_cls.weight"][0],
        neck_channels=shapes["neck.lateral_convs.0.conv.weight"][0],
        head_channels=first_conv[0],
        head_convs=_count(shapes, r"bbox_head\.cls_convs\.(\d+)\."),
        reg_max=shapes["bbox_head.gfl_reg.weight"][0] // 4 - 1,
        strides=[8 * 2**level for level in range(_count(shapes, r"neck\.fpn_convs\.(\d+)\."))],
        quality_branch=quality,
        legacy=weights.legacy or base.legacy,
        # Both versions of GFocal are of the time when mmdet chose locations, not pairs.
        topk_mode="anchor" if weights.legacy or quality else base.topk_mode,
    )


def _nanodet(shapes: Mapping[str, list[int]], base: ModelConfig) -> dict[str, Any]:
    """The fields of a NanoDet-Plus network on a ShuffleNetV2."""
    needed = {"width": "backbone.stage2.0.branch2.0", "neck_channels": "neck.reduce_layers.0.conv"}
    needed |= {"head_channels": "bbox_head.cls_convs.0.0.pointwise", "num_classes": "bbox_head.gfl_cls.0"}
    if missing := [f"{key}.weight" for key in needed.values() if len(shapes.get(f"{key}.weight", ())) != 4]:
        raise ValueError(f"not a NanoDet-Plus detector on a ShuffleNetV2: it has no {', '.join(missing)}")
    fields: dict[str, Any] = {name: shapes[f"{key}.weight"][0] for name, key in needed.items()}
    reg_max = shapes.get("bbox_head.integral.project", [base.reg_max + 1])[0] - 1
    return fields | {
        **{"backbone": "shufflenetv2", "neck": "ghost_pan", "head": "nanodet_plus", "channel_order": "bgr"},
        "width": 2 * fields["width"],
        "num_classes": fields["num_classes"] - 4 * (reg_max + 1),
        "head_convs": _count(shapes, r"bbox_head\.cls_convs\.0\.(\d+)\."),
        "reg_max": reg_max,
        "strides": [8 * 2**level for level in range(_count(shapes, r"bbox_head\.gfl_cls\.(\d+)\."))],
    }


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
        return {**fields, "dcn": None}
    channels = set(offsets.values())
    if channels not in ({18}, {27}):
        raise ValueError(f"its deformable convolutions have {sorted(channels)} offset channels, not 18 (v1) or 27 (v2)")
    return {**fields, "dcn": "v1" if channels == {18} else "v2", "dcn_stages": sorted(offsets)}
