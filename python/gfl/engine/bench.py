# SPDX-License-Identifier: Apache-2.0
"""Times whole detectors from uint8 images to boxes, beside the same network in plain eager PyTorch."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .. import config as configuration
from .. import models
from ..data import transforms
from ..models.fused import FusedGFL
from . import plain
from .graphs import Graph
from .pipeline import PendingDetections, Pipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLAIN, OURS, COMPILED = "plain", "ours", "compiled"
PARTS = ("input", "backbone", "neck", "head", "boxes")
# Pairs of location and class above the threshold: as many an image as a trained network has on COCO's photos, or this
# share of all pairs of a small one.
CANDIDATES, SHARE = 3000, 0.02
# Greatest difference of the maps from the plain network's, as a share of their greatest value. fp32: minimal filtering,
# TF32 on a GPU; half precision: both round, each elsewhere.
TOLERANCE = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass
class Timing:
    """One detector, written one way, at one size of batch.

    Attributes:
        model: name of the preset.
        size: (height, width) of the input.
        device: type of the device.
        dtype: "fp32", "bf16" or "fp16".
        batch: images at a time.
        provider: "plain", "ours" or "compiled".
        seconds: of each run, from uint8 images in memory to boxes there.
        gflop: of an image, multiplications and additions of the direct convolutions.
        floor: seconds that a batch's operations take at the rate measured for products of large matrices.
        memory: bytes at the peak beyond what was in use before; None where that can't be told.
        parts: seconds of each of `PARTS` by itself, medians.
        difference: greatest difference of the maps from the plain network's, as a share of their greatest value.
    """

    model: str
    size: tuple[int, int]
    device: str
    dtype: str
    batch: int
    provider: str
    seconds: list[float]
    gflop: float
    floor: float
    memory: int | None
    parts: dict[str, float] = field(default_factory=dict)
    difference: float = 0.0

    @property
    def p50(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p99(self) -> float:
        """Of fewer than 100 runs the slowest."""
        ordered = sorted(self.seconds)
        return ordered[max(math.ceil(0.99 * len(ordered)) - 1, 0)]

    @property
    def images_per_second(self) -> float:
        return self.batch / self.p50

    @property
    def share_of_floor(self) -> float:
        """Above 1 where fewer operations were done than the direct convolutions take."""
        return self.floor / self.p50

    def to_dict(self) -> dict[str, Any]:
        """All of it but the single runs, in plain values."""
        values = {k: v for k, v in vars(self).items() if k != "seconds"}
        figures = {"runs": len(self.seconds), "p50": self.p50, "p99": self.p99}
        return values | figures | {"images_per_second": self.images_per_second, "share_of_floor": self.share_of_floor}


def count_flops(name: str, height: int, width: int) -> float:
    """Multiplications and additions of a preset's convolutions for one image, in 10⁹; nothing is computed.

    Raises:
        RuntimeError: a model with deformable convolutions where torchvision is not installed.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_deformable())
    # Not the device "meta", for which there is no autocast: deformable convolutions switch it off.
    with FakeTensorMode(), torch.no_grad():
        model = models.build(configuration.preset(name).model).eval()
        images = torch.empty(1, 3, height, width)
        with counter:
            model.predict_maps(images)
    return counter.get_total_flops() / 1e9


def _deformable() -> dict[Any, Any]:
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return {}

    def flops(x: Any, weight: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    return {torch.ops.torchvision.deform_conv2d: flops}


def peak_rate(device: torch.device, dtype: torch.dtype, processor: bool = False, seconds: float = 0.5) -> float:
    """Operations a second that this device reaches in products of large matrices; `processor` as for `Clock`."""
    n = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = Clock(device, processor).runs(lambda: torch.mm(a, b), seconds)
    return 2 * n**3 / statistics.median(times)


class Clock:
    """Times runs: on a GPU with its queue empty before and after.

    Args:
        device: that computes.
        processor: count this process's processor time, which other programs disturb less; not on a GPU.
    """

    def __init__(self, device: torch.device, processor: bool = False) -> None:
        self._now = time.process_time if processor else time.perf_counter
        self._wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def one(self, function: Callable[[], Any]) -> float:
        self._wait()
        started = self._now()
        function()
        self._wait()
        return self._now() - started

    def runs(self, function: Callable[[], Any], seconds: float) -> list[float]:
        """Of one function, after one run that does not count; three at least."""
        return self.interleaved([function], seconds)[0]

    def interleaved(self, functions: Sequence[Callable[[], Any]], seconds: float) -> list[list[float]]:
        """Of several in turn, so that what disturbs one disturbs all; `seconds` for each."""
        for function in functions:
            function()
        times: list[list[float]] = [[] for _ in functions]
        end = time.perf_counter() + seconds * len(functions)
        while time.perf_counter() < end or len(times[0]) < 3:
            for function, found in zip(functions, times):
                found.append(self.one(function))
        return times


def prepare(name: str, size: tuple[int, int], device: torch.device, seed: int) -> tuple[models.GFL, Tensor]:
    """A preset with random weights that finds as much as a trained one, and an image uint8 ``[3, H, W]``."""
    torch.manual_seed(seed)
    preset = configuration.preset(name)
    model = models.build(preset.model, preset.test).eval()
    # Neighbouring pixels are alike, as in a photo.
    coarse = torch.randint(256, (1, 3, -(-size[0] // 16), -(-size[1] // 16))).float()
    image = torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0].to(torch.uint8)
    head = model.bbox_head
    torch.nn.init.normal_(head.gfl_cls.weight, std=0.05)
    torch.nn.init.normal_(head.gfl_reg.weight, std=0.05)
    model = model.to(device)
    with torch.no_grad():
        sizes = torch.tensor([size], dtype=torch.float32, device=device)
        cls_scores, _ = model.predict_maps(transforms.normalise(image[None].to(device), sizes))
        logits = torch.cat([x.flatten() for x in cls_scores])
        rank = max(1, min(CANDIDATES, int(SHARE * logits.numel())))
        limit = math.log(model.test.score_threshold / (1 - model.test.score_threshold))
        assert head.gfl_cls.bias is not None
        head.gfl_cls.bias += limit - logits.topk(rank).values[-1]
    return model, image


def bench(
    name: str,
    size: tuple[int, int],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float = 2.0,
    processor: bool = False,
    compile: bool = False,
    rate: float | None = None,
    seed: int = 0,
) -> list[Timing]:
    """Checks that the ways to run a detector give the same maps, then times them in turn.

    Args:
        name: of a preset.
        size: (height, width) of the input, multiples of 32.
        batch: images at a time.
        device, dtype: to compute on and in; the plain network in half precision runs under autocast.
        seconds: for each way.
        processor: processor time instead of the clock's; not on a GPU.
        compile: time `torch.compile` too, of our network.
        rate: operations a second for the floor; by default measured.
        seed: of weights and image.

    Raises:
        RuntimeError: maps differ by more than `TOLERANCE`; a preset's needs are not installed.
    """
    model, image = prepare(name, size, device, seed)
    photos = [image.roll(n, 2) for n in range(batch)]
    fused = FusedGFL(model, dtype).to(device)
    ways: dict[str, _Way] = {PLAIN: _Plain(model, device, dtype), OURS: _Ours(fused, device)}
    if compile:
        ways[COMPILED] = _Ours(fused, device, compile=True)
    images = torch.stack(photos)
    differences = _differences(ways, images, size)
    if max(differences.values()) > TOLERANCE[dtype]:
        raise RuntimeError(f"{name}: shares by which maps differ, {differences}, are over {TOLERANCE[dtype]}")
    clock = Clock(device, processor)
    runs = [partial(way.detect, photos, size) for way in ways.values()]
    with torch.no_grad():
        memory = [_peak_memory(device, run) for run in runs]
        times = clock.interleaved(runs, seconds)
        parts = [way.parts(images, size, clock, seconds / 4) for way in ways.values()]
    gflop = count_flops(name, *size)
    floor = batch * gflop * 1e9 / (peak_rate(device, dtype, processor) if rate is None else rate)
    kind = next(kind for kind, one in DTYPES.items() if one == dtype)
    return [
        Timing(name, size, device.type, kind, batch, way, seconds_each, gflop, floor, most, of_parts, differences[way])
        for way, seconds_each, most, of_parts in zip(ways, times, memory, parts, strict=True)
    ]


class _Way:
    """A way to run a detector."""

    def __init__(self, network: models.GFL, device: torch.device) -> None:
        self.network, self.device = network, device
        self._sizes: dict[tuple[int, ...], Tensor] = {}

    def detect(self, photos: Sequence[Tensor], size: tuple[int, int]) -> object:
        """From uint8 images on the CPU to boxes there."""
        raise NotImplementedError

    def maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of normalised images."""
        return self.network.predict_maps(images)

    def boxes(self, cls_scores: list[Tensor], reg_preds: list[Tensor], size: tuple[int, int]) -> object:
        raise NotImplementedError

    def precision(self) -> Any:
        return nullcontext()

    def input(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        return transforms.normalise(images, self.sizes(len(images), size))

    def sizes(self, batch: int, size: tuple[int, int]) -> Tensor:
        # Kept, so that a graph has nothing to copy from the host.
        key = (batch, *size)
        if key not in self._sizes:
            self._sizes[key] = torch.tensor([size] * batch, dtype=torch.float32, device=self.device)
        return self._sizes[key]

    def parts(self, images: Tensor, size: tuple[int, int], clock: Clock, seconds: float) -> dict[str, float]:
        """Medians of each part by itself; on a GPU each is a graph where the way itself is one."""
        network = self.network
        found: dict[str, float] = {}
        value: Any = images.to(self.device)
        steps: tuple[tuple[str, Callable[[Any], Any]], ...] = (
            ("input", lambda x: self.input(x, size)),
            ("backbone", lambda x: network.backbone(x)),
            ("neck", lambda x: network.neck(x)),
            ("head", lambda x: network.bbox_head(x)),
            ("boxes", lambda x: self.boxes(x[0], x[1], size)),
        )
        with self.precision():
            for name, step in steps:
                if name == "backbone" and isinstance(network, FusedGFL):
                    value = value.to(network.dtype, memory_format=torch.channels_last)
                run = self._recorded(partial(step, value))
                found[name] = statistics.median(clock.runs(run, seconds))
                value = step(value)
        return found

    def _recorded(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run


class _Plain(_Way):
    """The network as it is written, NCHW, under autocast; mmdet's steps after it."""

    def __init__(self, network: models.GFL, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(network, device)
        self.nms, _ = plain.available_nms()
        self.dtype = dtype

    def precision(self) -> Any:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def boxes(self, cls_scores: list[Tensor], reg_preds: list[Tensor], size: tuple[int, int]) -> object:
        sizes = [(float(size[0]), float(size[1]))] * len(cls_scores[0])
        return plain.read_maps(cls_scores, reg_preds, sizes, self.network.config, self.network.test, self.nms)

    def detect(self, photos: Sequence[Tensor], size: tuple[int, int]) -> object:
        images, sizes = transforms.pad(photos, 32)
        images, sizes = images.to(self.device), sizes.to(self.device)
        with self.precision():
            found: Any = self.boxes(*self.maps(transforms.normalise(images, sizes)), size)
        return [[part.cpu() for part in of_image] for of_image in found]


class _Ours(_Way):
    """The engine of ``Detector(…, optimize=True)``."""

    def __init__(self, network: FusedGFL, device: torch.device, compile: bool = False) -> None:
        super().__init__(network, device)
        self.engine = Pipeline(network, device, graphs=True, compile=compile)

    def maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.engine.maps(images)

    def boxes(self, cls_scores: list[Tensor], reg_preds: list[Tensor], size: tuple[int, int]) -> object:
        return self.network.read_maps(cls_scores, reg_preds, self.sizes(len(cls_scores[0]), size))

    def detect(self, photos: Sequence[Tensor], size: tuple[int, int]) -> object:
        return PendingDetections(self.engine.run(self.engine.load(photos, [size] * len(photos))).detections).wait()

    def _recorded(self, run: Callable[[], Any]) -> Callable[[], Any]:
        if self.device.type != "cuda":
            return run
        return Graph(run, device=self.device)


def _differences(ways: dict[str, _Way], images: Tensor, size: tuple[int, int]) -> dict[str, float]:
    found: dict[str, float] = {}
    want: list[Tensor] = []
    with torch.no_grad():
        for name, way in ways.items():
            with way.precision():
                cls_scores, reg_preds = way.maps(way.input(images.to(way.device), size))
            got = [*cls_scores, *reg_preds]
            want = want or got
            shares = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in zip(got, want)]
            found[name] = max(float(share) for share in shares)
    return found


def _peak_memory(device: torch.device, run: Callable[[], Any]) -> int | None:
    """Bytes at the peak of a second run beyond those before the first."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        # A graph's memory is allocated when it is captured and stays.
        return max(torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()) - before
    run()
    try:
        # What the C library holds back for later would hide what a run takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0)
    except (OSError, KeyError, AttributeError):
        return None


def _status(name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields[name].split()[0]) * 1024
