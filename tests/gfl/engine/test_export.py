# SPDX-License-Identifier: Apache-2.0
"""Files that run without this package: their results are the model's, their operators standard ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gfl import checkpoint
from gfl.config import preset
from gfl.data import transforms
from gfl.data.coco import CocoDataset, coco_detection
from gfl.data.loader import training_dataset, validation_dataset
from gfl.demo.course import run_demo
from gfl.engine import export
from gfl.engine.evaluate import coco_metrics
from gfl.models import GFL, build

SIZE = (96, 128)
CONFIG = {"num_classes": 5, "width": 8, "neck_channels": 16, "head_channels": 16, "head_groups": 4, "head_convs": 1}
# What every runtime knows: none of it is a contributed or a custom operator.
OPERATORS = """
Add And Cast Concat Constant Conv Div Equal Expand Flatten Gather GatherElements GatherND Greater Identity
InstanceNormalization MatMul Max MaxPool Min Mod Mul NonMaxSuppression ReduceMin Relu Reshape Resize ScatterND Shape
Sigmoid Slice Softmax Squeeze Sub TopK Transpose Unsqueeze Where
"""


@pytest.fixture
def model(seed: int) -> GFL:
    torch.manual_seed(seed)
    config = preset("gfl_tiny").replace(**CONFIG)
    model = build(config.model, config.test).eval()
    head = model.bbox_head
    # Not more, or scores round to 1 and their order, with it what NMS keeps, hangs on the last digit of a logit.
    torch.nn.init.normal_(head.gfl_cls.weight, std=0.1)
    torch.nn.init.normal_(head.gfl_reg.weight, std=0.3)
    torch.nn.init.constant_(head.gfl_cls.bias, -1.0)  # type: ignore[arg-type]
    for scale in head.scales:
        torch.nn.init.uniform_(scale.scale, 0.7, 1.4)  # type: ignore[arg-type]
    return model


def photo_like(batch: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(batch, 3, 12, 16, generator=generator)
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear")


def session(file: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def needs_onnx() -> Any:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    return pytest.importorskip("onnx", reason="onnx is not installed")


def test_decoded_boxes_are_the_operators(model: GFL, generator: torch.Generator) -> None:
    """`Exportable` itself, in PyTorch, against `gfl_ops` on the same maps."""
    import gfl_ops

    images = photo_like(2, generator)
    with torch.no_grad():
        boxes, scores = export.Exportable(model, SIZE, "decoded")(images)
        cls_scores, reg_preds = model.predict_maps(images)
    flat = torch.cat([x.flatten(2).transpose(1, 2) for x in cls_scores], 1)
    torch.testing.assert_close(scores, flat.sigmoid(), rtol=0, atol=1e-4)
    start = 0
    for level, stride in zip(reg_preds, model.config.strides):
        rows = level.permute(0, 2, 3, 1).reshape(-1, 68)
        y, x = torch.meshgrid(*(torch.arange(n) for n in level.shape[2:]), indexing="ij")
        points = torch.stack([x, y], -1).reshape(-1, 2).repeat(2, 1).float() * stride
        want = gfl_ops.decode(rows, points, stride=float(stride), reg_max=16)
        limit = torch.tensor([128.0, 96.0] * 2)
        want = torch.minimum(want.clamp(min=0), limit).view(2, -1, 4)
        cells = want.shape[1]
        torch.testing.assert_close(boxes[:, start : start + cells], want, rtol=0, atol=2e-2)
        start += cells
    assert start == boxes.shape[1]


def test_onnx_detections_of_real_photos_are_the_models(model: GFL, data: Path, tmp_path: Path, seed: int) -> None:
    onnx = needs_onnx()
    file = tmp_path / "detector.onnx"
    export.to_onnx(model, file, SIZE, outputs="detections", classes=["a", "b", "c", "d", "e"])
    run = session(file)
    paths = sorted((data / "coco_val2017_47" / "images").iterdir())
    for path in [paths[(seed + n) % len(paths)] for n in range(3)]:
        pixels = transforms.read_image(path)
        size = transforms.keep_ratio_size(*pixels.shape[1:], min(SIZE), max(SIZE))
        # In a canvas of the file's size, whatever the photo's orientation.
        size = (min(size[0], SIZE[0]), min(size[1], SIZE[1]))
        batch = torch.zeros(1, 3, *SIZE, dtype=torch.uint8)
        batch[0, :, : size[0], : size[1]] = transforms.resize(pixels, *size)
        images = transforms.normalise(batch, torch.tensor([size], dtype=torch.float32))
        boxes, scores, labels = (torch.from_numpy(part) for part in run.run(None, {"images": images.numpy()}))
        want = model(images)
        count = int(want.count)
        assert count > 5 and len(boxes) == len(scores) == len(labels) and abs(len(boxes) - count) <= 1
        # Equal up to where a score or an IoU within rounding of another decides otherwise.
        n = count // 2
        torch.testing.assert_close(scores[:n], want.scores[0, :n], rtol=0, atol=1e-4)
        close = scores[:n].diff().abs().min() > 1e-4 if n > 1 else torch.tensor(True)
        if close:
            assert torch.equal(labels[:n], want.labels[0, :n])
            torch.testing.assert_close(boxes[:n], want.boxes[0, :n], rtol=0, atol=2e-2)
    proto = onnx.load(file)
    assert {node.op_type for node in proto.graph.node} <= set(OPERATORS.split()) and {
        n.domain for n in proto.graph.node
    } == {""}
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    assert properties["classes"].split("\n") == ["a", "b", "c", "d", "e"] and properties["reg_max"] == "16"


@pytest.mark.parametrize("batch", [2, None])
def test_onnx_detections_of_a_batch_are_those_of_its_images(
    batch: int | None, model: GFL, tmp_path: Path, generator: torch.Generator
) -> None:
    onnx = needs_onnx()
    one, several = tmp_path / "one.onnx", tmp_path / "several.onnx"
    export.to_onnx(model, one, SIZE, outputs="detections")
    export.to_onnx(model, several, SIZE, outputs="detections", batch=batch)
    images = photo_like(2 if batch else 3, generator)
    # The network's scores of an image that is nothing but padding are its biases': no candidate at this threshold.
    images[0] *= 0
    boxes, scores, labels = (torch.from_numpy(part) for part in session(several).run(None, {"images": images.numpy()}))
    most = model.test.max_detections
    assert boxes.shape == (len(images), most, 4) and scores.shape == labels.shape == (len(images), most)
    for number, image in enumerate(images):
        want = [torch.from_numpy(part) for part in session(one).run(None, {"images": image[None].numpy()})]
        count = len(want[1])
        assert (labels[number] >= 0).sum() == count and (labels[number, count:] == -1).all()
        assert not scores[number, count:].any() and not boxes[number, count:].any()
        torch.testing.assert_close(scores[number, :count], want[1], rtol=0, atol=1e-5)
        if count < 2 or want[1].diff().abs().min() > 1e-5:
            assert torch.equal(labels[number, :count], want[2])
            torch.testing.assert_close(boxes[number, :count], want[0], rtol=0, atol=1e-3)
    proto = onnx.load(several)
    assert {node.op_type for node in proto.graph.node} <= set(OPERATORS.split())
    # Where nothing is found all slots are unused.
    (limit,) = (one for one in proto.graph.initializer if one.name == "score_threshold")
    limit.CopyFrom(onnx.numpy_helper.from_array(torch.tensor([2.0]).numpy(), "score_threshold"))
    onnx.save(proto, several)
    boxes, scores, labels = session(several).run(None, {"images": images.numpy()})
    assert not boxes.any() and not scores.any() and (labels == -1).all()


def test_onnx_of_pixels_normalises_and_the_example_runs_it(
    model: GFL, data: Path, tmp_path: Path, seed: int, generator: torch.Generator
) -> None:
    needs_onnx()
    file, (height, width) = tmp_path / "detector.onnx", SIZE
    export.to_onnx(model, file, SIZE, outputs="detections", classes=["a", "b", "c", "d", "e"], pixels=True)
    pixels = torch.randint(256, (1, height, width, 3), dtype=torch.uint8, generator=generator)
    size = (80, 112)
    batch = transforms.normalise(pixels.permute(0, 3, 1, 2), torch.tensor([size], dtype=torch.float32))
    given = {"pixels": pixels.numpy(), "sizes": torch.tensor([size]).numpy()}
    boxes, scores, labels = (torch.from_numpy(part) for part in session(file).run(None, given))
    want = model(batch)
    n = int(want.count) // 2
    assert n > 2 and len(labels) == len(boxes)
    torch.testing.assert_close(scores[:n], want.scores[0, :n], rtol=0, atol=1e-4)
    photo = sorted((data / "coco_val2017_47" / "images").iterdir())[seed % 47]
    example = Path(__file__).parents[3] / "examples" / "onnx_detect.py"
    words = [sys.executable, str(example), str(file), str(photo)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert re.match(r"[a-e] 0\.\d\d( -?\d+\.\d){4}\n", done.stdout)


def test_onnx_in_half_precision_keeps_the_integral(model: GFL, tmp_path: Path, generator: torch.Generator) -> None:
    onnx = needs_onnx()
    file = tmp_path / "detector.onnx"
    export.to_onnx(model, file, SIZE, batch=None, outputs="decoded", dtype=torch.float16)
    proto = onnx.load(file)
    kinds = {i.name: i.data_type for i in proto.graph.initializer}
    kinds |= {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    listed = next(p.value for p in proto.metadata_props if p.key == export.INTEGRAL_NODES).split(",")
    nodes = {node.name: node for node in proto.graph.node}
    integral = [name for name in listed if nodes[name].op_type in ("Softmax", "MatMul")]
    assert len(integral) == 2 and not any(nodes[name].op_type == "Conv" for name in listed)
    for name in integral:
        assert all(kinds[value] == onnx.TensorProto.FLOAT for value in (*nodes[name].input, *nodes[name].output))
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert convolutions and all(kinds[node.input[1]] == onnx.TensorProto.FLOAT16 for node in convolutions)
    images = photo_like(3, generator)
    boxes, scores = (torch.from_numpy(part) for part in session(file).run(None, {"images": images.numpy()}))
    with torch.no_grad():
        want_boxes, want_scores = export.Exportable(model, SIZE, "decoded")(images)
    assert boxes.shape == want_boxes.shape and boxes.dtype == scores.dtype == torch.float32
    # fp16 has 11 bits; logits of a few units pass some ten roundings.
    torch.testing.assert_close(scores, want_scores, rtol=0, atol=2e-2)
    assert (boxes - want_boxes).abs().mean() < 0.3


@pytest.mark.slow
def test_static_quantisation_keeps_the_average_precision(tmp_path: Path) -> None:
    """To 8 bits in QDQ form, as the help says, of a detector that finds something."""
    needs_onnx()
    quantisation = pytest.importorskip("onnxruntime.quantization", reason="onnxruntime is not installed")
    threads = torch.get_num_threads()
    try:
        run_demo(tmp_path / "demo", iterations=500)
    finally:
        torch.set_num_threads(threads)
    model, config, *_ = checkpoint.model_from(tmp_path / "demo" / "training" / "best.pt")
    floating, whole = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    size = (config.test.short_side, config.test.long_side)
    export.to_onnx(model, floating, size)
    shown, held_out = training_dataset(config), validation_dataset(config)
    calibration = iter([{"images": prepared(shown[i].image)} for i in range(32)])

    class Reader(quantisation.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def get_next(self) -> Any:
            return next(calibration, None)

    excluded = session(floating).get_modelmeta().custom_metadata_map[export.INTEGRAL_NODES].split(",")
    form = quantisation.QuantFormat.QDQ
    quantisation.quantize_static(str(floating), str(whole), Reader(), quant_format=form, nodes_to_exclude=excluded)
    assert whole.stat().st_size < 0.6 * floating.stat().st_size
    before, after = (average_precision(session(file), held_out) for file in (floating, whole))
    print(f"AP {before:.4f} in fp32, {after:.4f} in 8 bits")
    assert before > 0.1 and abs(after - before) < 0.01


def prepared(image: Tensor) -> Any:
    return transforms.normalise(image[None], torch.tensor([image.shape[1:]], dtype=torch.float32)).numpy()


def average_precision(run: Any, data: CocoDataset) -> float:
    found = []
    for sample in (data[i] for i in range(len(data))):
        boxes, scores, labels = (part.tolist() for part in run.run(None, {"images": prepared(sample.image)}))
        ids = [data.category_ids[label] for label in labels]
        found += [coco_detection(sample.image_id, *one) for one in zip(ids, boxes, scores)]
    return coco_metrics(data.annotations, found)["AP"]


def test_a_program_runs_without_this_package(model: GFL, tmp_path: Path, generator: torch.Generator) -> None:
    file = tmp_path / "detector.pt2"
    export.to_torch(model, file, SIZE, batch=None, outputs="detections")
    images = photo_like(2, generator)
    torch.save(images, tmp_path / "images.pt")
    program = f"""
import sys
sys.modules["gfl"] = sys.modules["gfl_ops"] = None
import torch
found = torch.export.load({str(file)!r}).module()(torch.load({str(tmp_path / "images.pt")!r}))
torch.save([x.detach() for x in found], {str(tmp_path / "found.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        want = export.Exportable(model, SIZE, "detections")(images)
    assert [x.shape for x in found] == [x.shape for x in want]
    torch.testing.assert_close(found[1], want[1], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_program_runs_without_this_package(model: GFL, tmp_path: Path, generator: torch.Generator) -> None:
    file = tmp_path / "detector.pt2"
    export.to_torch(model, file, SIZE, outputs="maps", compiled=True)
    images = photo_like(1, generator)
    torch.save(images, tmp_path / "images.pt")
    program = f"""
import sys
sys.modules["gfl"] = sys.modules["gfl_ops"] = None
import torch
found = torch._inductor.aoti_load_package({str(file)!r})(torch.load({str(tmp_path / "images.pt")!r}))
torch.save(list(found), {str(tmp_path / "found.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        want = model.predict_maps(images)
    for a, b in zip(torch.load(tmp_path / "found.pt"), want[0] + want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-4 * max(float(b.abs().max()), 0.1))


def test_what_it_refuses(model: GFL, tmp_path: Path) -> None:
    needs_onnx()
    model._config.topk_mode = "anchor"
    with pytest.raises(ValueError, match="export `decoded`"):
        export.to_onnx(model, tmp_path / "x.onnx", SIZE)
    assert not list(tmp_path.iterdir())


def test_without_the_packages_it_says_what_to_install(
    model: GFL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RuntimeError, match=r"gfl-ops\[export\]"):
        export.to_onnx(model, tmp_path / "x.onnx", SIZE)
