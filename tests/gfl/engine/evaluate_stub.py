# SPDX-License-Identifier: Apache-2.0
"""A detector of bright rectangles, and an evaluation of it as a program of several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gfl.config import Config, InferenceConfig
from gfl.data.coco import CocoDataset
from gfl.engine import evaluate
from gfl_ops import Detections

CATEGORIES = [{"id": 11, "name": "red"}, {"id": 4, "name": "green"}, {"id": 8, "name": "blue"}]
# By ascending id: green, blue, red.
CHANNELS = (1, 2, 0)
CONFIG = Config().replace(short_side=64, long_side=96, test_batch_size=3, workers=0)


class Finder(nn.Module):
    """Finds one bright rectangle of each colour in an image; its scores depend on the whole batch's shape."""

    def __init__(self, slots: int = 5) -> None:
        super().__init__()
        self.slots = slots
        self.inner = nn.BatchNorm2d(3)
        self.test = InferenceConfig()
        self.thresholds: list[float] = []

    def forward(self, images: Tensor, image_sizes: Tensor, scale_factors: Tensor) -> Detections:
        if self.training or self.inner.training:
            raise RuntimeError("not in evaluation mode")
        self.thresholds.append(self.test.score_threshold)
        batch = images.shape[0]
        boxes, scores = torch.zeros(batch, self.slots, 4), torch.zeros(batch, self.slots)
        labels, count = torch.full((batch, self.slots), -1), torch.zeros(batch, dtype=torch.int32)
        for row, image in enumerate(images):
            for label, channel in enumerate(CHANNELS):
                bright = (image[channel] > 1).nonzero()
                if not len(bright):
                    continue
                slot = int(count[row])
                (y1, x1), (y2, x2) = bright.min(0).values.tolist(), bright.max(0).values.tolist()
                box = torch.tensor([x1, y1, x2 + 1, y2 + 1.0]) / scale_factors[row].repeat(2)
                boxes[row, slot], labels[row, slot] = box, label
                scores[row, slot] = torch.rand((), generator=torch.Generator().manual_seed(int(1e4 * box.sum())))
                scores[row, slot] += 1e-3 * images.shape[3]
                count[row] += 1
        return Detections(boxes, scores, labels, count, torch.full_like(labels, -1))


def main(annotations: str, images: str, output: str) -> None:
    """Writes metrics, detections and problems of each process into the folder `output`."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    data = CocoDataset(annotations, images)
    metrics, detections = evaluate.evaluate(Finder(), data, CONFIG, "cpu")
    content = {"metrics": metrics, "detections": detections, "problems": dict(data.problems)}

    def fail(*arguments: object) -> None:
        raise ValueError(f"broken in process {rank}")

    evaluate.coco_metrics = fail  # type: ignore[assignment]
    try:
        evaluate.evaluate(Finder(), data, CONFIG, "cpu")
    except ValueError as error:
        content["error"] = str(error)
    Path(output, f"{rank}.json").write_text(json.dumps(content))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
