# SPDX-License-Identifier: Apache-2.0
"""A detector as a file that runs without this package's Python: ONNX, or a program of `torch.export`.

The integral of equation 4 (arXiv 2006.04388) is a softmax and a product with the bins 0 … R. Both are fp32 whatever the
rest is: a step of 8 bits in a sum over 16 bins is a sixteenth of a bin, 8 pixels at the stride 128, beside what the
softmax loses. An ONNX file lists these nodes under the metadata key ``integral_nodes``: give them to a quantiser as
those to leave alone (``nodes_to_exclude`` of onnxruntime's ``quantize_static``).
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.fused import FusedGFL
from ..models.gfl import GFL

MAPS, DECODED, DETECTIONS = "maps", "decoded", "detections"
OUTPUTS = (MAPS, DECODED, DETECTIONS)
OPSET = 18
MAX_PAIRS = 2**24  # fp32 counts so far
INTEGRAL_NODES = "integral_nodes"


class Exportable(nn.Module):
    """A detector at one size of input, in plain operators: convolutions, norms, softmax, matmul.

    Args:
        model: copied; its batch norms are folded.
        size: (height, width) of the input.
        outputs: "maps": class logits and distribution logits of each level; "decoded": `scores` ``[B, A, C]``,
            probabilities, and `boxes` ``[B, A, 4]`` of all locations; "detections": the best pairs of location and
            class of each level, `boxes` ``[B, K, 4]``, `scores` and `labels` ``[B, K]``, for an NMS to follow.
        dtype: of the network; inputs and decoded outputs are fp32.
    """

    bins: Tensor
    limit: Tensor

    def __init__(self, model: GFL, size: tuple[int, int], outputs: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        network = FusedGFL(model)
        # The head's own layers: its fused ones call operators of gfl_ops.
        network.bbox_head = copy.deepcopy(model.bbox_head).eval()
        network.dtype = dtype
        self.network = network.to(dtype)
        self.config, self.test, self.outputs, self.size = model.config, model.test, outputs, size
        points, strides = [], []
        for stride in self.config.strides:
            shift = (stride - 1) / 2 if self.config.legacy else self.config.center_offset * stride
            y = torch.arange(-(-size[0] // stride)) * stride + shift
            x = torch.arange(-(-size[1] // stride)) * stride + shift
            points.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2).float())
            strides.append(torch.full((len(points[-1]), 1), float(stride)))
        for level, (point, cell) in enumerate(zip(points, strides)):
            self.register_buffer(f"points{level}", point)
            self.register_buffer(f"strides{level}", cell)
        self.register_buffer("bins", torch.arange(self.config.reg_max + 1, dtype=torch.float32))
        limit = torch.tensor([size[1], size[0]], dtype=torch.float32).repeat(2) - float(self.config.legacy)
        self.register_buffer("limit", limit)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Of normalised RGB, fp32 ``[B, 3, H, W]``, zero in its padding."""
        cls_scores, reg_preds = self.network.predict_maps(images)
        if self.outputs == MAPS:
            return (*(x.float() for x in cls_scores), *(x.float() for x in reg_preds))
        boxes = [self._boxes(reg, level) for level, reg in enumerate(reg_preds)]
        scores = [x.float().flatten(2).transpose(1, 2).sigmoid() for x in cls_scores]
        if self.outputs == DECODED:
            return torch.cat(boxes, 1), torch.cat(scores, 1)
        parts = [self._best(box, score) for box, score in zip(boxes, scores)]
        box, score, label = (torch.cat(of_levels, 1) for of_levels in zip(*parts))
        # Without width or height it is no candidate; the NMS leaves out scores of 0.
        sized = ((box[..., 2:] - box[..., :2]) > 0).all(-1)
        return box, score * sized, label

    def _boxes(self, reg_pred: Tensor, level: int) -> Tensor:
        """``[B, H·W, 4]`` xyxy, clipped to the input."""
        # Not get_buffer, which torch 2.6 can't export.
        point, stride = getattr(self, f"points{level}"), getattr(self, f"strides{level}")
        side = reg_pred.float().flatten(2).transpose(1, 2).unflatten(2, (4, self.config.reg_max + 1))
        distance = torch.matmul(side.softmax(-1), self.bins) * stride
        box = torch.cat([point - distance[..., :2], point + distance[..., 2:]], -1)
        return torch.minimum(box.clamp(min=0), self.limit)

    def _best(self, box: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels of the `nms_pre` pairs of the highest scores."""
        classes = score.shape[2]
        pairs = score.flatten(1)
        count = pairs.shape[1] if self.test.nms_pre <= 0 else min(self.test.nms_pre, pairs.shape[1])
        value, index = pairs.topk(count, 1)
        label = torch.remainder(index, classes)
        # Exact, of multiples below 2²⁴; an integer division becomes a chain of operators in ONNX.
        location = ((index - label).float() / classes).long()
        return box.gather(1, location[..., None].expand(-1, -1, 4)), value, label

    def names(self) -> list[str]:
        """Of the outputs."""
        levels = range(len(self.config.strides))
        if self.outputs == MAPS:
            return [f"{kind}{level}" for kind in ("cls_scores", "reg_preds") for level in levels]
        return ["boxes", "scores"] if self.outputs == DECODED else ["boxes", "scores", "labels"]


def to_onnx(
    model: GFL,
    file: Path,
    size: tuple[int, int],
    *,
    batch: int | None = 1,
    outputs: str = DETECTIONS,
    dtype: torch.dtype = torch.float32,
    classes: list[str] | None = None,
) -> None:
    """Writes a detector as ONNX, of standard operators alone.

    The input is `images`, fp32 ``[B, 3, H, W]``: normalised RGB, zero in the padding. `outputs` as for `Exportable`;
    with "detections" ONNX's NonMaxSuppression follows, class by class, and the outputs are `boxes` ``[n, 4]``,
    `scores` ``[n]`` and `labels` ``[n]`` of the one image, the best first, n at most the model's `max_detections`.

    Args:
        model: any GFL.
        file: to write.
        size: (height, width) of the input.
        batch: images at a time; None: any number.
        outputs: "maps", "decoded" or "detections".
        dtype: fp32, or fp16 for the convolutions; the integral is fp32 in any case.
        classes: names for the file's metadata.

    Raises:
        RuntimeError: the packages onnx and onnxscript are not installed.
        ValueError: detections of more than one image; anchor-wise candidates, which ONNX has no operator for.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch's exporter is written with it
    except ImportError as error:
        raise RuntimeError(f"ONNX needs onnx and onnxscript: pip install 'gfl-ops[export]' ({error})") from None
    _check(model, outputs, batch, size)
    whole = Exportable(model, size, outputs, dtype)
    images = torch.zeros(2 if batch is None else batch, 3, *size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            whole,
            (images,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=whole.names(),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=4096)}} if batch is None else None,
        )
    assert program is not None
    proto = program.model_proto
    integral = _name_integral(proto)
    if outputs == DETECTIONS:
        _append_nms(proto, model)
    _describe(proto, model, size, outputs, integral, classes)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save_model(proto, str(file))


def _check(model: GFL, outputs: str, batch: int | None, size: tuple[int, int]) -> None:
    stride = model.config.strides[0]
    pairs = -(-size[0] // stride) * -(-size[1] // stride) * model.config.num_classes
    if outputs == DETECTIONS and pairs > MAX_PAIRS:
        raise ValueError(f"gfl export: `detections` of at most 2^24 pairs of location and class a level, got {pairs}")
    if outputs == DETECTIONS and batch != 1:
        raise ValueError(f"gfl export: `detections` are of one image, got a batch of {batch or 'any size'}")
    if outputs == DETECTIONS and model.config.topk_mode != "pair":
        raise ValueError("gfl export: `detections` rank pairs of location and class; export `decoded` for `anchor`")
    if outputs == DETECTIONS and model.test.score_threshold < 0:
        raise ValueError("gfl export: `detections` need a `score_threshold` of 0 or more")


def _name_integral(proto: Any) -> list[str]:
    """Names the softmax of each level's distributions and the product with the bins; returns the names."""
    names: list[str] = []
    softmax = {node.output[0]: node for node in proto.graph.node if node.op_type == "Softmax"}
    for product in [node for node in proto.graph.node if node.op_type == "MatMul" and node.input[0] in softmax]:
        level = len(names) // 2
        for node, kind in ((softmax[product.input[0]], "softmax"), (product, "matmul")):
            node.name = f"integral_{kind}_{level}"
            names.append(node.name)
    return names


def _append_nms(proto: Any, model: GFL) -> None:
    """NMS class by class of the outputs boxes, scores and labels, which are replaced by what it keeps."""
    from onnx import TensorProto, helper

    graph, test = proto.graph, model.test
    renamed = {name: f"candidate_{name}" for name in ("boxes", "scores", "labels")}
    for node in graph.node:
        for values in (node.input, node.output):
            for place, name in enumerate(values):
                values[place] = renamed.get(name, name)
    for info in graph.value_info:
        info.name = renamed.get(info.name, info.name)

    def constant(name: str, value: Any, kind: int, shape: list[int]) -> str:
        graph.initializer.append(helper.make_tensor(name, kind, shape, value))
        return name

    classes = model.config.num_classes
    INT, FLOAT = TensorProto.INT64, TensorProto.FLOAT
    every = constant("every_class", list(range(classes)), INT, [1, classes, 1])
    zero = constant("zero", [0.0], FLOAT, [])
    most = constant("max_detections", [test.max_detections], INT, [1])
    iou = constant("iou_threshold", [test.iou_threshold], FLOAT, [1])
    threshold = constant("score_threshold", [test.score_threshold], FLOAT, [1])
    one = constant("axis_one", [1], INT, [1])
    first = constant("axis_zero", [0], INT, [1])
    flat = constant("flat", [-1], INT, [1])
    column = constant("box_column", [2], INT, [1])
    node = helper.make_node
    graph.node.extend(
        [
            # A row of scores for each class, 0 for boxes of other classes.
            node("Unsqueeze", ["candidate_labels", one], ["labels_row"]),
            node("Unsqueeze", ["candidate_scores", one], ["scores_row"]),
            node("Equal", ["labels_row", every], ["of_class"]),
            node("Where", ["of_class", "scores_row", zero], ["class_scores"]),
            node(
                "NonMaxSuppression",
                ["candidate_boxes", "class_scores", most, iou, threshold],
                ["selected"],
                name="nms",
                center_point_box=0,
            ),
            node("Gather", ["selected", column], ["selected_column"], axis=1),
            node("Reshape", ["selected_column", flat], ["kept"]),
            node("Squeeze", ["candidate_boxes", first], ["all_boxes"]),
            node("Squeeze", ["candidate_scores", first], ["all_scores"]),
            node("Squeeze", ["candidate_labels", first], ["all_labels"]),
            node("Gather", ["all_scores", "kept"], ["kept_scores"], axis=0),
            node("Shape", ["kept"], ["kept_count"]),
            node("Min", ["kept_count", most], ["count"]),
            node("TopK", ["kept_scores", "count"], ["scores", "best"], axis=0),
            node("Gather", ["kept", "best"], ["chosen"], axis=0),
            node("Gather", ["all_boxes", "chosen"], ["boxes"], axis=0),
            node("Gather", ["all_labels", "chosen"], ["labels"], axis=0),
        ]
    )
    del graph.output[:]
    for name, kind, width in (("boxes", FLOAT, [4]), ("scores", FLOAT, []), ("labels", INT, [])):
        graph.output.append(helper.make_tensor_value_info(name, kind, ["n", *width]))


def _describe(
    proto: Any, model: GFL, size: tuple[int, int], outputs: str, integral: list[str], classes: list[str] | None
) -> None:
    from onnx import helper

    from ..data.transforms import MEAN, STD

    del proto.metadata_props[:]
    values = {
        "outputs": outputs,
        "size": f"{size[0]},{size[1]}",
        "mean": ",".join(map(str, MEAN)),
        "std": ",".join(map(str, STD)),
        INTEGRAL_NODES: ",".join(integral),
        "strides": ",".join(map(str, model.config.strides)),
        "reg_max": str(model.config.reg_max),
    }
    helper.set_model_props(proto, values | ({"classes": "\n".join(classes)} if classes else {}))
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
    C++ loads too; neither needs this package. Inputs and outputs as for `to_onnx`, but "detections" are the candidates
    before NMS.

    Args:
        model, file, size, outputs, dtype: as for `to_onnx`.
        batch: images at a time; None: any number.
        compiled: by AOTInductor, for this machine's kind of CPU or GPU; needs a C++ compiler.
        device: that the program runs on.
    """
    whole = Exportable(model, size, outputs, dtype).to(device)
    images = torch.zeros(2 if batch is None else batch, 3, *size, device=device)
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=4096)}} if batch is None else None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(whole, (images,), dynamic_shapes=shapes)
        if compiled:
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))
        else:
            torch.export.save(program, file)
