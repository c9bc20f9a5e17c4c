# SPDX-License-Identifier: Apache-2.0
"""Images and boxes against those of the real mmdet 3.3.0 pipeline, which reads and resizes by OpenCV."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import real_data
import torch
from peers import mmdet_stub

from gfl.config import Config
from gfl.data import loader
from gfl.data.coco import CocoDataset
from gfl.data.transforms import normalise

pytestmark = pytest.mark.peers
if importlib.util.find_spec("mmdet") is None:
    pytest.skip(
        "mmdet is not installed; tests/support/peers/requirements.txt says what is needed", allow_module_level=True
    )
if real_data.missing() is not None:
    pytest.skip(str(real_data.missing()), allow_module_level=True)

mmdet_stub.install()
from mmcv.transforms import LoadImageFromFile  # noqa: E402
from mmdet.datasets import CocoDataset as MmdetDataset  # noqa: E402
from mmdet.datasets import transforms  # noqa: E402
from mmdet.models.data_preprocessors import DetDataPreprocessor  # noqa: E402

SIDES = (800, 1333)


def theirs(annotations: Path, flip: float, filter_cfg: dict[str, Any] | None) -> MmdetDataset:
    return MmdetDataset(
        ann_file=str(annotations),
        data_prefix={"img": str(real_data.COCO / "images")},
        filter_cfg=filter_cfg,
        test_mode=filter_cfg is None,
        # Objects, not names: what names mean depends on what else has been registered in this process.
        pipeline=[
            LoadImageFromFile(),
            transforms.LoadAnnotations(with_bbox=True),
            transforms.Resize(scale=SIDES[::-1], keep_ratio=True),
            transforms.RandomFlip(prob=flip),
            transforms.PackDetInputs(meta_keys=("img_id", "scale_factor", "img_shape", "ori_shape")),
        ],
    )


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_training_images_and_boxes(flip: float) -> None:
    data = CocoDataset(real_data.annotations(), real_data.COCO / "images", keep_empty=False)
    config = Config().replace(batch_size=2, workers=0, flip=flip)
    reader = loader.BatchReader(data, config, training=True)
    peer = theirs(real_data.annotations(), flip, {"filter_empty_gt": True, "min_size": 32})
    assert [info["img_id"] for info in map(peer.get_data_info, range(len(peer)))] == sorted(data.image_ids)
    preprocessor = DetDataPreprocessor(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32
    )
    worst = 0.0
    for start in range(0, 12, 2):
        ids = sorted(data.image_ids)[start : start + 2]
        batch = reader.read(0, [data.image_ids.index(i) for i in ids])
        items = [peer[start], peer[start + 1]]
        packed = preprocessor({k: [item[k] for item in items] for k in items[0]})
        ours = normalise(batch.images, batch.image_sizes)
        assert ours.shape == packed["inputs"].shape
        # One level of 255 by resizing, and what two JPEG decoders may differ by, over the smallest deviation.
        difference = (ours - packed["inputs"]).abs() * 57.12
        assert difference.max() < 3
        worst = max(worst, float(difference.mean()))
        for row, sample in enumerate(packed["data_samples"]):
            meta = sample.metainfo
            assert meta["img_id"] == batch.image_ids[row] and meta["ori_shape"] == batch.original_sizes[row]
            assert meta["img_shape"] == tuple(batch.image_sizes[row].int().tolist())
            assert meta["scale_factor"] == pytest.approx(tuple(batch.scale_factors[row].tolist()), rel=1e-6)
            wanted = sample.gt_instances
            assert torch.equal(wanted.labels, batch.targets[row]["labels"])
            # Ours are clipped before they are scaled, in fp64.
            torch.testing.assert_close(batch.targets[row]["boxes"], wanted.bboxes, rtol=1e-5, atol=2e-3)
    print(f"mean difference {worst:.4f} of 255 levels")
    assert worst < 0.5


def test_which_boxes_are_targets(tmp_path: Path) -> None:
    """Degenerate, outside, crowd, of unknown categories: what mmdet trains on, so do we."""
    content = json.loads(real_data.annotations().read_text())
    image = content["images"][0]
    width, height = image["width"], image["height"]
    boxes = [
        [5, 5, 0, 40],
        [5, 5, 40, -3],
        [width, 5, 40, 40],
        [5, -50, 40, 50],
        [5, 5, 0.9, 40],
        [-10, -20, 50, 70],
        [width - 20, height - 30, 50, 70],
    ]
    for n, box in enumerate(boxes):
        content["annotations"].append(
            {
                "id": 10**7 + n,
                "image_id": image["id"],
                "category_id": 3,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
        )
    more = {"image_id": image["id"], "bbox": [5, 5, 40, 40], "area": 1600}
    content["annotations"] += [
        {**more, "id": 10**7 + 20, "category_id": 12, "iscrowd": 0},
        {**more, "id": 10**7 + 21, "category_id": 3, "iscrowd": 1},
        {**more, "id": 10**7 + 22, "category_id": 3, "iscrowd": 0, "ignore": 1},
    ]
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(content))
    peer = theirs(file, 0.0, {"filter_empty_gt": True, "min_size": 32})
    wanted = {info["img_id"]: info for info in map(peer.get_data_info, range(len(peer)))}
    data = CocoDataset(file, real_data.COCO / "images", keep_empty=False)
    assert sorted(data.image_ids) == sorted(wanted)
    for index in (data.image_ids.index(image["id"]), 7, 23):
        sample = data[index]
        instances = [i for i in wanted[sample.image_id]["instances"] if not i["ignore_flag"]]
        assert sample.labels.tolist() == [i["bbox_label"] for i in instances]
        limits = torch.tensor([sample.size[1], sample.size[0]] * 2)
        corners = torch.tensor([i["bbox"] for i in instances]).clamp(min=0).minimum(limits)
        torch.testing.assert_close(sample.boxes, corners, rtol=0, atol=1e-4)
