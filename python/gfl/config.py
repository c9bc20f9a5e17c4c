# SPDX-License-Identifier: Apache-2.0
"""What a detector is, how it is trained and how it is run: typed sections, presets, files and command-line options.

Each field is listed once, here: its name is the option's, its help is the option's, its type says what is accepted.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import json
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from . import files


def _option(default: Any, help: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass
class ModelConfig:
    """The network, and the assignment and losses of its training."""

    backbone: str = _option(
        "resnet50", "resnet18/34/50/101, resnext101_32x4d, shufflenetv2, or timm:NAME for a timm model", "NAME"
    )
    width: int = _option(
        64, "channels of the backbone's first stage; published ResNets have 64, ShuffleNetV2 116 (1.0x) or 176 (1.5x)"
    )
    num_classes: int = _option(80, "object classes, without background; training takes it from the annotations")
    dcn: Literal["v1", "v2"] | None = _option(
        None, "deformable convolutions in the backbone (needs torchvision)", "v1|v2|none"
    )
    dcn_stages: tuple[int, ...] = _option((3, 4, 5), "backbone stages with deformable convolutions, among 2 to 5")
    frozen_stages: int = _option(1, "freeze the stem and this many backbone stages; -1: train the stem too")
    norm_eval: bool = _option(True, "fix the running statistics of the backbone's batch norms; weight and bias train")
    neck: Literal["fpn", "ghost_pan"] = _option("fpn", "feature pyramid; ghost_pan is NanoDet-Plus's")
    head: Literal["gfl", "nanodet_plus"] = _option(
        "gfl", "convolutions shared by all levels, or for each level its own, depthwise separable ones (nanodet_plus)"
    )
    neck_channels: int = _option(256, "channels of each pyramid level")
    head_channels: int = _option(256, "channels of the head's convolutions")
    head_convs: int = _option(4, "convolutions before each of the head's two outputs")
    head_groups: int = _option(32, "groups of the head's group norms")
    reg_max: int = _option(16, "last bin of each side's distribution (bins 0 to reg_max), in strides")
    strides: tuple[int, ...] = _option((8, 16, 32, 64, 128), "stride of each pyramid level, pixels")
    anchor_scale: float = _option(8.0, "side of a location's anchor box in the assignment, in strides")
    assignment: Literal["atss", "soft_labels"] = _option(
        "atss", "which locations learn an object: by geometry, or by what is predicted there (NanoDet-Plus)"
    )
    topk: int = _option(
        9, "candidates per object and level (atss), or overlaps that its number of locations is the sum of"
    )
    aux_convs: int = _option(
        0, "convolutions of an auxiliary head that assigns the locations in training (soft_labels; 0: no such head)"
    )
    beta: float = _option(2.0, "exponent of quality focal loss")
    loss_weights: tuple[float, float, float] = _option((1.0, 2.0, 0.25), "weights of class, box and DFL loss", "X,X,X")
    center_offset: float = _option(0.0, "offset of a location from its cell's corner, in strides")
    topk_mode: Literal["pair", "anchor"] = _option(
        "pair", "what nms_pre counts: (location, class) pairs as in mmdet 3, or locations as in GFocal v1"
    )
    quality_branch: bool = _option(False, "multiply class scores by a quality predicted from the distributions (V2)")
    legacy: bool = _option(False, "GFocal v1's geometry: centres at (s-1)/2 pixels, boxes one pixel wider")
    mean: tuple[float, float, float] = _option(
        (123.675, 116.28, 103.53), "subtracted from an image's red, green and blue, levels of 0 to 255", "X,X,X"
    )
    std: tuple[float, float, float] = _option((58.395, 57.12, 57.375), "what they are then divided by", "X,X,X")
    channel_order: Literal["rgb", "bgr"] = _option("rgb", "order of the network's input channels")


@dataclass
class DataConfig:
    """Images and annotations: COCO's files, or the format found in the folder."""

    data: str = _option(
        ".", "folder or data.yaml of the data set; its format is found unless COCO's files are there", "DIR|FILE"
    )
    train_annotations: str = _option("annotations/instances_train2017.json", "training annotations", "FILE")
    train_images: str = _option("train2017", "training images", "DIR")
    val_annotations: str = _option("annotations/instances_val2017.json", "validation annotations ('': none)", "FILE")
    val_images: str = _option("val2017", "validation images", "DIR")
    val_share: float = _option(0.2, "share of the images held out where a format is found without validation data")
    keep_empty: bool = _option(False, "train on images without objects too, as pure background")
    workers: int = _option(4, "data-loading processes per training process; 0: load in the process itself")


@dataclass
class TrainConfig:
    """Optimization, schedule, augmentation and logging."""

    backbone_weights: str = _option(
        "", "initial weights: torchvision, timm, a file, or none (from scratch); needed without --init", "NAME|FILE"
    )
    init: str = _option(
        "", "checkpoint or published model to start from; other classes get new class outputs", "NAME|FILE"
    )
    epochs: int = _option(12, "passes over the training images")
    steps: int = _option(0, "length of the training in steps, in place of epochs (0: by epochs)")
    lr_drops: tuple[int, ...] = _option((8, 11), "epochs after which the learning rate is divided by 10 (step)")
    schedule: Literal["step", "cosine"] = _option("step", "learning-rate schedule after the warm-up")
    optimizer: Literal["sgd", "adamw"] = _option("sgd", "optimizer")
    lr: float = _option(0.01, "learning rate for batches of 16 images; scaled linearly with batch_size")
    momentum: float = _option(0.9, "momentum of SGD, beta1 of AdamW")
    weight_decay: float = _option(1e-4, "weight decay")
    warmup_steps: int | None = _option(
        None, "steps of linear warm-up from a thousandth of the rate; none: 500, at most a tenth of all steps", "N"
    )
    layer_decay: float = _option(1.0, "factor on the rate for each stage of the backbone, from the head down")
    norm_decay: bool = _option(True, "weight decay on norms and biases too")
    clip_grad_norm: float = _option(0.0, "max gradient norm (0: off)")
    batch_size: int = _option(16, "images per step, over all processes; 0: as many as fit the GPU")
    aux_epochs: int = _option(10, "epochs after which an auxiliary head no longer trains backbone and neck")
    accumulate: int = _option(1, "parts that a batch is computed in, adding up gradients, to need less memory")
    ema: float = _option(0.0, "decay of an average of the weights, to evaluate and keep in their place (0: off)")
    patience: int = _option(0, "stop after this many evaluations without a higher AP (0: off)")
    class_weights: str = _option("", "weights of the classes in their loss: one each, or balanced", "X,…|balanced")
    repeat_threshold: float = _option(
        0.0, "repeat images of classes that fewer than this share of the images have (0: off)"
    )
    train_short_side: tuple[int, int] = _option((800, 800), "random short side in training, from N to N pixels", "N,N")
    train_long_side: int = _option(1333, "max long side in training, pixels")
    flip: float = _option(0.5, "probability of a horizontal flip")
    augment: str = _option(
        "",
        "augmentation: finetune, or some of copypaste, mosaic, mixup, crop, jitter, color, FILE.py:FUNCTION; "
        "NAME=P sets how often",
        "NAME,…",
    )
    amp: Literal["none", "bf16", "fp16"] = _option("none", "automatic mixed precision")
    fold_norms: bool = _option(False, "fold the backbone's fixed batch norms into its convolutions: faster steps")
    graph: bool = _option(False, "run each step as one CUDA graph, padded to one of a few batch shapes (one GPU)")
    graph_slots: int = _option(100, "objects per image that a graph has room for; larger batches run without one")
    cache: Literal["none", "ram", "disk"] = _option("none", "where to keep decoded training images for later epochs")
    compile: bool = _option(False, "compile the network by torch.compile")
    seed: int = _option(0, "random seed (weights, shuffling, augmentation)")
    eval_every: int = _option(1, "epochs between evaluations; 0: only after the last")
    checkpoint_steps: int = _option(1000, "steps between checkpoints within an epoch; 0: only after each epoch")
    rank_timeout: float = _option(600.0, "seconds that processes wait for each other before they give up")
    log_steps: int = _option(50, "steps between lines of the log; at most an epoch")


@dataclass
class InferenceConfig:
    """From images to boxes: resizing, thresholds, NMS."""

    resize: Literal["keep_ratio", "stretch"] = _option(
        "keep_ratio", "how images are resized, in training too; stretch: to short_side × long_side whatever their shape"
    )
    short_side: int = _option(800, "short side of the resized image, pixels (stretch: its height)")
    long_side: int = _option(1333, "max long side of the resized image, pixels (stretch: its width)")
    size_divisor: int = _option(32, "batches are padded to multiples of this, pixels (in training too)")
    score_threshold: float = _option(0.05, "drop detections with this score or less")
    nms_pre: int = _option(1000, "candidates per level before NMS; 0: all")
    iou_threshold: float = _option(0.6, "NMS drops boxes whose IoU with a better one of their class exceeds this")
    max_detections: int = _option(100, "max detections per image")
    test_batch_size: int = _option(1, "images per evaluation step, per process")


@dataclass
class Config:
    """A detector with its training and inference: what a preset, a file and the command line describe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: InferenceConfig = field(default_factory=InferenceConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Sections of plain values (numbers, strings, lists), as in a JSON file and in a checkpoint."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `preset` reads."""
        files.write_json(path, self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> Config:
        """The inverse of `to_dict`; fields that are not given keep their defaults.

        Raises:
            ValueError: an unknown section or field, or a value that its type does not accept.
        """
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise ValueError(f"gfl.Config: a dictionary of sections is needed, got {files.shown(values)}")
        return replace(cls(), **values)

    def replace(self, **values: Any) -> Config:
        """A copy with fields changed, named without their section (no two sections share a name).

        Raises:
            ValueError: an unknown field, or a value that its type does not accept.
        """
        changes: dict[str, dict[str, Any]] = {section: {} for section in vars(self)}
        for name, value in values.items():
            if name not in SECTION_OF:
                raise ValueError(f"gfl.Config: no field `{name}`{did_you_mean(name, SECTION_OF)}")
            changes[SECTION_OF[name]][name] = value
        return Config(**{name: replace(getattr(self, name), **changed) for name, changed in changes.items()})


SECTION_OF = {part.name: name for name, section in vars(Config()).items() for part in fields(section)}


def replace(section: Any, **values: Any) -> Any:
    """A copy of a section with fields changed, each converted to and checked by its type."""
    hints, title = typing.get_type_hints(type(section)), f"gfl.{type(section).__name__}"
    for name, value in list(values.items()):
        if name not in hints:
            kind = "section" if isinstance(section, Config) else "field"
            known = did_you_mean(name, hints) or f"; there are {', '.join(sorted(hints))}"
            raise ValueError(f"{title}: no {kind} `{name}`{known}")
        values[name] = _convert(f"{title}: `{name}`", hints[name], value)
    return dataclasses.replace(section, **values)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of an error text: the name that is closest to an unknown one, if any is close."""
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _convert(what: str, hint: Any, value: Any) -> Any:
    """`value`, from Python, a file or a command line, as the type that the field declares."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{what} must be a section of fields, got {files.shown(value)}")
        return replace(hint(), **value)
    if origin in (typing.Union, types.UnionType):  # always T | None
        return None if value is None or value == "none" else _convert(what, inner[0], value)
    if origin is tuple:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            raise ValueError(f"{what} must be a list of numbers, got {files.shown(value)}")
        if inner[-1] is not Ellipsis and len(items) != len(inner):
            raise ValueError(f"{what} must have {len(inner)} numbers, got {files.shown(value)}")
        return tuple(_convert(what, inner[0], item) for item in items)
    if origin is Literal and value not in inner:
        raise ValueError(f"{what} must be one of {', '.join(inner)}, got {files.shown(value)}")
    if hint is bool and not isinstance(value, bool):
        raise ValueError(f"{what} must be true or false, got {files.shown(value)}")
    if origin is Literal or hint is bool:
        return value
    try:
        # Paths may be given for texts, but a number or a list is no text, and true no number.
        if hint is str and not isinstance(value, (str, os.PathLike)):
            raise ValueError
        if isinstance(value, (bool, bytes)) or (hint is int and not isinstance(value, str) and int(value) != value):
            raise ValueError
        converted = hint(value)
        if (hint is float and not math.isfinite(converted)) or (hint is int and not -(2**63) <= converted < 2**63):
            raise ValueError
        return converted
    except (TypeError, ValueError, OverflowError):
        limit = " and finite" if hint is float and isinstance(value, float) else ""
        limit = " of 64 bits" if hint is int and type(value) is int else limit
        raise ValueError(f"{what} must be of type {hint.__name__}{limit}, got {files.shown(value)}") from None


def _paper(
    backbone: str = "resnet50",
    epochs: int = 12,
    dcn: str | None = None,
    dcn_stages: tuple[int, ...] = (3, 4, 5),
    *,
    v2: bool = False,
) -> Config:
    """A row of the tables of GFL (arXiv 2006.04388, table 8) or GFLv2 (arXiv 2011.12885); 2x is multi-scale."""
    return Config().replace(
        backbone=backbone,
        dcn=dcn,
        dcn_stages=dcn_stages,
        epochs=epochs,
        lr_drops=(epochs * 2 // 3, epochs * 11 // 12),
        train_short_side=(480, 800) if epochs == 24 else (800, 800),
        quality_branch=v2,
        topk_mode="anchor" if v2 else "pair",
    )


def _tiny() -> Config:
    """For small images, few classes and a CPU: trained from scratch, batch norms too."""
    small = Config().replace(backbone="resnet18", width=32, frozen_stages=-1, norm_eval=False, backbone_weights="none")
    small = small.replace(neck_channels=64, head_channels=64, head_convs=2, head_groups=8, workers=2)
    return small.replace(
        short_side=192, long_side=192, train_short_side=(192, 192), train_long_side=192, test_batch_size=16
    )


def _nanodet_plus(size: int, width: int = 116, channels: int = 96) -> Config:
    """NanoDet-Plus as its authors trained it, but for the augmentation and a rate that falls to 0: 300 epochs."""
    model = Config().replace(backbone="shufflenetv2", width=width, neck="ghost_pan", head="nanodet_plus")
    model = model.replace(frozen_stages=-1, norm_eval=False, neck_channels=channels, head_channels=channels)
    model = model.replace(head_convs=2, reg_max=7, strides=(8, 16, 32, 64), channel_order="bgr")
    model = model.replace(assignment="soft_labels", topk=13, aux_convs=4)
    sized = model.replace(resize="stretch", short_side=size, long_side=size, test_batch_size=8)
    sized = sized.replace(train_short_side=(size, size), train_long_side=size, batch_size=96)
    trained = sized.replace(optimizer="adamw", lr=0.001 / 6, weight_decay=0.05, clip_grad_norm=35.0)
    return trained.replace(schedule="cosine", epochs=300, eval_every=10, ema=0.9998)


# Whole detectors by name; each call gives a fresh configuration.
PRESETS: dict[str, Callable[[], Config]] = {
    "gfl_r50_1x": _paper,
    "gfl_r50_2x": partial(_paper, epochs=24),
    "gfl_r101_2x": partial(_paper, "resnet101", 24),
    "gfl_r101_dcnv2_2x": partial(_paper, "resnet101", 24, "v2"),
    "gfl_x101_32x4d_2x": partial(_paper, "resnext101_32x4d", 24),
    "gfl_x101_32x4d_dcnv2_2x": partial(_paper, "resnext101_32x4d", 24, "v2"),
    # As mmdet published them.
    "gfl_r101_dcn": partial(_paper, "resnet101", 24, "v1"),
    "gfl_x101_32x4d_dcn": partial(_paper, "resnext101_32x4d", 24, "v1", (4, 5)),
    "gflv2_r50_1x": partial(_paper, v2=True),
    "gflv2_r50_2x": partial(_paper, epochs=24, v2=True),
    "gflv2_r101_2x": partial(_paper, "resnet101", 24, v2=True),
    "gflv2_r101_dcnv2_2x": partial(_paper, "resnet101", 24, "v2", v2=True),
    "gflv2_x101_32x4d_dcnv2_2x": partial(_paper, "resnext101_32x4d", 24, "v2", v2=True),
    "gfl_r18_1x": partial(_paper, "resnet18"),
    "gfl_tiny": _tiny,
    "nanodet_plus_m_320": partial(_nanodet_plus, 320),
    "nanodet_plus_m_416": partial(_nanodet_plus, 416),
    "nanodet_plus_m_1.5x_320": partial(_nanodet_plus, 320, 176, 128),
    "nanodet_plus_m_1.5x_416": partial(_nanodet_plus, 416, 176, 128),
}


# Fields by the name of a recipe, which changes those of a preset; for data of one's own, of hundreds or thousands of
# images, the paper's schedule is too short and its rate falls in steps that such a training may not reach.
RECIPES: dict[str, dict[str, Any]] = {
    "finetune": {
        "epochs": 50,
        "schedule": "cosine",
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.05,
        "clip_grad_norm": 10.0,
        "norm_decay": False,
        "ema": 0.999,
        "batch_size": 8,
        "keep_empty": True,
        "eval_every": 5,
        "augment": "finetune",
    }
}


def preset(name: str) -> Config:
    """The configuration of that name, or of that file: TOML, YAML (with PyYAML installed) or JSON, by its suffix.

    Raises:
        ValueError: neither a preset nor a file, or a file that is not a configuration.
        RuntimeError: a YAML file, and PyYAML is not installed.
    """
    if name in PRESETS:
        return PRESETS[name]()
    path, known = Path(name), ", ".join(PRESETS)
    if not path.is_file():
        meant = did_you_mean(name, PRESETS)
        raise ValueError(f"gfl: `config` must be one of {known} or a TOML, YAML or JSON file, got {name!r}{meant}")
    try:
        return Config.from_dict(parse_file(path))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"gfl: {name} is not a configuration: {error}") from None


def parse_file(path: Path) -> Any:
    """The contents of a TOML, YAML or JSON file, by its suffix.

    Raises:
        ValueError: it is not what its suffix says.
        RuntimeError: a YAML file, and PyYAML is not installed.
    """
    module, function = PARSERS.get(path.suffix.lower(), ("json", "loads"))
    try:
        parse = getattr(importlib.import_module(module), function)
    except ImportError:
        raise RuntimeError(f"{path}: YAML files need PyYAML: pip install pyyaml") from None
    content = files.read_bytes(path, LARGEST_FILE)
    try:
        return parse(content.decode("utf-8-sig"))
    except Exception as error:  # each parser has its own kind
        raise ValueError(str(error)) from None


LARGEST_FILE = 2**24
PARSERS = {".toml": ("tomllib" if sys.version_info >= (3, 11) else "tomli", "loads")}
PARSERS |= dict.fromkeys((".yaml", ".yml"), ("yaml", "safe_load"))

WORDS = {"True": "on", "False": "off", "None": "none"}
METAVARS = {int: "N", float: "X", tuple[int, ...]: "N,…"}


def add_options(
    parser: argparse.ArgumentParser, *sections: str, first: Collection[str] = (), hidden: Collection[str] = ()
) -> None:
    """Give `parser` one option per field of the sections, without defaults: an option not typed changes nothing.

    Fields in `first` join the parser's own options, the others get a group per section; the help omits `hidden` ones.
    """
    for name in sections:
        section = getattr(Config(), name)
        group = parser.add_argument_group(f"{name} options", type(section).__doc__)
        hints = typing.get_type_hints(type(section))
        for part in fields(section):
            hint, default = hints[part.name], part.default
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else WORDS.get(str(default), str(default))
            text = part.metadata["help"].replace("%", "%%") + (f" [{shown}]" if shown else "")
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            if hint is not bool:
                how = {"metavar": part.metadata["metavar"] or METAVARS.get(hint) or "|".join(typing.get_args(hint))}
            (parser if part.name in first else group).add_argument(
                "--" + part.name.replace("_", "-"),
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS if part.name in hidden else text,
                **how,
            )


def overrides(config: Config, options: argparse.Namespace) -> Config:
    """`config` with the fields that were typed."""
    return config.replace(**{name: value for name, value in vars(options).items() if name in SECTION_OF})
