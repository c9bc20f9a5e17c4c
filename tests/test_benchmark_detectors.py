# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of whole detectors, ours and other people's, on tiny inputs. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_modules
import pytest
import torch

import gfl_ops
from gfl.data import transforms

BENCH = benchmark_modules.FOLDER / "bench.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    with benchmark_modules.imported() as modules:
        yield modules


@pytest.fixture(scope="module")
def machine(parts: Any) -> Any:
    return parts.clock.Machine("cpu")


def bench(parts: Any, machine: Any) -> Any:
    return parts.harness.Bench(machine, parts.clock.Budget(1000.0), rounds=1, seconds=0.01)


def test_operations_of_the_papers_network(parts: Any) -> None:
    # 2·k²·C·K per cell; head: 8 tower layers of 256 to 256 and outputs of 80 and 68, for 22 400 cells.
    cells = sum(math.ceil(800 / s) * math.ceil(1344 / s) for s in (8, 16, 32, 64, 128))
    assert cells == 22400
    head = 2 * 9 * 256 * (8 * 256 + 80 + 68) * cells / 1e9
    whole = parts.detectors.count_flops("gfl_r50_1x", 800, 1344)
    assert whole == pytest.approx(436, abs=1) and 0.5 < head / whole < 0.53


def test_operations_at_another_size(parts: Any) -> None:
    small, large = (parts.detectors.count_flops("gfl_tiny", side, side) for side in (64, 128))
    # The coarsest levels have one cell in both.
    assert 3.5 * small < large < 4 * small


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_deformable_convolutions_count(parts: Any) -> None:
    plain, deformed = (parts.detectors.count_flops(n, 128, 128) for n in ("gfl_r101_2x", "gfl_r101_dcnv2_2x"))
    # The same multiplications, and offsets of 27 channels.
    assert plain < deformed < 1.15 * plain


def test_the_plain_postprocess_finds_what_ours_does(parts: Any, generator: torch.Generator) -> None:
    sizes = [(8, 10), (4, 5), (2, 3)]
    cls_scores = [torch.randn(2, 4, *size, generator=generator) * 2 for size in sizes]
    reg_preds = [torch.randn(2, 68, *size, generator=generator) * 2 for size in sizes]
    strides, image_size = (8, 16, 32), (50.0, 70.0)
    for offset in (0.0, 0.5):
        found = parts.formulas.select.detections(
            cls_scores, reg_preds, strides, image_size, 16, center_offset=offset, one_class=gfl_ops.nms
        )
        want = gfl_ops.postprocess(cls_scores, reg_preds, strides, [image_size] * 2, center_offset=offset)
        for (boxes, scores, labels), ours_boxes, ours_scores, ours_labels, count in zip(found, *want[:4]):
            n = int(count)
            # A box whose IoU is within rounding of the threshold may be kept by one: then all after it move.
            assert abs(len(boxes) - n) <= 1 and n > 10
            torch.testing.assert_close(scores[: n // 2], ours_scores[: n // 2])
            assert torch.equal(labels[: n // 2], ours_labels[: n // 2])
            torch.testing.assert_close(boxes[: n // 2], ours_boxes[: n // 2], rtol=1e-4, atol=1e-3)


def test_a_random_network_finds_as_much_as_a_trained_one(parts: Any, seed: int) -> None:
    model, image = parts.detectors.prepare("gfl_tiny", (96, 128), CPU, seed)
    assert image.dtype == torch.uint8 and image.shape == (3, 96, 128) and image.float().std() > 10
    cls_scores, _ = model.predict_maps(transforms.normalise(image[None], torch.tensor([[96.0, 128.0]])))
    above = sum(int((x.sigmoid() > model.test.score_threshold).sum()) for x in cls_scores)
    pairs = sum(x.numel() for x in cls_scores)
    assert above == pytest.approx(parts.detectors.SHARE * pairs, rel=0.05)


def test_ways_are_timed_in_turn_and_described(parts: Any, machine: Any) -> None:
    command = parts.command("detectors")
    results = command.measure(bench(parts, machine), "gfl_tiny", (64, 96), 2, "fp32", 1e9, False, 0)
    assert {(r.name, r.provider) for r in results} == {
        (name, way) for name in (command.WHOLE, *parts.detectors.PARTS) for way in ("plain", "optimized")
    }
    assert all(r.total.p20 <= r.total.median <= r.total.p80 for r in results)
    plain, ours = results[:2]
    gflop = parts.detectors.count_flops("gfl_tiny", 64, 96)
    assert plain.floor_share == pytest.approx(2e3 * gflop / plain.total.median)
    assert plain.error == 0 < ours.error < 1e-3
    text = command.table(results, gflop, 1e9)
    assert max(map(len, text.splitlines())) <= 80 and "x plain end to end" in text


def test_networks_that_differ_are_not_timed(parts: Any, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = parts.detectors.FusedGFL

    def wrong(model: Any, dtype: torch.dtype) -> Any:
        other = fused(model, dtype)
        other.bbox_head.gfl_cls.bias += 1
        return other

    monkeypatch.setattr(parts.detectors, "FusedGFL", wrong)
    with pytest.raises(RuntimeError, match="maps differ by"):
        parts.command("detectors").measure(bench(parts, machine), "gfl_tiny", (64, 64), 1, "fp32", 1e9, False, 0)


def test_files_to_boxes_are_timed_beside_reading_alone(tmp_path: Path) -> None:
    words = ["files", "--model", "gfl_tiny", "--size", "64x96", "--images", "5", "--batch", "2"]
    out, record = benchmark_modules.run_command(*words, folder=tmp_path)
    assert "5 drawn images" in out and "img/s" in out and record["files"] == 5
    rates = {r["provider"]: r["forward"]["median"] for r in record["results"]}
    assert set(rates) == {"reading", "optimized"} and min(rates.values()) > 0


def test_reading_is_timed_beside_opencv(tmp_path: Path) -> None:
    out, record = benchmark_modules.run_command("reading", "--images", "3", "--seconds", "0.1", folder=tmp_path)
    assert "3 drawn images" in out and record["files"] == 3
    rates = {r["provider"]: r["forward"]["median"] for r in record["results"]}
    assert "pillow" in rates and set(rates) <= {"gfl", "pillow", "opencv"} and min(rates.values()) > 0


def test_photos_are_taken_where_there_are_some(parts: Any, data: Path, tmp_path: Path) -> None:
    found, what = parts.command("files").photos(data, tmp_path, 7, 0)
    assert len(found) == 7 and what == "7 photos of COCO val2017" and not list(tmp_path.iterdir())


def test_batches_that_lose_boxes_are_not_timed(parts: Any, machine: Any, tmp_path: Path) -> None:
    command, folder = parts.command("files"), tmp_path / "files"
    folder.mkdir()
    given = parts.bench.parse(["files", "--model", "gfl_tiny", "--size", "64x64", "--device", "cpu", "--batch", "2"])
    files, _ = command.photos(tmp_path, folder, 4, 0)
    stream = command.gfl.Detector.stream

    def losing(self: Any, sources: Any, **options: Any) -> Any:
        return stream(self, sources[: max(1, len(sources) - 1)], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.gfl.Detector, "stream", losing)
        reading, ours = command.measure(bench(parts, machine), given, files)
    assert ours.status == "wrong" and ours.total is None and reading.total is None
    assert "wrong" in command.table([reading, ours], len(files))


def test_the_command_times_every_precision(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "detectors", "--models", "gfl_tiny", "--size", "64x64", "--batch", "1"]
    command += ["--dtypes", "fp32", "bf16", "--seconds", "0.01", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    found = json.loads((tmp_path / "bench_detectors.json").read_text())["results"]
    assert {r["dtype"] for r in found} == {"fp32", "bf16"} and all(r["status"] == "timed" for r in found)


def fake_detector(parts: Any, error: float) -> Any:
    """A detector whose losses and boxes are off by `error` when it is patched."""
    model = torch.nn.Conv2d(3, 6, 1)
    images, inside = torch.rand(2, 3, 8, 8), [0.0]

    def losses(given: torch.Tensor) -> list[torch.Tensor]:
        return [given.square().mean() * (1 + inside[0])]

    def boxes(given: torch.Tensor) -> list[torch.Tensor]:
        rows = given.flatten(2).transpose(1, 2)
        return [x for row in rows for x in (row[:, :4] + inside[0], row[:, 4], row[:, 5])]

    return parts.peer_detectors.Detector(
        train=lambda: losses(model(images)), loss=losses, detect=lambda: boxes(model(images)), read=boxes, model=model,
        maps=model(images).detach(), test_maps=model(images).detach(),
        patch=lambda: inside.__setitem__(0, error), unpatch=lambda: inside.__setitem__(0, 0.0),
    )  # fmt: skip


@pytest.mark.parametrize("error", [0.0, 0.5])
def test_a_detector_is_timed_patched_and_unpatched_if_they_agree(parts: Any, machine: Any, error: float) -> None:
    peer = parts.peer_detectors.Peer("somebody's", (), lambda batch: None)
    results = parts.command("peers").measure(bench(parts, machine), peer, fake_detector(parts, error), 2)
    assert len(results) == 8 and len({r.name for r in results}) == 4
    for r in results:
        wrong = error and r.provider == "patched"
        assert r.status == ("wrong" if wrong else "timed"), (r.name, r.provider, r.reason)
        assert (r.total is None) == bool(wrong) and (r.memory is None) == bool(wrong)
    text = parts.command("peers").table(results)
    assert ("WRONG" in text) == bool(error)
    assert max(map(len, [parts.command("peers").HEADER, *text.splitlines()])) <= 80


def test_boxes_that_only_one_side_has_are_counted(parts: Any) -> None:
    one = [torch.rand(5, 4) * 9, torch.rand(5), torch.arange(5)]
    assert parts.command("peers").unlike(one, [x.flip(0) for x in one]) == 0
    # One of five without a twin, of nine in all.
    assert parts.command("peers").unlike([x[:4] for x in one], one) == pytest.approx(1 / 9)
    none = [torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)]
    assert parts.command("peers").unlike(none, none) == 0 and parts.command("peers").unlike(none, one) == 1


def test_a_detector_that_is_not_installed_is_reported(
    parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = parts.peer_detectors.Peer("somebody's", ("a_package_that_nobody_has",), lambda batch: None)
    monkeypatch.setitem(parts.peer_detectors.PEERS, "mmdet", absent)
    words = ["--peers", "mmdet", "--device", "cpu", "--out", str(tmp_path)]
    results, _ = parts.command("peers").measure_all(parts.bench.parse(["peers", *words]))
    assert [r.status for r in results] == ["skipped"]
    assert "not installed: a_package_that_nobody_has" in capsys.readouterr().out


@pytest.mark.peers
def test_real_detectors_are_checked_and_timed(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "peers", "--size", "64x96", "--rounds", "1"]
    command += ["--seconds", "0.01", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "bench_peers.json").read_text())["results"]
    # What is not installed is reported in one line.
    assert [r for r in found if r["status"] not in ("timed", "skipped")] == []
    assert all(r["memory"] for r in found if r["status"] == "timed")
    for needs, name in (("mmdet", "mmdet GFL"), ("torchvision", "FCOS"), ("ultralytics", "YOLOv8")):
        timed = [r for r in found if name in r["stem"] and r["status"] == "timed"]
        assert len(timed) == (8 if importlib.util.find_spec(needs) else 0)
