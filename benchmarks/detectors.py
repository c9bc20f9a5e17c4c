# SPDX-License-Identifier: Apache-2.0
"""Ways to run one whole detector, from uint8 images to boxes, and each of its parts.

`Plain` is the network as it is written, NCHW, under autocast for half precision, with mmdet 3.3's steps after it;
`Optimized` is what ``gfl.Detector(…, optimize=True)`` runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import gfl
import gfl_ops
from cases.common import torchvision
from formulas.select import detections
from gfl.data import transforms
from gfl.models.fused import FusedGFL

PARTS = ("input", "backbone", "neck", "head", "boxes")
# Pairs of location and class above the score threshold: per image as many as a trained network finds in COCO's images,
# or this share of all pairs of a small image.
CANDIDATES, SHARE = 3000, 0.02
Maps = tuple[list[Tensor], list[Tensor]]


def count_flops(name: str, height: int, width: int) -> float:
    """Multiplications and additions of a preset's convolutions per image, in 10⁹; nothing is computed."""

    def deformable(x: Any, weight: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    known = {torch.ops.torchvision.deform_conv2d: deformable} if torchvision else {}
    counter = FlopCounterMode(display=False, custom_mapping=known)
    # Not on the device "meta", which has no autocast: deformable convolutions switch it off.
    with FakeTensorMode(), torch.no_grad():
        model, images = gfl.create_model(name).eval(), torch.empty(1, 3, height, width)
        with counter:
            model.predict_maps(images)
    return counter.get_total_flops() / 1e9


def prepare(name: str, size: tuple[int, int], device: torch.device, seed: int) -> tuple[gfl.models.GFL, Tensor]:
    """A preset with random weights that has as many candidates as a trained one, and an image uint8 ``[3, H, W]``."""
    torch.manual_seed(seed)
    model = gfl.create_model(name).eval()
    model.test = dataclasses.replace(model.test, short_side=min(size), long_side=max(size))
    # Neighbouring pixels are alike, as in a photo.
    coarse = torch.randint(256, (1, 3, -(-size[0] // 16), -(-size[1] // 16))).float()
    image = torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0].to(torch.uint8)
    head = model.bbox_head
    last = [*head.class_layers(), *([head.gfl_reg] if hasattr(head, "gfl_reg") else [])]
    for layer in last:
        torch.nn.init.normal_(layer.weight, std=0.05)
    model = model.to(device)
    with torch.no_grad():
        sizes = torch.tensor([size], dtype=torch.float32, device=device)
        cls_scores, _ = model.predict_maps(transforms.normalise(image[None].to(device), sizes, model.config))
        logits = torch.cat([x.flatten() for x in cls_scores])
        rank = max(1, min(CANDIDATES, int(SHARE * logits.numel())))
        threshold = math.log(model.test.score_threshold / (1 - model.test.score_threshold))
        for layer in head.class_layers():
            layer.bias[: model.config.num_classes] += threshold - logits.topk(rank).values[-1]
    return model, image


class Way:
    """A way to run a detector.

    Args:
        network: whose parts are timed.
        device: to compute on.
        size: (height, width) of the input.
    """

    def __init__(self, network: gfl.models.GFL, device: torch.device, size: tuple[int, int]) -> None:
        self.network, self.device, self.size = network, device, size

    def detect(self, images: Sequence[Tensor]) -> object:
        """From uint8 images on the CPU to boxes there."""
        raise NotImplementedError

    def precision(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def input(self, images: Tensor) -> Tensor:
        sizes = torch.tensor([self.size] * len(images), dtype=torch.float32, device=self.device)
        return transforms.normalise(images, sizes, self.network.config)

    def maps(self, images: Tensor) -> Maps:
        """Of normalised images."""
        return self.network.predict_maps(images)

    def boxes(self, maps: Maps) -> object:
        raise NotImplementedError

    def parts(self, images: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each of `PARTS` on what the one before gave."""
        network = self.network
        steps: tuple[Callable[[Any], Any], ...] = (
            self.input, network.backbone, network.neck, network.bbox_head, self.boxes,
        )  # fmt: skip
        value: Any = images.to(self.device)
        for name, step in zip(PARTS, steps):
            if name == "backbone" and isinstance(network, FusedGFL):
                value = value.to(network.dtype, memory_format=torch.channels_last)

            def run(step: Callable[[Any], Any] = step, value: Any = value) -> Any:
                with self.precision():
                    return step(value)

            yield name, run
            value = run()


class Plain(Way):
    """The network as it is written, and mmdet's steps around torchvision's NMS, ours where that is not installed."""

    def __init__(
        self, network: gfl.models.GFL, device: torch.device, size: tuple[int, int], dtype: torch.dtype
    ) -> None:
        super().__init__(network, device, size)
        self.dtype = dtype

    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def boxes(self, maps: Maps) -> list[tuple[Tensor, Tensor, Tensor]]:
        config, test = self.network.config, self.network.test
        return detections(
            *maps, config.strides, self.size, config.reg_max, score_threshold=test.score_threshold,
            nms_pre=test.nms_pre, iou_threshold=test.iou_threshold, max_detections=test.max_detections,
            center_offset=config.center_offset, one_class=torchvision.ops.nms if torchvision else gfl_ops.nms,
        )  # fmt: skip

    def detect(self, images: Sequence[Tensor]) -> object:
        stacked, _ = transforms.pad(images, 32)
        with self.precision():
            found = self.boxes(self.maps(self.input(stacked.to(self.device))))
        return [[part.cpu() for part in of_image] for of_image in found]


class Optimized(Way):
    """What ``gfl.Detector(…, optimize=True)`` runs."""

    def __init__(
        self,
        model: gfl.models.GFL,
        device: torch.device,
        size: tuple[int, int],
        dtype: torch.dtype,
        batch: int,
        compile: bool = False,
    ) -> None:
        super().__init__(FusedGFL(model, dtype).to(device), device, size)
        self.detector = gfl.Detector(model, device, dtype, batch_size=batch, optimize=True, compile=compile)

    def boxes(self, maps: Maps) -> object:
        sizes = torch.tensor([self.size] * len(maps[0][0]), dtype=torch.float32, device=self.device)
        return self.network.read_maps(*maps, sizes)

    def detect(self, images: Sequence[Tensor]) -> object:
        return self.detector(images)


def differences(ways: Sequence[Way], images: Tensor) -> list[float]:
    """Greatest difference of each way's maps from the first's, as a share of their greatest value."""
    found: list[float] = []
    want: list[Tensor] = []
    with torch.no_grad():
        for way in ways:
            with way.precision():
                cls_scores, reg_preds = way.maps(way.input(images.to(way.device)))
            got = [*cls_scores, *reg_preds]
            want = want or got
            found.append(
                max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in zip(got, want))
            )
    return found
