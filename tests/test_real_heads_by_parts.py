# SPDX-License-Identifier: Apache-2.0
"""A trained head's outputs for a few photos through decoding and NMS, on the backends that have no post-process yet.

Candidates are chosen here; decoding and suppression are Triton's (in its interpreter) or the CUDA sources' (on the
host). What comes out must be what the compiled post-process finds.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import real_data
import torch
from torch import Tensor

import gfl_ops
from gfl_ops import _backend

ROOT = Path(__file__).resolve().parent.parent
HOST = ROOT / "csrc" / "tests" / "cuda_on_host"
PHOTOS, THRESHOLD, OVERLAP, SLOTS = 3, 0.05, 0.6, 100

pytestmark = pytest.mark.skipif(real_data.missing() is not None, reason=str(real_data.missing()))

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]  # distributions, points, strides -> boxes within the input
Suppress = Callable[[Tensor, Tensor, Tensor], Tensor]  # boxes, scores, labels -> indices by falling score


def by_parts(photos: real_data.Photos, image: int, decode: Decode, suppress: Suppress) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes in the photo, scores and labels of one photo, in `postprocess`'s order."""
    limit = math.log(THRESHOLD / (1 - THRESHOLD))
    rows, points, strides, logits, labels = [], [], [], [], []
    for cls_score, reg_pred, stride in zip(photos.cls_scores, photos.reg_preds, real_data.STRIDES, strict=True):
        scores = cls_score[image].float().permute(1, 2, 0)
        y, x, label = (scores > torch.tensor(limit)).nonzero().unbind(1)
        rows.append(reg_pred[image][:, y, x].t().float())
        points.append(torch.stack([x, y], 1).float() * stride)
        strides.append(torch.full((len(x),), float(stride)))
        logits.append(scores[y, x, label])
        labels.append(label)
    score, label = torch.cat(logits), torch.cat(labels)
    boxes = decode(torch.cat(rows).contiguous(), torch.cat(points), torch.cat(strides))
    sized = (boxes[:, 2:] - boxes[:, :2] > 0).all(1)
    boxes, score, label = boxes[sized], score[sized], label[sized]
    keep = suppress(boxes, score, label)[:SLOTS]
    return boxes[keep] / photos.scale_factors[image].repeat(2), score[keep].sigmoid(), label[keep]


def assert_same_detections(decode: Decode, suppress: Suppress) -> None:
    photos = real_data.sparse_heads(PHOTOS)
    found = gfl_ops.postprocess(
        *photos.arguments(), reg_max=real_data.REG_MAX, nms_pre=0, scale_factors=photos.scale_factors,
        score_threshold=THRESHOLD, iou_threshold=OVERLAP, max_detections=SLOTS,
    )  # fmt: skip
    for image in range(PHOTOS):
        boxes, scores, labels = by_parts(photos, image, decode, suppress)
        count = int(found.count[image])
        assert len(labels) == count > 0
        torch.testing.assert_close(labels, found.labels[image, :count])
        # Softmax and sigmoid by another exponential: ulps of numbers up to 640 pixels.
        torch.testing.assert_close(scores, found.scores[image, :count], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(boxes, found.boxes[image, :count], rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(
    _backend.unavailable("triton", "decode", "cpu") is not None,
    reason=f"Triton: {_backend.unavailable('triton', 'decode', 'cpu')}",
)
def test_triton_finds_the_same() -> None:
    def decode(rows: Tensor, points: Tensor, strides: Tensor) -> Tensor:
        with gfl_ops.set_backend("triton"):
            return gfl_ops.decode(rows, points, strides, real_data.REG_MAX, (real_data.INPUT, real_data.INPUT))

    def suppress(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        with gfl_ops.set_backend("triton"):
            return gfl_ops.batched_nms(boxes, scores, labels, OVERLAP)

    assert_same_detections(decode, suppress)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA sources of decoding and NMS, compiled for the host."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler: c++ is not on PATH")
    target = tmp_path_factory.mktemp("cuda_on_host") / "photo.so"
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    command += ["-DGFL_CUDA_ON_HOST", "-DGFL_WITH_CUDA", f"-I{HOST / 'include'}"]
    command += [f"-I{ROOT / 'csrc' / name}" for name in ("include", "common")]
    command += ["-x", "c++", str(ROOT / "tests" / "cuda_on_host" / "photo.cpp")]
    command += [str(ROOT / "csrc" / "cuda" / name) for name in ("decode.cu", "nms.cu")]
    command += [str(HOST / name) for name in ("api.cpp", "fiber.cpp", "runtime.cpp")]
    subprocess.run([*command, "-o", str(target)], check=True, timeout=600)
    return ctypes.CDLL(str(target))


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def test_the_cuda_sources_find_the_same(library: ctypes.CDLL) -> None:
    def decode(rows: Tensor, points: Tensor, strides: Tensor) -> Tensor:
        limit = torch.full((len(rows), 2), float(real_data.INPUT))
        boxes = torch.empty((len(rows), 4))
        status = library.decode_rows(
            address(rows), address(points), address(strides), address(limit),
            ctypes.c_int64(len(rows)), ctypes.c_int64(real_data.REG_MAX + 1), address(boxes),
        )  # fmt: skip
        assert status == 0
        return boxes

    def suppress(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        boxes, labels = boxes.contiguous(), labels.contiguous()
        order = scores.sort(descending=True, stable=True).indices
        keep = torch.empty(len(boxes), dtype=torch.uint8)
        status = library.nms_rows(
            address(boxes), address(labels), address(order), ctypes.c_int64(len(boxes)), ctypes.c_double(OVERLAP),
            address(keep),
        )  # fmt: skip
        assert status == 0
        return order[keep.bool()]

    assert_same_detections(decode, suppress)
