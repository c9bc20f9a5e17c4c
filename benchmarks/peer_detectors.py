# SPDX-License-Identifier: Apache-2.0
"""Other people's detectors, small: the whole, and by itself the part that our operators replace.

None has trained weights. So that as many pairs pass the score threshold as in a trained detector, the last class layer
is scaled and shifted until its logits have mean −6 and deviation 1.25, as measured on a trained head (`inputs.py`). The
last box layer's bias makes boxes about four strides wide.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inputs

LOGIT_MEAN, LOGIT_DEVIATION = -6.0, 1.25
SIDE = 2.0  # strides between a location and a side of its box
SCORE, IOU, MOST = 0.05, 0.6, 100
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Batch:
    """Noise for images ``[B, 3, H, W]`` in [0, 1], and random boxes and labels with COCO's statistics for each."""

    images: Tensor
    truth: list[tuple[Tensor, Tensor]]

    @property
    def size(self) -> tuple[int, int]:
        return self.images.shape[2], self.images.shape[3]

    @staticmethod
    def draw(count: int, size: tuple[int, int], seed: int, device: str) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        truth = inputs.random_boxes(count, size, generator)
        images = torch.rand((count, 3, *size), generator=generator)
        return Batch(images.to(device), [(boxes.to(device), labels.to(device)) for boxes, labels in truth])


@dataclass
class Detector:
    """Four computations, and what patches our operators into them.

    Attributes:
        train: the losses of a batch, through the whole network.
        loss: the losses of given maps, assignment included.
        detect: detections of a batch, boxes, scores and labels of each image in turn.
        read: detections of given maps.
        model: the network, whose weights get the gradients of a training step.
        maps, test_maps: the network's outputs in training and in evaluation mode.
        patch, unpatch: of `gfl_ops.compat`.
        notes: for the reader of the table.
    """

    train: Callable[[], list[Tensor]]
    loss: Callable[[Any], list[Tensor]]
    detect: Callable[[], list[Tensor]]
    read: Callable[[Any], list[Tensor]]
    model: nn.Module
    maps: Any
    test_maps: Any
    patch: Callable[[], object]
    unpatch: Callable[[], object]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Peer:
    """A detector of another project; `needs` are the packages that have to be installed."""

    name: str
    needs: tuple[str, ...]
    build: Callable[[Batch], Detector]

    def missing(self) -> list[str]:
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


@torch.no_grad()
def as_if_trained(layers: Sequence[nn.Conv2d], logits: Callable[[], Sequence[Tensor]]) -> None:
    """Scale and move the last class layers until all `logits` together have a trained head's mean and deviation."""
    found = torch.cat([x.flatten() for x in logits()])
    scale = float(LOGIT_DEVIATION / found.std())
    for layer in layers:
        assert layer.bias is not None
        layer.weight.mul_(scale)
        layer.bias.copy_(scale * (layer.bias - found.mean()) + LOGIT_MEAN)


@torch.no_grad()
def peak(layer: nn.Conv2d, bins: int) -> None:
    """Make the distributions of the four sides peak at `SIDE`."""
    assert layer.bias is not None
    layer.bias.copy_(-((torch.arange(bins) - SIDE).abs() * 1.2).clamp(max=7.0).repeat(4))


def import_mmdet() -> list[str]:
    """Make mmdet importable without mmcv's extension; notes for the reader."""
    sys.path.insert(0, str(ROOT / "tests" / "support" / "peers"))
    try:
        stand_in = importlib.import_module("mmdet_stub")
    finally:
        sys.path.remove(str(ROOT / "tests" / "support" / "peers"))
    stand_in.install()
    notes = []
    if isinstance(extension := sys.modules.get(stand_in.EXTENSION), stand_in._Extension):
        importlib.import_module("torchvision")
        # The stand-in's Python loop would be no fair opponent. Bound here, since torchvision may be patched too.
        suppress = torch.ops.torchvision.nms

        def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
            return suppress(boxes, scores, iou_threshold)

        extension.nms = nms
        notes.append("mmcv is installed without its operators: torchvision's nms replaces mmcv's.")
    warnings.filterwarnings("ignore", module="mmdet|mmengine|mmcv")
    return notes


def mmdet_gfl(batch: Batch) -> Detector:
    """GFL by mmdet's own config, with ResNet-18, 64 channels in neck and head, and two convolutions a tower."""
    notes = import_mmdet()
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmengine.structures import InstanceData

    from gfl_ops.compat import mmdet as compat

    init_default_scope("mmdet")
    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / "gfl" / "gfl_r50_fpn_1x_coco.py").model
    config.backbone.update(depth=18, init_cfg=None)
    config.neck.update(in_channels=[64, 128, 256, 512], out_channels=64)
    config.bbox_head.update(in_channels=64, feat_channels=64, stacked_convs=2)
    model = MODELS.build(config).to(batch.images.device).train()
    head = model.bbox_head

    def maps() -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            return head(model.extract_feat(batch.images))

    as_if_trained([head.gfl_cls], lambda: maps()[0])
    peak(head.gfl_reg, head.reg_max + 1)
    meta = dict.fromkeys(("img_shape", "pad_shape", "ori_shape", "batch_input_shape"), batch.size)
    metas = [meta | {"scale_factor": (1.0, 1.0)} for _ in batch.truth]
    truth = [InstanceData(bboxes=boxes, labels=labels) for boxes, labels in batch.truth]
    samples = [DetDataSample(gt_instances=g, metainfo=m) for g, m in zip(truth, metas)]

    def summed(losses: dict[str, list[Tensor]]) -> list[Tensor]:
        return [torch.stack(list(levels)).sum() for levels in losses.values()]

    def parts(found: Sequence[Any]) -> list[Tensor]:
        return [part for image in found for part in (image.bboxes, image.scores, image.labels)]

    def detect() -> list[Tensor]:
        found = model.eval()(batch.images, [sample.clone() for sample in samples], mode="predict")
        return parts([sample.pred_instances for sample in found])

    return Detector(
        train=lambda: summed(model.train()(batch.images, samples, mode="loss")),
        loss=lambda given: summed(head.loss_by_feat(*given, truth, metas)),
        detect=detect,
        read=lambda given: parts(head.predict_by_feat(*given, batch_img_metas=metas, rescale=False)),
        model=model,
        maps=maps(),
        test_maps=maps(),
        patch=compat.patch,
        unpatch=compat.unpatch,
        notes=notes,
    )


def torchvision_detector(batch: Batch, name: str) -> Detector:
    """torchvision's FCOS or RetinaNet on a ResNet-18."""
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    from gfl_ops.compat import torchvision as compat

    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    options: dict[str, Any] = {"min_size": min(batch.size), "max_size": max(batch.size)}
    options |= {"score_thresh": SCORE, "nms_thresh": IOU, "detections_per_img": MOST}
    # torchvision's own functions for a ResNet-50 choose these.
    sizes = [(8 * 2**i,) for i in range(5)]
    if name == "retinanet":
        sizes = [(x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32 * 2**i for i in range(5))]
    ratios = ((1.0,) if name == "fcos" else (0.5, 1.0, 2.0),) * 5
    make = {"fcos": detection.FCOS, "retinanet": detection.RetinaNet}[name]
    model = make(backbone, inputs.CLASSES, anchor_generator=AnchorGenerator(tuple(sizes), ratios), **options)
    model.to(batch.images.device)
    images = list(batch.images)
    targets = [{"boxes": boxes, "labels": labels} for boxes, labels in batch.truth]
    with torch.no_grad():
        moved, moved_targets = model.transform(images, targets)
        features = list(model.backbone(moved.tensors).values())
        anchors = model.anchor_generator(moved, features)
    # Anchors per level: all anchors, divided by the levels' shares of the locations.
    counts = [x.shape[2] * x.shape[3] for x in features]
    counts = [count * (len(anchors[0]) // sum(counts)) for count in counts]

    def maps() -> dict[str, Tensor]:
        with torch.no_grad():
            return model.head(features)

    as_if_trained([model.head.classification_head.cls_logits], lambda: [maps()["cls_logits"]])
    if name == "fcos":
        # RetinaNet's are offsets to anchors of such sizes.
        nn.init.constant_(model.head.regression_head.bbox_reg.bias, SIDE)
    per_level = [counts] if name == "fcos" else []

    def parts(found: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        return [image[key] for image in found for key in ("boxes", "scores", "labels")]

    def read(given: dict[str, Tensor]) -> list[Tensor]:
        levels = {key: list(value.split(counts, dim=1)) for key, value in given.items()}
        split = [list(a.split(counts)) for a in anchors]
        return parts(model.postprocess_detections(levels, split, moved.image_sizes))

    return Detector(
        train=lambda: list(model.train()(images, targets).values()),
        loss=lambda given: list(model.compute_loss(moved_targets, given, anchors, *per_level).values()),
        detect=lambda: parts(model.eval()(images)),
        read=read,
        model=model,
        maps=maps(),
        test_maps=maps(),
        patch=compat.patch,
        unpatch=compat.unpatch,
    )


def ultralytics_yolov8(batch: Batch) -> Detector:
    """YOLOv8-n from its yaml; several labels per location and its own suppression, as ultralytics validates."""
    # Otherwise it accesses the network at import, writes its settings into the home folder, and prints about it.
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import nms

    from gfl_ops.compat import ultralytics as compat

    model = DetectionModel("yolov8n.yaml", nc=inputs.CLASSES, verbose=False).to(batch.images.device)
    model.args = get_cfg()
    head = model.model[-1]
    height, width = batch.size
    extent = torch.tensor([width, height] * 2, device=batch.images.device)
    boxes = torch.cat([torch.cat([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], 1) / extent for b, _ in batch.truth])
    labelled = {
        "img": batch.images,
        "batch_idx": torch.cat([torch.full_like(labels, i) for i, (_, labels) in enumerate(batch.truth)]).float(),
        "cls": torch.cat([labels for _, labels in batch.truth])[:, None].float(),
        "bboxes": boxes,
    }
    # Statistics for the batch norms, which have seen no image yet.
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        usual = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        model.train()(batch.images)
        for norm, momentum in zip(norms, usual):
            norm.momentum = momentum

    def maps(training: bool) -> dict[str, Any]:
        with torch.no_grad():
            found = model.train(training)(batch.images)
        return found if training else found[1]

    as_if_trained([branch[-1] for branch in head.cv3], lambda: [maps(False)["scores"]])
    for branch in head.cv2:
        peak(branch[-1], head.reg_max)
    fixed, test_maps = maps(True), maps(False)

    def suppress(found: Tensor) -> list[Tensor]:
        rows = nms.non_max_suppression(found, SCORE, IOU, multi_label=True, max_det=MOST)
        return [part for row in rows for part in (row[:, :4], row[:, 4], row[:, 5])]

    def read(given: dict[str, Any]) -> list[Tensor]:
        model.eval()
        return suppress(head._inference(given))

    return Detector(
        train=lambda: [model.train().loss(labelled)[0]],
        loss=lambda given: [model.loss(labelled, given)[0]],
        detect=lambda: suppress(model.eval()(batch.images)[0]),
        read=read,
        model=model,
        maps=fixed,
        test_maps=test_maps,
        patch=compat.patch,
        unpatch=compat.unpatch,
    )


PEERS = {
    "mmdet": Peer("mmdet GFL, R18", ("mmdet", "mmcv", "torchvision"), mmdet_gfl),
    "fcos": Peer("torchvision FCOS, R18", ("torchvision",), lambda batch: torchvision_detector(batch, "fcos")),
    "retinanet": Peer(
        "torchvision RetinaNet, R18", ("torchvision",), lambda batch: torchvision_detector(batch, "retinanet")
    ),
    "yolov8": Peer("ultralytics YOLOv8-n", ("ultralytics", "torchvision"), ultralytics_yolov8),
}
