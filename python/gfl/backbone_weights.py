# SPDX-License-Identifier: Apache-2.0
"""Weights that a backbone starts with: a file, published ones, or none at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint
from .models.backbone import Backbone
from .models.resnet import ARCHITECTURES, ResNet
from .models.timm_backbone import TimmBackbone

# The layers after the last map, which a detector doesn't have.
CLASSIFIER = ("fc.", "head.", "classifier.")
# What pixels are divided by, having taken away the mean, in 255ths of full intensity; torchvision's and ours.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Published(NamedTuple):
    """A file on the net; its SHA-256 begins with the digits at the end of its name."""

    url: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def sha256(self) -> str:
        return self.name.removesuffix(".pth").rpartition("-")[2]


# Trained on ImageNet; those that the published detectors started from. torchvision has no ResNeXt-101 32x4d.
TORCHVISION = {
    "resnet18": Published("https://download.pytorch.org/models/resnet18-f37072fd.pth"),
    "resnet34": Published("https://download.pytorch.org/models/resnet34-b627a593.pth"),
    "resnet50": Published("https://download.pytorch.org/models/resnet50-0676ba61.pth"),
    "resnet101": Published("https://download.pytorch.org/models/resnet101-63fe2227.pth"),
    "resnext101_32x4d": Published("https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth"),
}


def load(backbone: Backbone, choice: str) -> list[str]:
    """Give a backbone its first weights.

    Args:
        backbone: of a detector.
        choice: "torchvision" or "timm", the published weights of that network, downloaded where they are not on this
            machine yet; "none": the random ones stay, and since frozen stages and norms in evaluation would learn
            nothing from them, all stages are trained and the norms too; else a file with weights of that network, as
            torchvision, timm or mmdet have them, or a whole detector of ours or mmdet's.

    Returns:
        What was done, in lines.

    Raises:
        ValueError: there are no such weights for this backbone, or a file that doesn't fit it or is damaged, named.
        OSError: a file that can't be read, or can't be downloaded: says what to fetch and where to put it.
        RuntimeError: timm is not installed.
    """
    if choice == "none":
        backbone.freeze(-1, norm_eval=False)
        return ["backbone weights: none; so no stage is frozen and the batch norms are trained"]
    if choice == "torchvision":
        return _torchvision(backbone)
    if choice == "timm":
        return _timm(backbone)
    if not choice:
        raise ValueError("`backbone_weights` must be a file, torchvision, timm or none, got ''")
    content = checkpoint.normalise(checkpoint.read(choice)).state_dict
    _fill(backbone, content, choice)
    return [f"backbone weights: {choice}"]


def _torchvision(backbone: Backbone) -> list[str]:
    name = _resnet_name(backbone, "torchvision")
    published = TORCHVISION[name]
    path = _fetched(published)
    _fill(backbone, checkpoint.normalise(checkpoint.read(path)).state_dict, str(path))
    return [f"backbone weights: {path}"]


def _resnet_name(backbone: Backbone, choice: str) -> str:
    if not isinstance(backbone, ResNet):
        raise ValueError(f"`backbone_weights` {choice} is for ResNets; for a timm backbone say timm")
    width = backbone.conv1.out_channels
    if width != 64:
        raise ValueError(
            f"`backbone_weights`: the published weights are for a `width` of 64, this backbone has {width}"
        )
    return next(name for name, known in ARCHITECTURES.items() if known == backbone.architecture)


def _fetched(published: Published) -> Path:
    """The file in torch's own cache, downloaded if it isn't there, its SHA-256 checked."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / published.name
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(published.url, str(path), published.sha256)
        except (OSError, RuntimeError) as error:
            raise OSError(f"not downloaded ({error}): fetch {published.url} and put it into {folder}") from None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if not digest.hexdigest().startswith(published.sha256):
        raise ValueError(
            f"{path}: damaged or another file: its SHA-256 begins with {digest.hexdigest()[:8]}, not with"
            f" {published.sha256}; delete it and fetch {published.url} again"
        )
    return path


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
    except Exception as error:  # Whatever the libraries below it raise without a network.
        place = f"https://huggingface.co/{published.hf_hub_id}" if published.hf_hub_id else published.url
        raise OSError(
            f"timm's weights of {name} not downloaded ({type(error).__name__}: {str(error).splitlines()[0]}): fetch the"
            f" model.safetensors or pytorch_model.bin of {place} and give that file as `backbone_weights`"
        ) from None
    target: nn.Module = backbone.body if isinstance(backbone, TimmBackbone) else backbone
    _fill(target, body.state_dict(), f"timm's {name}")
    return [f"backbone weights: timm's {name}, {published.tag}", *_other_pixels(published)]


def _other_pixels(published: Any) -> list[str]:
    if tuple(published.mean) == MEAN and tuple(published.std) == STD:
        return []
    return [
        f"they were trained on pixels of mean {tuple(published.mean)} and deviation {tuple(published.std)}, not of"
        f" {MEAN} and {STD} as here: the batch norms have to learn that"
    ]


def _fill(backbone: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a backbone, all that both have; offsets of deformable convolutions may stay at 0."""
    if any(key.startswith("backbone.") for key in weights):
        weights = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    weights = {key: value for key, value in weights.items() if not key.startswith(CLASSIFIER)}
    if isinstance(backbone, TimmBackbone) and not any(key.startswith("body.") for key in weights):
        weights = backbone.as_features(weights)
        backbone = backbone.body
    own = backbone.state_dict()
    offsets = {key: value for key, value in own.items() if ".conv_offset." in key}
    try:
        checkpoint.load_weights(backbone, {**offsets, **weights})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
