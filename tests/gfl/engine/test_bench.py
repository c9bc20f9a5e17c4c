# SPDX-License-Identifier: Apache-2.0
"""What `gfl bench` counts and compares: operations by hand, the plain reading of boxes against ours."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import gfl_ops
from gfl.config import preset
from gfl.engine import bench, plain


def test_operations_of_the_papers_network() -> None:
    # 2·k²·C·K a cell; head: 8 towers' layers of 256 to 256 and outputs of 80 and 68, for 22 400 cells.
    cells = sum(-(-800 // s) * -(-1344 // s) for s in (8, 16, 32, 64, 128))
    assert cells == 22400
    head = 2 * 9 * 256 * (8 * 256 + 80 + 68) * cells / 1e9
    whole = bench.count_flops("gfl_r50_1x", 800, 1344)
    assert whole == pytest.approx(436, abs=1) and 0.5 < head / whole < 0.53


def test_operations_of_a_batch_of_another_size() -> None:
    small, large = bench.count_flops("gfl_tiny", 64, 64), bench.count_flops("gfl_tiny", 128, 128)
    # The coarsest levels have one cell of both.
    assert 3.5 * small < large < 4 * small


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_deformable_convolutions_count() -> None:
    plain_one, deformed = (bench.count_flops(n, 128, 128) for n in ("gfl_r101_2x", "gfl_r101_dcnv2_2x"))
    # The same multiplications, and offsets of 27 channels.
    assert plain_one < deformed < 1.15 * plain_one


def test_the_plain_reading_of_boxes_finds_what_ours_does(generator: torch.Generator) -> None:
    config = preset("gfl_tiny").replace(num_classes=4, strides=(8, 16, 32))
    sizes = [(8, 10), (4, 5), (2, 3)]
    cls_scores = [torch.randn(2, 4, *size, generator=generator) * 2 for size in sizes]
    reg_preds = [torch.randn(2, 68, *size, generator=generator) * 2 for size in sizes]
    nms, _ = plain.available_nms()
    image_sizes = [(64.0, 80.0), (50.0, 70.0)]
    test = config.test
    found = plain.read_maps(cls_scores, reg_preds, image_sizes, config.model, test, nms)
    want = gfl_ops.postprocess(cls_scores, reg_preds, (8, 16, 32), image_sizes, max_detections=test.max_detections)
    for (boxes, scores, labels), *ours in zip(found, *want):
        n = int(ours[3])
        # A box whose IoU is within rounding of the threshold may be kept by one: then all after it move.
        assert abs(len(boxes) - n) <= 1 and n > 10
        torch.testing.assert_close(scores[: n // 2], ours[1][: n // 2])
        assert torch.equal(labels[: n // 2], ours[2][: n // 2])
        torch.testing.assert_close(boxes[: n // 2], ours[0][: n // 2], rtol=1e-4, atol=1e-3)


def test_a_random_network_finds_as_much_as_a_trained_one(seed: int) -> None:
    model, image = bench.prepare("gfl_tiny", (96, 128), torch.device("cpu"), seed)
    assert image.dtype == torch.uint8 and image.shape == (3, 96, 128) and image.float().std() > 10
    from gfl.data import transforms

    cls_scores, _ = model.predict_maps(transforms.normalise(image[None], torch.tensor([[96.0, 128.0]])))
    above = sum(int((x.sigmoid() > model.test.score_threshold).sum()) for x in cls_scores)
    pairs = sum(x.numel() for x in cls_scores)
    assert above == pytest.approx(bench.SHARE * pairs, rel=0.05)


def test_ways_are_timed_in_turn_and_described() -> None:
    timings = bench.bench("gfl_tiny", (64, 96), 2, torch.device("cpu"), torch.float32, seconds=0.01, rate=1e9)
    assert [t.provider for t in timings] == ["plain", "ours"]
    for timing in timings:
        assert tuple(timing.parts) == bench.PARTS and all(s > 0 for s in timing.parts.values())
        assert len(timing.seconds) >= 3 and timing.p99 == max(timing.seconds) >= timing.p50
        assert timing.floor == pytest.approx(2 * timing.gflop)
        assert timing.to_dict()["images_per_second"] == pytest.approx(2 / timing.p50)
    assert timings[0].difference == 0 < timings[1].difference < 1e-3


def test_networks_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = bench.FusedGFL

    def wrong(model, dtype):
        other = fused(model, dtype)
        other.bbox_head.gfl_cls.bias += 1
        return other

    monkeypatch.setattr(bench, "FusedGFL", wrong)
    with pytest.raises(RuntimeError, match="by which maps differ"):
        bench.bench("gfl_tiny", (64, 64), 1, torch.device("cpu"), torch.float32, seconds=0.01, rate=1e9)


def test_percentiles() -> None:
    timing = bench.Timing("m", (1, 1), "cpu", "fp32", 4, "ours", [n / 1000 for n in range(1, 201)], 1.0, 0.05, None)
    assert timing.p99 == 0.198 and timing.p50 == pytest.approx(0.1005)
    assert timing.images_per_second == pytest.approx(4 / 0.1005) and timing.share_of_floor == pytest.approx(
        0.4975, 1e-3
    )
