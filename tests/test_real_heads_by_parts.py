# SPDX-License-Identifier: Apache-2.0
"""A trained head's outputs for photos through what runs them on a GPU, without one.

The CUDA sources' post-process, on the host, and decoding and suppression by themselves, of the CUDA sources and of
Triton (in its interpreter), with candidates chosen here. What comes out must be what the CPU's post-process finds.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import cuda_sources
import pytest
import real_data
import torch
from cuda_sources import address, numbers
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends

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
    backends.unavailable("triton", "decode", "cpu") is not None,
    reason=f"Triton: {backends.unavailable('triton', 'decode', 'cpu')}",
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
def library() -> ctypes.CDLL:
    return cuda_sources.library()


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
        return cuda_sources.nms(boxes, scores, labels, OVERLAP)

    assert_same_detections(decode, suppress)


def cuda_postprocess(library: ctypes.CDLL, photos: real_data.Photos, nms_pre: int) -> gfl_ops.Detections:
    """`postprocess` by the CUDA sources, in the photos' pixels."""
    batch, maps = len(photos.ids), (photos.cls_scores, photos.reg_preds)
    found = gfl_ops.Detections(
        torch.empty((batch, SLOTS, 4)), torch.empty((batch, SLOTS)), torch.empty((batch, SLOTS), dtype=torch.int64),
        torch.empty((batch,), dtype=torch.int32), torch.empty((batch, SLOTS), dtype=torch.int64),
    )  # fmt: skip
    pointers = [(ctypes.c_void_p * len(levels))(*(m.data_ptr() for m in levels)) for levels in maps]
    steps = [numbers([s for m in levels for s in m.stride()]) for levels in maps]
    status = library.postprocess_maps(
        *pointers, numbers([s for m in maps[0] for s in m.shape[2:]]), *steps, numbers(list(real_data.STRIDES)),
        *(ctypes.c_int64(i) for i in (len(maps[0]), batch, real_data.CLASSES, real_data.REG_MAX)),
        address(photos.image_sizes), address(photos.scale_factors), ctypes.c_double(THRESHOLD),
        ctypes.c_int64(nms_pre), ctypes.c_double(OVERLAP), ctypes.c_int64(SLOTS), *(address(t) for t in found),
    )  # fmt: skip
    assert status == 0
    return found


@pytest.mark.parametrize("layout", ["nchw", "channels-last"])
@pytest.mark.parametrize("nms_pre", [0, 100])
def test_the_cuda_post_process_finds_the_same(library: ctypes.CDLL, layout: str, nms_pre: int) -> None:
    photos = real_data.full_heads(2)
    photos = photos.channels_last() if layout == "channels-last" else photos
    want = gfl_ops.postprocess(
        *photos.arguments(), reg_max=real_data.REG_MAX, nms_pre=nms_pre, scale_factors=photos.scale_factors,
        score_threshold=THRESHOLD, iou_threshold=OVERLAP, max_detections=SLOTS,
    )  # fmt: skip
    assert int(want.count.min()) > 0
    for got, expected in zip(cuda_postprocess(library, photos, nms_pre), want, strict=True):
        # Softmax and sigmoid by another exponential: ulps of numbers up to 640 pixels.
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3 if got.dim() == 3 else 1e-5)


def test_the_cuda_post_process_has_the_average_precision(library: ctypes.CDLL) -> None:
    """That of the independent program, over all photos."""
    photos = real_data.sparse_heads()
    results = real_data.coco_results(photos.ids, cuda_postprocess(library, photos, 0)[:4])
    ap = real_data.average_precision(results)
    print(f"CUDA sources: AP {ap:.4f}, {len(results)} detections")
    assert abs(ap - 0.3644) <= 0.002
