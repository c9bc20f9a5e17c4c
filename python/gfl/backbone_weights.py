# SPDX-License-Identifier: Apache-2.0
"""Initial weights of a backbone: a file, published ones, or none at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from . import checkpoint, files
from .models.backbone import Backbone
from .models.resnet import ARCHITECTURES, ResNet
from .models.shufflenet import ShuffleNetV2
from .models.timm_backbone import TimmBackbone
from .zoo.download import cached

# The layers after the last map, which a detector doesn't have; ShuffleNetV2 has a convolution there.
CLASSIFIER = ("fc.", "head.", "classifier.", "conv5.")
# Pixel statistics in [0, 1]; torchvision's and this package's.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Trained on ImageNet, as the published detectors' backbones; torchvision has no ResNeXt-101 32x4d. A name ends with the
# first digits of the file's SHA-256.
PUBLISHED = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    "resnext101_32x4d": "https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth",
    "shufflenetv2_x1": "https://download.pytorch.org/models/shufflenetv2_x1-5666bf0f80.pth",
    "shufflenetv2_x1_5": "https://download.pytorch.org/models/shufflenetv2_x1_5-3c479a10.pth",
}
# Of the networks that were published, by the channels of their first stage.
SHUFFLENETS = {116: "shufflenetv2_x1", 176: "shufflenetv2_x1_5"}
RESNET_WIDTH = 64


def load(backbone: Backbone, choice: str) -> list[str]:
    """Initialise a detector's backbone; returns notes for the log, in lines.

    `choice` is "torchvision" or "timm", the published weights of that network, downloaded unless they are in the cache;
    "none": the random ones stay, and all stages and batch norms are trained, since frozen random layers would learn
    nothing; else a file with weights of that network, as torchvision, timm or mmdet write them, or a whole detector's.

    Raises:
        ValueError: there are no such weights for this backbone, or a file that doesn't fit it or is damaged, named.
        OSError: a file that can't be read, or can't be downloaded: says what to fetch and where to put it.
        RuntimeError: timm is not installed.
    """
    if choice == "none":
        backbone.freeze(-1, norm_eval=False)
        return ["backbone weights: none; so no stage is frozen and the batch norms are trained"]
    if choice == "timm":
        return _timm(backbone)
    if not choice:
        raise ValueError("`backbone_weights` must be a file, torchvision, timm or none, got ''")
    if choice == "torchvision":
        choice = str(cached(PUBLISHED[_published_name(backbone)]))
    _fill(backbone, checkpoint.normalise(checkpoint.read(choice)).state_dict, choice)
    return [f"backbone weights: {choice}"]


def _published_name(backbone: Backbone) -> str:
    if not isinstance(backbone, ShuffleNetV2):
        return _resnet_name(backbone, "torchvision")
    width = backbone.channels[0]
    if width not in SHUFFLENETS:
        raise _width_error("116 or 176", width)
    return SHUFFLENETS[width]


def _resnet_name(backbone: Backbone, choice: str) -> str:
    if not isinstance(backbone, ResNet):
        kinds = "ResNets and ShuffleNetV2" if choice == "torchvision" else "ResNets and timm's backbones"
        raise ValueError(f"`backbone_weights` {choice} is for {kinds}; for a timm backbone say timm")
    width = backbone.conv1.out_channels
    if width != RESNET_WIDTH:
        raise _width_error(str(RESNET_WIDTH), width)
    return next(name for name, known in ARCHITECTURES.items() if known == backbone.architecture)


def _width_error(published: str, width: int) -> ValueError:
    return ValueError(
        f"`backbone_weights`: the published weights are for a `width` of {published}, this backbone has {width}"
    )


def _timm(backbone: Backbone) -> list[str]:
    name = backbone.name if isinstance(backbone, TimmBackbone) else _resnet_name(backbone, "timm")
    try:
        import timm
    except ImportError as error:
        raise RuntimeError("`backbone_weights` timm needs timm: pip install timm") from error
    published: Any = timm.get_pretrained_cfg(name)
    if published is None or not (published.hf_hub_id or published.url):
        raise ValueError(f"`backbone_weights`: timm {timm.__version__} has no weights for {name}")
    try:
        body = timm.create_model(name, pretrained=True, features_only=isinstance(backbone, TimmBackbone))
    except Exception as error:  # whatever the libraries below it raise without a network
        place = f"https://huggingface.co/{published.hf_hub_id}" if published.hf_hub_id else published.url
        raise OSError(
            f"timm's weights of {name} not downloaded ({type(error).__name__}: {files.reason(error).splitlines()[0]}):"
            f" fetch the model.safetensors or pytorch_model.bin of {place} and give that file as `backbone_weights`"
        ) from None
    target: nn.Module = backbone.body if isinstance(backbone, TimmBackbone) else backbone
    _fill(target, body.state_dict(), f"timm's {name}")
    notes = [f"backbone weights: timm's {name}, {published.tag}"]
    mean, std = tuple(published.mean), tuple(published.std)
    if (mean, std) != (MEAN, STD):
        notes.append(
            f"they were trained on pixels of mean {mean} and deviation {std}, not of {MEAN} and {STD} as here: the"
            " batch norms have to learn that"
        )
    return notes


def _fill(backbone: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy all weights but a classifier's; a file may lack the offsets of deformable convolutions, which stay at 0."""
    if any(key.startswith("backbone.") for key in weights):
        weights = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    weights = {key: value for key, value in weights.items() if not key.startswith(CLASSIFIER)}
    if isinstance(backbone, TimmBackbone) and not any(key.startswith("body.") for key in weights):
        weights = backbone.as_features(weights)
        backbone = backbone.body
    offsets = {key: value for key, value in backbone.state_dict().items() if ".conv_offset." in key}
    try:
        checkpoint.load_weights(backbone, {**offsets, **weights})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
