# SPDX-License-Identifier: Apache-2.0
"""What a detector is and how it is trained and tested: typed sections, the paper's presets, JSON and command line.

A field is listed once, here: its name is the option's, its text is the option's help, its type says what is accepted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelConfig:
    """The network."""

    backbone: str = _option(
        "resnet50", "resnet18, resnet34, resnet50, resnet101, resnext101_32x4d, or timm:NAME for any timm model"
    )
    width: int = _option(64, "channels of the backbone's stem and first stage (64 in every published ResNet)")
    num_classes: int = _option(80, "classes of objects, without a background")
    dcn: Literal["v1", "v2"] | None = _option(None, "deformable convolutions in the backbone (needs torchvision)")
    dcn_stages: tuple[int, ...] = _option((3, 4, 5), "which of the stages c2 to c5 have them")
    frozen_stages: int = _option(1, "the stem and this many stages are not trained; -1: all is trained, the stem too")
    norm_eval: bool = _option(True, "batch norms of the backbone keep their statistics (weight and bias are trained)")
    neck_channels: int = _option(256, "channels of every level of the pyramid")
    head_channels: int = _option(256, "channels of the head's convolutions")
    head_convs: int = _option(4, "convolutions before each of the head's two outputs")
    head_groups: int = _option(32, "groups of the head's group norms")
    reg_max: int = _option(16, "last bin of a side's distribution, in strides (bins are 0 to reg_max)")
    strides: tuple[int, ...] = _option((8, 16, 32, 64, 128), "pixels between the locations of each level")
    anchor_scale: float = _option(8.0, "side of the square that stands for a location in the assignment, in strides")
    topk: int = _option(9, "candidates an object and level in the assignment (ATSS)")
    beta: float = _option(2.0, "exponent of quality focal loss")
    loss_weights: tuple[float, float, float] = _option((1.0, 2.0, 0.25), "of the class, box and distribution losses")
    center_offset: float = _option(0.0, "offset of a location from its cell's corner, in cells")
    topk_mode: Literal["pair", "anchor"] = _option(
        "pair", "what a level's nms_pre counts: (location, class) pairs as mmdet 3, or locations as GFocal v1"
    )
    quality_branch: bool = _option(False, "GFocal V2's: the distributions' peaks say how far the class scores hold")
    legacy: bool = _option(False, "GFocal v1's geometry: centre (s-1)/2 pixels, boxes one pixel wider")


@dataclass
class DataConfig:
    """Images and annotations in COCO's format."""

    data: str = _option(".", "folder that the four paths below start from")
    train_annotations: str = _option("annotations/instances_train2017.json", "annotation file to train on")
    train_images: str = _option("train2017", "folder of the images to train on")
    val_annotations: str = _option("annotations/instances_val2017.json", "annotation file to evaluate on; '' for none")
    val_images: str = _option("val2017", "folder of the images to evaluate on")
    keep_empty: bool = _option(False, "train on images without objects too; they are background as a whole")
    workers: int = _option(4, "processes that read and augment images, for each training process; 0: none")


@dataclass
class TrainConfig:
    """The training."""

    backbone_weights: str = _option(
        "", "start of the backbone: a FILE, torchvision, timm, or none (then all of it is trained, its norms too)"
    )
    init: str = _option("", "checkpoint whose weights the training starts from; a head of other classes stays new")
    epochs: int = _option(12, "passes over the training images")
    lr_drops: tuple[int, ...] = _option(
        (8, 11), "epochs after which the learning rate falls to a tenth (schedule step)"
    )
    schedule: Literal["step", "cosine"] = _option("step", "fall of the learning rate after the warm-up")
    optimizer: Literal["sgd", "adamw"] = _option("sgd", "optimizer")
    lr: float = _option(0.01, "learning rate for a batch of 16 images, scaled linearly with batch_size")
    momentum: float = _option(0.9, "momentum of SGD; first beta of AdamW")
    weight_decay: float = _option(1e-4, "weight decay")
    warmup_steps: int = _option(500, "steps over which the learning rate rises from a thousandth")
    clip_grad_norm: float = _option(0.0, "largest norm of the gradient; 0: not limited")
    batch_size: int = _option(16, "images a step, over all processes")
    train_short_side: tuple[int, int] = _option(
        (800, 800), "range of the short side in training, pixels, drawn an image"
    )
    train_long_side: int = _option(1333, "longest side in training, pixels")
    flip: float = _option(0.5, "share of the images that are mirrored in training")
    amp: Literal["none", "bf16", "fp16"] = _option("none", "type of automatic mixed precision")
    fold_norms: bool = _option(
        False, "backbone norms that keep their statistics are folded into the convolutions while training: fewer passes"
    )
    graph: bool = _option(False, "the whole step as a CUDA graph for each size of batch (one GPU; the first 16 sizes)")
    graph_slots: int = _option(100, "objects an image that a graph has room for; batches with more go without")
    seed: int = _option(0, "of initial weights, order and augmentation")
    eval_every: int = _option(1, "epochs between evaluations; 0: only after the last")
    checkpoint_steps: int = _option(1000, "steps between checkpoints inside an epoch; 0: only after each epoch")
    log_steps: int = _option(50, "steps between two rows of the log")


@dataclass
class TestConfig:
    """Reading the boxes off the network's maps."""

    __test__ = False  # its name is not a test's

    short_side: int = _option(800, "short side of the images, pixels")
    long_side: int = _option(1333, "longest side of the images, pixels")
    size_divisor: int = _option(32, "batches are padded to multiples of this, pixels (in training too)")
    score_threshold: float = _option(0.05, "scores at or below this are dropped")
    nms_pre: int = _option(1000, "candidates a level that are kept before NMS; 0: all")
    iou_threshold: float = _option(0.6, "boxes of a class that overlap a better one by more than this are dropped")
    max_detections: int = _option(100, "boxes kept an image")
    test_batch_size: int = _option(1, "images a step of an evaluation, for each process")


@dataclass
class Config:
    """A detector with its training and test: one preset, one JSON file, one command line."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    test: TestConfig = field(default_factory=TestConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Sections of plain values (numbers, strings, lists), as in a JSON file and in a checkpoint."""
        return {name: _plain(dataclasses.asdict(section)) for name, section in self.sections()}

    def sections(self) -> list[tuple[str, Any]]:
        return [(part.name, getattr(self, part.name)) for part in fields(self)]

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, Any]]) -> Config:
        """The inverse of `to_dict`; fields that are not given keep their defaults.

        Raises:
            ValueError: a section or field that there is not, or a value that its type does not take.
        """
        config = cls()
        for name, section in values.items():
            if name not in dict(config.sections()):
                raise ValueError(f"gfl.Config: no section `{name}`; there are {', '.join(dict(config.sections()))}")
            setattr(config, name, replace(getattr(config, name), **section))
        return config

    def replace(self, **values: Any) -> Config:
        """A copy with fields changed, named without their section (no two sections share a name).

        Raises:
            ValueError: a field that there is not, or a value that its type does not take.
        """
        copy = Config.from_dict(self.to_dict())
        for name, value in values.items():
            section = copy._section_of(name)
            setattr(copy, section, replace(getattr(copy, section), **{name: value}))
        return copy

    def _section_of(self, option: str) -> str:
        for name, section in self.sections():
            if option in {part.name for part in fields(section)}:
                return name
        raise ValueError(f"gfl.Config: no field `{option}`")


def replace(section: Any, **values: Any) -> Any:
    """A copy of a section with fields changed, each converted to and checked by its type."""
    hints = typing.get_type_hints(type(section))
    known = {part.name for part in fields(section)}
    for name in values:
        if name not in known:
            raise ValueError(f"gfl.{type(section).__name__}: no field `{name}`; there are {', '.join(sorted(known))}")
    checked = {name: _convert(f"gfl.{type(section).__name__}: `{name}`", hints[name], v) for name, v in values.items()}
    return dataclasses.replace(section, **checked)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _convert(what: str, hint: Any, value: Any) -> Any:
    """`value`, from Python, JSON or a command line, as the type that the field declares."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None
        return _convert(what, next(part for part in inner if part is not type(None)), value)
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{what} must be one of {', '.join(map(str, inner))}, got {value!r}")
        return value
    if origin is tuple:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            raise ValueError(f"{what} must be a list of numbers, got {value!r}")
        if inner[-1] is not Ellipsis and len(items) != len(inner):
            raise ValueError(f"{what} must have {len(inner)} numbers, got {value!r}")
        return tuple(_convert(what, inner[0], item) for item in items)
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{what} must be true or false, got {value!r}")
    try:
        if hint is int and not isinstance(value, str) and int(value) != value:
            raise ValueError
        return hint(value)
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be of type {hint.__name__}, got {value!r}") from None


def _paper(backbone: str = "resnet50", epochs: int = 12, multi_scale: bool = False, dcn: str | None = None) -> Config:
    """A row of the paper's table 8 (arXiv 2006.04388): 1x or 2x schedule, the latter at several scales."""
    return Config().replace(
        backbone=backbone,
        dcn=dcn,
        epochs=epochs,
        lr_drops=(epochs * 2 // 3, epochs * 11 // 12),
        train_short_side=(480, 800) if multi_scale else (800, 800),
    )


def _second(backbone: str = "resnet50", epochs: int = 12, multi_scale: bool = False, dcn: str | None = None) -> Config:
    """A row of the tables of version 2 (arXiv 2011.12885): the first's training, and the best locations of a level."""
    return _paper(backbone, epochs, multi_scale, dcn).replace(quality_branch=True, topk_mode="anchor")


def _tiny() -> Config:
    """For small images, few classes and a CPU: trained from nothing, its norms too."""
    return Config().replace(
        backbone="resnet18",
        width=32,
        frozen_stages=-1,
        norm_eval=False,
        neck_channels=64,
        head_channels=64,
        head_convs=2,
        head_groups=8,
        short_side=192,
        long_side=192,
        train_short_side=(192, 192),
        train_long_side=192,
        workers=2,
        backbone_weights="none",
        test_batch_size=16,
    )


# Names of whole detectors; each call gives a fresh one.
PRESETS: dict[str, Callable[[], Config]] = {
    "gfl_r50_1x": _paper,
    "gfl_r50_2x": lambda: _paper(epochs=24, multi_scale=True),
    "gfl_r101_2x": lambda: _paper("resnet101", 24, True),
    "gfl_r101_dcnv2_2x": lambda: _paper("resnet101", 24, True, "v2"),
    "gfl_x101_32x4d_2x": lambda: _paper("resnext101_32x4d", 24, True),
    "gfl_x101_32x4d_dcnv2_2x": lambda: _paper("resnext101_32x4d", 24, True, "v2"),
    "gflv2_r50_1x": _second,
    "gflv2_r50_2x": lambda: _second(epochs=24, multi_scale=True),
    "gflv2_r101_2x": lambda: _second("resnet101", 24, True),
    "gflv2_r101_dcnv2_2x": lambda: _second("resnet101", 24, True, "v2"),
    "gflv2_x101_32x4d_dcnv2_2x": lambda: _second("resnext101_32x4d", 24, True, "v2"),
    "gfl_r18_1x": lambda: _paper("resnet18"),
    "gfl_tiny": _tiny,
}


def preset(name: str) -> Config:
    """The configuration of that name, or of that JSON file.

    Raises:
        ValueError: neither a preset nor a file of that name, or a file that is not a configuration.
    """
    if name in PRESETS:
        return PRESETS[name]()
    if not Path(name).is_file():
        raise ValueError(f"gfl: `config` must be one of {', '.join(PRESETS)} or a JSON file, got {name!r}")
    try:
        return Config.from_dict(json.loads(Path(name).read_text()))
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"gfl: {name} is not a configuration: {error}") from None


def add_options(parser: argparse.ArgumentParser, *sections: str) -> None:
    """Gives `parser` one option a field of the sections, without defaults: an option not typed changes nothing."""
    for name, section in Config().sections():
        if name not in sections:
            continue
        group = parser.add_argument_group(name, type(section).__doc__)
        hints = typing.get_type_hints(type(section))
        for part in fields(section):
            option = "--" + part.name.replace("_", "-")
            text = f"{part.metadata['help']} [{_shown(part.default)}]".replace("%", "%%")
            if hints[part.name] is bool:
                group.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            else:
                group.add_argument(option, default=argparse.SUPPRESS, metavar=_metavar(hints[part.name]), help=text)


def overrides(config: Config, options: argparse.Namespace) -> Config:
    """`config` with the fields that were typed."""
    names = {part.name for _, section in config.sections() for part in fields(section)}
    return config.replace(**{name: value for name, value in vars(options).items() if name in names})


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value) or "''"


def _metavar(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_metavar(part) for part in inner if part is not type(None)) + "|none"
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin is tuple:
        return ",".join(["N"] * len(inner)) if inner[-1] is not Ellipsis else "N,…"
    return {"int": "N", "float": "X", "str": "TEXT"}[hint.__name__]
