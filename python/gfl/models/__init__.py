# SPDX-License-Identifier: Apache-2.0
"""Detectors by name, and from a configuration."""

from __future__ import annotations

import importlib
from typing import Any

from .. import config as configuration
from .. import zoo
from ..config import InferenceConfig, ModelConfig
from .backbone import STRIDES, Backbone
from .gfl import GFL
from .head import PEAKS
from .losses import SOFT_LABELS
from .resnet import ARCHITECTURES, ResNet
from .shufflenet import ShuffleNetV2
from .timm_backbone import TimmBackbone

__all__ = ["GFL", "Backbone", "build", "create_model"]

TIMM, SHUFFLENET = "timm:", "shufflenetv2"
# What `gfl_ops` takes.
MAX_LEVELS, MAX_REG_MAX = 8, 128
# Beyond any network: what a file claims may not take all memory.
MAX_CHANNELS, MAX_CONVS = 2**20, 64


def create_model(name: str, num_classes: int = 80, *, pretrained: bool = False, **fields: Any) -> GFL:
    """A detector with random or published weights, by the name of a preset.

    Args:
        name: of a preset in `gfl.PRESETS`: gfl_… of the paper, gflv2_… of version 2 (arXiv 2011.12885), whose scores
            are class times quality, gfl_r18_1x or gfl_tiny for small work, nanodet_plus_… for CPUs; or a file with a
            configuration.
        num_classes: C, without a background.
        pretrained: take the weights that were published for the preset (`gfl models` lists them), downloaded the first
            time; for another number of classes than theirs the class layer is random.
        fields: any of `gfl.config.ModelConfig`, such as ``dcn="v1", dcn_stages=(4, 5)``, instead of the preset's.

    Raises:
        ValueError: no such preset or field, or a value that a field does not take; no published weights for it.
        OSError: they can't be downloaded.
        RuntimeError: a timm backbone where timm is not installed.
    """
    found = configuration.preset(name)
    model = build(configuration.replace(found.model, num_classes=num_classes, **fields), found.test)
    if pretrained:
        if zoo.find(name) is None:
            raise ValueError(f"gfl.create_model: `pretrained` is for published models, {name} is a file")
        importlib.import_module("gfl.checkpoint").start(model, name)  # which is built on this package
    return model


def build(config: ModelConfig, test: InferenceConfig | None = None, *, training: bool = False) -> GFL:
    """A detector with random weights; by default boxes are read from its maps as in the paper.

    For a `training` it has the auxiliary head, if its configuration wants one. The errors are those of `create_model`.
    """
    _check(config)
    if config.backbone.startswith(TIMM):
        backbone: Backbone = TimmBackbone(config.backbone[len(TIMM) :], config.frozen_stages, config.norm_eval)
    elif config.backbone == SHUFFLENET:
        backbone = ShuffleNetV2(config)
    else:
        backbone = ResNet(ARCHITECTURES[config.backbone], config)
    model = GFL(backbone, config, test)
    if training:
        model.add_auxiliary()
    return model


def _check(config: ModelConfig) -> None:
    timm = config.backbone.startswith(TIMM)
    architecture, shuffle = ARCHITECTURES.get(config.backbone), config.backbone == SHUFFLENET
    names = ", ".join([*ARCHITECTURES, SHUFFLENET])
    levels, soft = len(config.strides), config.assignment == SOFT_LABELS
    ghosts, nanodet = config.neck == "ghost_pan", config.head == "nanodet_plus"
    most = len(STRIDES) + 1 if ghosts else MAX_LEVELS
    strides = 3 <= levels <= most and tuple(config.strides) == tuple(STRIDES[0] * 2**i for i in range(levels))
    deformable = architecture is not None and architecture.bottleneck
    grouped = architecture is not None and architecture.groups > 1
    quality = config.reg_max + 1 >= PEAKS or not config.quality_branch
    divides = nanodet or config.head_channels % max(config.head_groups, 1) == 0
    positive = ("width", "num_classes", "neck_channels", "head_channels", "head_groups", "topk")
    rules = [(name, getattr(config, name) >= 1, "must be >= 1") for name in positive]
    rules += [(name, getattr(config, name) <= MAX_CHANNELS, f"must be <= {MAX_CHANNELS}") for name in positive]
    rules += [
        ("head_convs", 0 <= config.head_convs <= MAX_CONVS, f"must be in [0, {MAX_CONVS}]"),
        ("anchor_scale", config.anchor_scale > 0, "must be > 0"),
        ("beta", config.beta >= 0, "must be >= 0"),
        ("reg_max", 1 <= config.reg_max <= MAX_REG_MAX, f"must be in [1, {MAX_REG_MAX}]"),
        ("quality_branch", quality, f"needs a `reg_max` of {PEAKS - 1} or more"),
        ("quality_branch", not (nanodet and config.quality_branch), "is for `head` gfl"),
        ("legacy", not (soft and config.legacy), "is for `assignment` atss"),
        ("aux_convs", 0 <= config.aux_convs <= MAX_CONVS, f"must be in [0, {MAX_CONVS}]"),
        ("aux_convs", soft or config.aux_convs == 0, f"is for `assignment` {SOFT_LABELS}"),
        ("neck_channels", not ghosts or config.neck_channels % 2 == 0, "must be even for ghost_pan"),
        ("std", min(config.std) > 0, "must be > 0"),
        ("frozen_stages", -1 <= config.frozen_stages <= 4, "must be in [-1, 4]"),
        ("head_groups", divides, f"must divide `head_channels`, {config.head_channels}"),
        ("strides", strides, f"must be 8, 16, 32 and so on, each twice the last, 3 to {most} of them"),
        ("dcn_stages", set(config.dcn_stages) <= {2, 3, 4, 5}, "must be among 2, 3, 4, 5"),
        ("backbone", timm or shuffle or architecture is not None, f"must be one of {names}, or timm:NAME"),
        ("dcn", config.dcn is None or deformable, "is for resnet50, resnet101 and resnext101_32x4d"),
        # ResNeXt's 32 groups of 4·width/64 channels.
        ("width", not shuffle or config.width % 2 == 0, f"must be even for {SHUFFLENET}"),
        ("width", not grouped or config.width % 16 == 0, f"must be in 16s for {config.backbone}"),
    ]
    for name, holds, rule in rules:
        if not holds:
            raise ValueError(f"gfl.ModelConfig: `{name}` {rule}, got {getattr(config, name)!r}")
