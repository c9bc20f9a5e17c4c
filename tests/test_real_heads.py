# SPDX-License-Identifier: Apache-2.0
"""`postprocess` on what a trained head puts out for 47 photos of COCO: AP, and the same detections on every backend."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import real_data
import torch
from postprocess_loops import loops
from torch import Tensor

import gfl_ops
from gfl_ops import Detections
from gfl_ops.core import backends

pytestmark = [
    pytest.mark.skipif(real_data.missing() is not None, reason=str(real_data.missing())),
    pytest.mark.usefixtures("everywhere"),
]

# All candidates of a level, as the program that made the reference detections took them.
EVERYTHING = {"reg_max": real_data.REG_MAX, "nms_pre": 0}
NEAR = 1e-5
# Triton's interpreter is slow: it sees a few photos.
BACKENDS = [b for b in ("native", "triton") if not backends.unavailable(b, "postprocess", "cpu")]
VARIANTS = {
    "pair": {},
    "pair-1000": {"nms_pre": 1000},
    "anchor-100": {"nms_pre": 100, "topk_mode": "anchor"},
    "legacy": {"legacy": True},
    "legacy-anchor-50": {"legacy": True, "topk_mode": "anchor", "nms_pre": 50},
    "low-threshold": {"score_threshold": 0.01, "nms_pre": 300},
}


@pytest.fixture(scope="module")
def sparse() -> real_data.Photos:
    return real_data.sparse_heads()


@pytest.fixture(scope="module")
def full() -> real_data.Photos:
    return real_data.full_heads()


def detect(backend: str, photos: real_data.Photos, **keywords: Any) -> Detections:
    with gfl_ops.set_backend(backend):
        return gfl_ops.postprocess(*photos.arguments(), **{**EVERYTHING, **keywords})


def rows(found: Detections, image: int) -> list[tuple[float, ...]]:
    n = int(found.count[image])
    return [
        (label, score, *box)
        for label, score, box in zip(
            found.labels[image, :n].tolist(),
            found.scores[image, :n].tolist(),
            found.boxes[image, :n].tolist(),
            strict=True,
        )
    ]


def agree(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return (
        a[0] == b[0] and abs(a[1] - b[1]) <= NEAR and all(abs(x - y) <= 1e-3 for x, y in zip(a[2:], b[2:], strict=True))
    )


def near_decisions(photos: real_data.Photos, found: Detections, image: int, **keywords: Any) -> int:
    """Scores within 1e-5 of the threshold, and IoUs within 1e-5 of theirs of a kept box and a candidate, in fp64."""
    options = {"score_threshold": 0.05, "iou_threshold": 0.6, "legacy": False, **keywords}
    grow = 1.0 if options["legacy"] else 0.0
    near = 0
    boxes, labels = [], []
    for cls, reg, stride in zip(photos.cls_scores, photos.reg_preds, real_data.STRIDES, strict=True):
        probability = cls[image].double().sigmoid()
        near += int(((probability - options["score_threshold"]).abs() < NEAR).sum())
        c, y, x = (probability > options["score_threshold"]).nonzero(as_tuple=True)
        bins = torch.arange(real_data.REG_MAX + 1, dtype=torch.float64)
        sides = reg[image].double()[:, y, x].t().reshape(-1, 4, real_data.REG_MAX + 1).softmax(2)
        distance = (sides * bins).sum(2) * stride
        centre = torch.stack([x, y], 1).double() * stride + (stride - 1) / 2 * grow
        box = torch.cat([centre - distance[:, :2], centre + distance[:, 2:]], 1)
        boxes.append(box.clamp(0, real_data.INPUT - grow))
        labels.append(c)
    box, label = torch.cat(boxes), torch.cat(labels)
    for row in rows(found, image):
        same = box[label == row[0]]
        near += int(
            (
                (overlap(torch.tensor(row[2:], dtype=torch.float64), same, grow) - options["iou_threshold"]).abs()
                < NEAR
            ).sum()
        )
    return near


def overlap(a: Tensor, b: Tensor, grow: float) -> Tensor:
    size = (torch.minimum(a[2:], b[:, 2:]) - torch.maximum(a[:2], b[:, :2]) + grow).clamp(min=0)
    both = size.prod(1)
    return both / ((a[2:] - a[:2] + grow).prod() + (b[:, 2:] - b[:, :2] + grow).prod(1) - both)


def check_same(photos: real_data.Photos, want: Detections, got: Detections, what: str, **keywords: Any) -> None:
    """The same detections in the same order, but in photos where a decision is within 1e-5; those are printed."""
    near_photos = differing = 0
    for image, photo in enumerate(photos.ids):
        a, b = rows(want, image), rows(got, image)
        near = near_decisions(photos, want, image, **keywords)
        near_photos += near > 0
        if len(a) == len(b) and all(agree(x, y) for x, y in zip(a, b, strict=True)):
            continue
        differing += 1
        assert near, f"{what}: photo {photo} differs, and no decision in it is within {NEAR}"
    total = int(want.count.sum())
    print(f"{what}: {total} detections, {near_photos} photos with a decision within {NEAR}, {differing} of them differ")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_average_precision_is_that_of_the_independent_program(backend: str, sparse: real_data.Photos) -> None:
    if backend == "triton":
        pytest.skip("47 photos take too long in Triton's interpreter; it is compared on a few")
    found = detect(backend, sparse, scale_factors=sparse.scale_factors)
    results = real_data.coco_results(sparse.ids, found)
    ap = real_data.average_precision(results)
    print(f"{backend}: AP {ap:.4f}, {len(results)} detections")
    assert abs(ap - 0.3644) <= 0.002


def test_reference_agrees_with_the_independent_program(sparse: real_data.Photos) -> None:
    """Its detections were made before the maps were rounded to fp16, so boxes and scores differ by that rounding."""
    found = real_data.coco_results(sparse.ids, detect("reference", sparse, scale_factors=sparse.scale_factors))
    expected = real_data.reference_detections()
    remaining = defaultdict(list)
    for row in found:
        remaining[row["image_id"], row["category_id"]].append(row)
    matched = 0
    for row in expected:
        candidates = remaining[row["image_id"], row["category_id"]]
        for i, other in enumerate(candidates):
            shift = max(abs(a - b) for a, b in zip(row["bbox"], other["bbox"], strict=True))
            # The half-precision head moves a box by at most a few hundredths of its size.
            if abs(row["score"] - other["score"]) < 2e-3 and shift < 1.0:
                matched += 1
                del candidates[i]
                break
    print(f"{matched} of {len(expected)} reference detections found, {len(found)} made")
    assert len(found) == pytest.approx(len(expected), rel=0.01)
    assert matched >= 0.99 * len(expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_backends_agree_on_the_sparse_heads(backend: str, variant: str, sparse: real_data.Photos) -> None:
    photos = real_data.sparse_heads(2) if backend == "triton" else sparse
    keywords = VARIANTS[variant]
    want, got = detect("reference", photos, **keywords), detect(backend, photos, **keywords)
    check_same(photos, want, got, f"{backend} {variant}", **keywords)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_backends_agree_on_the_full_heads(backend: str, variant: str, full: real_data.Photos) -> None:
    photos = real_data.full_heads(1) if backend == "triton" else full
    keywords = VARIANTS[variant]
    want = detect("reference", photos, **keywords)
    check_same(photos, want, detect(backend, photos, **keywords), f"{backend} {variant}", **keywords)
    # Another layout and fp32 maps of the same numbers change nothing at all.
    got = detect(backend, photos, **keywords)
    for other in (photos.channels_last(), photos.to(dtype=torch.float32)):
        again = detect(backend, other, **keywords)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_what_is_below_the_threshold_has_no_effect(backend: str, full: real_data.Photos) -> None:
    """The sparse files leave out what is below 0.045; at 0.05 that makes no difference to a bit."""
    sparse = real_data.sparse_heads()
    for image, photo in enumerate(full.ids[: 1 if backend == "triton" else None]):
        part = sparse.ids.index(photo)
        single = [
            real_data.Photos(
                [photo],
                [m[i : i + 1] for m in photos.cls_scores],
                [m[i : i + 1] for m in photos.reg_preds],
                photos.image_sizes[i : i + 1],
                photos.scale_factors[i : i + 1],
            )
            for photos, i in ((full, image), (sparse, part))
        ]
        a, b = (detect(backend, photos) for photos in single)
        assert int(a.count) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("variant", ["pair", "anchor-100", "legacy", "legacy-anchor-50"])
def test_reference_agrees_with_loops_on_a_photo(variant: str, full: real_data.Photos) -> None:
    keywords = {
        "score_threshold": 0.05,
        "nms_pre": 0,
        "iou_threshold": 0.6,
        "max_detections": 100,
        "topk_mode": "pair",
        "legacy": False,
        **VARIANTS[variant],
    }
    photo = real_data.full_heads(1)
    want = loops(
        photo.cls_scores,
        photo.reg_preds,
        list(real_data.STRIDES),
        [tuple(photo.image_sizes[0].tolist())],
        reg_max=real_data.REG_MAX,
        center_offset=[0.0] * 4,
        scale_factors=None,
        activated=False,
        **keywords,
    )[0]
    found = detect("reference", photo, **keywords)
    got = rows(found, 0)
    if len(want) != len(got) or not all(agree((c, s, *box), g) for (s, c, box, _), g in zip(want, got, strict=True)):
        assert near_decisions(photo, found, 0, **VARIANTS[variant]), variant
