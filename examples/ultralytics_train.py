# SPDX-License-Identifier: Apache-2.0
"""ultralytics' YOLOv8-n trained on photos, from its yaml: python examples/ultralytics_train.py FOLDER [STEPS]

The folder has `images` and a file instances_*.json as COCO has it. The same steps with our operators and without.

Framework: ultralytics 8.3, 8.4, training
Replaces: the whole detection loss, `v8DetectionLoss`, besides what the next row names
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

from gfl_ops.compat.ultralytics import patch, unpatch

SIDE, IMAGES = 320, 4


def photos(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images ``[3, SIDE, SIDE]``, squeezed, and objects ``[n, 5]``: class, centre and size as shares of the image."""
    coco = json.loads(next(folder.glob("instances_*.json")).read_text(encoding="utf-8"))
    classes = {c["id"]: float(i) for i, c in enumerate(sorted(coco["categories"], key=lambda c: c["id"]))}
    found = []
    for image in coco["images"]:
        pixels = Image.open(folder / "images" / image["file_name"]).convert("RGB").resize((SIDE, SIDE))
        size = torch.tensor([image["width"], image["height"]] * 2)
        objects = [(a["category_id"], a["bbox"]) for a in coco["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([box for _, box in objects]).reshape(-1, 4) / size
        boxes[:, :2] += boxes[:, 2:] / 2
        label = torch.tensor([[classes[c]] for c, _ in objects]).reshape(-1, 1)
        found.append((torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255, torch.cat([label, boxes], 1)))
    return found


def batch_of(chosen: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    objects = torch.cat([rows for _, rows in chosen])
    image = torch.cat([torch.full((len(rows),), float(i)) for i, (_, rows) in enumerate(chosen)])
    return {
        "img": torch.stack([pixels for pixels, _ in chosen]),
        "batch_idx": image, "cls": objects[:, :1], "bboxes": objects[:, 1:],
    }  # fmt: skip


def train(data: list[tuple[torch.Tensor, torch.Tensor]], steps: int) -> list[float]:
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", verbose=False).train()
    model.args = get_cfg()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    losses, seconds = [], 0.0
    for step in range(steps):
        batch = batch_of([data[(step * IMAGES + i) % len(data)] for i in range(IMAGES)])
        preds = model(batch["img"])
        before = time.process_time()
        loss, _ = model.loss(batch, preds)
        seconds += time.process_time() - before
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        losses.append(float(loss.detach().sum()))
    print(f"  {1e3 * seconds / max(steps, 1):.0f} ms of processor time per loss, forward")
    return losses


data, steps = photos(Path(sys.argv[1])), int(sys.argv[2]) if len(sys.argv) > 2 else 6
names = patch()  # the one line
print("replaced by gfl_ops:", *names, sep="\n  ")
print("losses with gfl_ops     ", [round(x, 4) for x in train(data, steps)])
unpatch()
print("losses with ultralytics'", [round(x, 4) for x in train(data, steps)])
