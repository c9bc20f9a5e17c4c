# SPDX-License-Identifier: Apache-2.0
"""A detector as a file that runs without this package's Python: ONNX, or a program of `torch.export`.

The integral of equation 4 (arXiv 2006.04388) is a softmax and a product with the bins 0 … R. Both are fp32 whatever the
rest is: a step of 8 bits in a sum over 16 bins is a sixteenth of a bin, 8 pixels at stride 128, on top of what the
softmax loses; boxes of 800 pixels in 8 bits lose 3. An ONNX file lists all nodes from the distributions and scores on
under the metadata key ``integral_nodes``: have a quantiser leave them alone (``nodes_to_exclude`` of onnxruntime's
``quantize_static``).
"""

from __future__ import annotations

import copy
import warnings
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..models.fused import FusedGFL
from ..models.gfl import GFL, locations
from ..models.head import GFLHead
from ..models.layers import GroupNormReLU
from .distributed import current_device

FORMATS = ("onnx", "torch-export", "aotinductor")
MAPS, DECODED, DETECTIONS = "maps", "decoded", "detections"
OPSET = 18
MAX_PAIRS = 2**24  # fp32 holds integers exactly up to here
INTEGRAL_NODES = "integral_nodes"
CANDIDATES = ("candidate_boxes", "candidate_scores", "candidate_labels")
# NMS class by class of the candidates: a row of scores per class, 0 for boxes of other classes.
NMS = """
nms (float[1, k, 4] candidate_boxes, float[1, k] candidate_scores, int64[1, k] candidate_labels)
    => (float[n, 4] boxes, float[n] scores, int64[n] labels)
    <int64[1, {classes}, 1] every_class = {{{every_class}}}, float zero = {{0}}, int64[1] most = {{{most}}},
     float[1] iou_threshold = {{{iou:.9g}}}, float[1] score_threshold = {{{score:.9g}}},
     int64[1] axis_one = {{1}}, int64[1] axis_zero = {{0}}, int64[1] flat = {{-1}}, int64[1] box_column = {{2}}>
{{
    labels_row = Unsqueeze(candidate_labels, axis_one)
    scores_row = Unsqueeze(candidate_scores, axis_one)
    of_class = Equal(labels_row, every_class)
    class_scores = Where(of_class, scores_row, zero)
    selected = NonMaxSuppression<center_point_box = 0>(
        candidate_boxes, class_scores, most, iou_threshold, score_threshold)
    selected_column = Gather<axis = 1>(selected, box_column)
    kept = Reshape(selected_column, flat)
    all_boxes = Squeeze(candidate_boxes, axis_zero)
    all_scores = Squeeze(candidate_scores, axis_zero)
    all_labels = Squeeze(candidate_labels, axis_zero)
    kept_scores = Gather<axis = 0>(all_scores, kept)
    kept_count = Shape(kept)
    count = Min(kept_count, most)
    scores, best = TopK<axis = 0>(kept_scores, count)
    chosen = Gather<axis = 0>(kept, best)
    boxes = Gather<axis = 0>(all_boxes, chosen)
    labels = Gather<axis = 0>(all_labels, chosen)
}}
"""
# The same of several images: what NonMaxSuppression keeps is put back to the candidates' places, to rank each image's.
BATCH_NMS = """
nms (float[b, k, 4] candidate_boxes, float[b, k] candidate_scores, int64[b, k] candidate_labels)
    => (float[b, m, 4] boxes, float[b, m] scores, int64[b, m] labels)
    <int64[1, {classes}, 1] every_class = {{{every_class}}}, float zero = {{0}}, int64 no_label = {{-1}},
     int64[1] most = {{{most}}}, float[1] iou_threshold = {{{iou:.9g}}}, float[1] score_threshold = {{{score:.9g}}},
     int64[1] axis_one = {{1}}, int64[1] axis_two = {{2}}, int64[2] image_and_box = {{0, 2}},
     int64[3] four_sides = {{1, 1, 4}}>
{{
    labels_row = Unsqueeze(candidate_labels, axis_one)
    scores_row = Unsqueeze(candidate_scores, axis_one)
    of_class = Equal(labels_row, every_class)
    class_scores = Where(of_class, scores_row, zero)
    selected = NonMaxSuppression<center_point_box = 0>(
        candidate_boxes, class_scores, most, iou_threshold, score_threshold)
    places = Gather<axis = 1>(selected, image_and_box)
    kept_scores = GatherND(candidate_scores, places)
    no_scores = Mul(candidate_scores, zero)
    all_scores = ScatterND(no_scores, places, kept_scores)
    candidates = Shape<start = 1>(candidate_scores)
    count = Min(candidates, most)
    scores, best = TopK<axis = 1>(all_scores, count)
    best_labels = GatherElements<axis = 1>(candidate_labels, best)
    best_column = Unsqueeze(best, axis_two)
    best_sides = Expand(best_column, four_sides)
    best_boxes = GatherElements<axis = 1>(candidate_boxes, best_sides)
    found = Greater(scores, zero)
    labels = Where(found, best_labels, no_label)
    found_column = Unsqueeze(found, axis_two)
    boxes = Where(found_column, best_boxes, zero)
}}
"""


class Exportable(nn.Module):
    """A detector at one (height, width) of input, in plain operators: convolutions, norms, softmax, matmul.

    `outputs` are "maps": class logits and distribution logits of each level; "decoded": `boxes` ``[B, A, 4]`` and
    `scores` ``[B, A, C]``, probabilities, of all locations; or "detections": the best pairs of location and class of
    each level, `boxes` ``[B, K, 4]``, `scores` and `labels` ``[B, K]``, for an NMS to follow. `dtype` is the network's;
    inputs and decoded outputs are fp32. The model is copied, and its batch norms are folded.
    """

    def __init__(self, model: GFL, size: tuple[int, int], outputs: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        network = FusedGFL(model)
        # The head's own layers share one convolution for the distributions of all levels.
        if isinstance(model.bbox_head, GFLHead):
            network.bbox_head = copy.deepcopy(model.bbox_head).eval()
        for module in network.bbox_head.modules():
            if isinstance(module, GroupNormReLU):
                module.plain = True
        network.dtype = dtype
        self.network = network.to(dtype)
        config = self.config = model.config
        self.test, self.outputs = model.test, outputs
        cells = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in config.strides]
        self.counts = [height * width for height, width in cells]
        self.points, self.strides = map(nn.Buffer, locations(config, cells))
        self.bins = nn.Buffer(torch.arange(config.reg_max + 1, dtype=torch.float32))
        limit = torch.tensor([size[1], size[0]], dtype=torch.float32).repeat(2)
        self.limit = nn.Buffer(limit - float(config.legacy))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Of normalised images, fp32 ``[B, 3, H, W]``, zero in its padding."""
        cls_scores, reg_preds = self.network.predict_maps(images)
        if self.outputs == MAPS:
            return (*(x.float() for x in cls_scores), *(x.float() for x in reg_preds))
        score = _rows(cls_scores).sigmoid()
        side = _rows(reg_preds).unflatten(2, (4, self.config.reg_max + 1))
        distance = torch.matmul(side.softmax(-1), self.bins) * self.strides
        box = torch.cat([self.points - distance[..., :2], self.points + distance[..., 2:]], -1)
        box = torch.minimum(box.clamp(min=0), self.limit)
        if self.outputs == DECODED:
            return box, score
        levels = [self._best(box[:, a:b], score[:, a:b]) for a, b in pairwise((0, *accumulate(self.counts)))]
        box, score, label = (torch.cat(of_levels, 1) for of_levels in zip(*levels))
        # Without width or height it is no candidate; the NMS leaves out scores of 0.
        sized = ((box[..., 2:] - box[..., :2]) > 0).all(-1)
        return box, score * sized, label

    def _best(self, box: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels of a level's `nms_pre` best pairs."""
        classes = score.shape[2]
        pairs = score.flatten(1)
        count = pairs.shape[1] if self.test.nms_pre <= 0 else min(self.test.nms_pre, pairs.shape[1])
        value, index = pairs.topk(count, 1)
        label = torch.remainder(index, classes)
        # Exact for multiples below 2²⁴; an integer division becomes a chain of operators in ONNX.
        location = ((index - label).float() / classes).long()
        return box.gather(1, location[..., None].expand(-1, -1, 4)), value, label

    def names(self) -> list[str]:
        """Of the outputs."""
        levels = range(len(self.config.strides))
        if self.outputs == MAPS:
            return [f"{kind}{level}" for kind in ("cls_scores", "reg_preds") for level in levels]
        return ["boxes", "scores"] if self.outputs == DECODED else list(CANDIDATES)


class OfPixels(nn.Module):
    """A detector that takes pixels as image libraries give them, and normalises them itself.

    Images are RGB, uint8 ``[B, H, W, 3]``, resized and padded right and below with anything; `sizes`, int64 ``[B, 2]``,
    are their (height, width) without padding.
    """

    def __init__(self, detector: Exportable, size: tuple[int, int]) -> None:
        super().__init__()
        self.detector = detector
        config = detector.config
        self.mean, self.std = (nn.Buffer(torch.tensor(values)[:, None, None]) for values in (config.mean, config.std))
        self.bgr = config.channel_order == "bgr"
        self.rows, self.columns = (nn.Buffer(torch.arange(side)[None]) for side in size)

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        images = (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std
        inside = (self.rows < sizes[:, :1])[:, None, :, None] & (self.columns < sizes[:, 1:])[:, None, None, :]
        return self.detector((images.flip(1) if self.bgr else images) * inside.float())


def _rows(maps: list[Tensor]) -> Tensor:
    """fp32 ``[B, A, C]`` of levels ``[B, C, H, W]``."""
    return torch.cat([x.float().flatten(2).transpose(1, 2) for x in maps], 1)


def to_onnx(
    model: GFL,
    file: Path,
    size: tuple[int, int],
    *,
    batch: int | None = 1,
    outputs: str = DETECTIONS,
    dtype: torch.dtype = torch.float32,
    classes: list[str] | None = None,
    pixels: bool = False,
) -> None:
    """Writes a detector as ONNX, of standard operators alone.

    The input is `images`, fp32 ``[B, 3, H, W]``: normalised, zero in the padding. `outputs` as for `Exportable`;
    with "detections" ONNX's NonMaxSuppression follows, class by class, and the outputs are `boxes` ``[n, 4]``,
    `scores` ``[n]`` and `labels` ``[n]``, the best first, n at most the model's `max_detections`. Of another batch than
    1 they are ``[B, K, 4]``, ``[B, K]`` and ``[B, K]``, as `gfl_ops.postprocess` has them: unused slots have score 0
    and label −1.

    With `pixels` the inputs are `pixels` and `sizes`, as for `OfPixels`, and there is nothing to normalise.

    `size` is the (height, width) of the input, `batch` the images at a time, None for any number. `dtype` is fp32, or
    fp16 for the convolutions; the integral is fp32 in any case. `classes` are names for the file's metadata.

    Raises:
        RuntimeError: the packages onnx and onnxscript are not installed.
        ValueError: anchor-wise candidates, which ONNX has no operator for.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch's exporter is written with it
    except ImportError as error:
        raise RuntimeError(f"ONNX needs onnx and onnxscript: pip install 'gfl-ops[export]' ({error})") from None
    _check(model, outputs, size)
    detector = Exportable(model, size, outputs, dtype)
    images, shapes = _example(batch, size)
    whole: nn.Module = detector
    inputs = {"images": images}
    if pixels:
        whole = OfPixels(detector, size)
        bytes_ = torch.zeros(len(images), *size, 3, dtype=torch.uint8)
        inputs = {"pixels": bytes_, "sizes": torch.tensor([size] * len(images))}
    if shapes is not None:
        shapes = dict.fromkeys(inputs, shapes["images"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names: dict[str, Any] = {"input_names": [*inputs], "output_names": detector.names(), "dynamic_shapes": shapes}
        given = tuple(inputs.values())
        program = torch.onnx.export(whole, given, dynamo=True, verbose=False, opset_version=OPSET, **names)
    assert program is not None
    proto = program.model_proto
    if outputs == DETECTIONS:
        _append_nms(proto, model, NMS if batch == 1 else BATCH_NMS)
    _rename_weights(proto)
    _describe(proto, model, size, outputs, _sensitive_nodes(proto), classes)
    onnx.checker.check_model(proto, full_check=True)
    with files.replacing(file) as part:
        onnx.save_model(proto, str(part))


def _example(batch: int | None, size: tuple[int, int]) -> tuple[Tensor, dict[str, Any] | None]:
    """An input to trace with, and which of its dimensions are free."""
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=4096)}} if batch is None else None
    return torch.zeros(2 if batch is None else batch, 3, *size), shapes


def _check(model: GFL, outputs: str, size: tuple[int, int]) -> None:
    if outputs != DETECTIONS:
        return
    stride = model.config.strides[0]
    pairs = -(-size[0] // stride) * -(-size[1] // stride) * model.config.num_classes
    for refused, why in (
        (pairs > MAX_PAIRS, f"of at most 2^24 pairs of location and class per level, got {pairs}"),
        (model.config.topk_mode != "pair", "rank pairs of location and class; export `decoded` for `anchor`"),
        (model.test.score_threshold < 0, "need a `score_threshold` of 0 or more"),
    ):
        if refused:
            raise ValueError(f"gfl export: `detections` {why}")


def _sensitive_nodes(proto: Any) -> list[str]:
    """Names of what follows the last convolutions, and of what a softmax leads to before the next convolution."""
    feeds: set[str] = set()  # values that a convolution depends on
    for node in reversed(proto.graph.node):
        if node.op_type == "Conv" or not feeds.isdisjoint(node.output):
            feeds.update(node.input)
    shares: set[str] = set()  # values made of a softmax's
    found = []
    for number, node in enumerate(proto.graph.node):
        if node.op_type == "Conv":
            continue
        if node.op_type == "Softmax" or not shares.isdisjoint(node.input):
            shares.update(node.output)
        if feeds.isdisjoint(node.output) or not shares.isdisjoint(node.output):
            node.name = node.name or f"{node.op_type}_{number}"
            found.append(node.name)
    return found


def _rename_weights(proto: Any) -> None:
    """Gives weights names without a digit at the end: onnxruntime's quantiser adds numbers to them for its copies."""
    names = {one.name: f"{one.name}_" for one in proto.graph.initializer if one.name[-1:].isdigit()}
    for one in proto.graph.initializer:
        one.name = names.get(one.name, one.name)
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _append_nms(proto: Any, model: GFL, graph: str) -> None:
    """Replaces the candidates by what `NMS` keeps of them."""
    from onnx import parser

    classes, test = model.config.num_classes, model.test
    every = ", ".join(map(str, range(classes)))
    limits = {"most": test.max_detections, "iou": test.iou_threshold, "score": test.score_threshold}
    nms = parser.parse_graph(graph.format(classes=classes, every_class=every, **limits))
    for node in nms.node:
        node.name = f"nms_{node.output[0]}"
    proto.graph.node.extend(nms.node)
    proto.graph.initializer.extend(nms.initializer)
    del proto.graph.output[:]
    proto.graph.output.extend(nms.output)


def _describe(
    proto: Any, model: GFL, size: tuple[int, int], outputs: str, integral: list[str], classes: list[str] | None
) -> None:
    from onnx import helper

    del proto.metadata_props[:]
    values = {
        "outputs": outputs,
        "size": f"{size[0]},{size[1]}",
        "mean": ",".join(map(str, model.config.mean)),
        "std": ",".join(map(str, model.config.std)),
        "channel_order": model.config.channel_order,
        "resize": model.test.resize,
        INTEGRAL_NODES: ",".join(integral),
        "strides": ",".join(map(str, model.config.strides)),
        "reg_max": str(model.config.reg_max),
    }
    helper.set_model_props(proto, values | ({"classes": "\n".join(map(files.printable, classes))} if classes else {}))
    proto.producer_name = "gfl-ops"


def to_torch(
    model: GFL,
    file: Path,
    size: tuple[int, int],
    *,
    batch: int | None = 1,
    outputs: str = DECODED,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    device: torch.device | str = "cpu",
) -> None:
    """Writes a detector as a program of `torch.export`, or compiled by AOTInductor.

    ``torch.export.load(file).module()`` runs the first, ``torch._inductor.aoti_load_package(file)`` the second, which
    C++ loads too; neither needs this package. Arguments, inputs and outputs as for `to_onnx`, but "detections" are the
    candidates before NMS. The program runs on `device`; AOTInductor compiles for this machine's kind of CPU or GPU, and
    needs a C++ compiler.
    """
    whole = Exportable(model, size, outputs, dtype).to(device)
    images, shapes = _example(batch, size)
    with torch.no_grad(), warnings.catch_warnings(), current_device(device), files.replacing(file) as part:
        warnings.simplefilter("ignore")
        program = torch.export.export(whole, (images.to(device),), dynamic_shapes=shapes)
        if compiled:
            torch._inductor.aoti_compile_and_package(program, package_path=str(part))
        else:
            torch.export.save(program, part)
