# SPDX-License-Identifier: Apache-2.0
"""A detector of torch and gfl_ops alone, trained on coloured rectangles: python examples/head_from_scratch.py

Framework: none
Replaces: losses, assignment and detections of a detector, whole in 60 lines"""

import torch
from torch import nn

import gfl_ops

STRIDES, CLASSES, REG_MAX, SIDE = (8, 16, 32), 3, 8, 96


class Detector(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        down = [(nn.Conv2d(c, width, 3, 2, 1), nn.GroupNorm(8, width), nn.ReLU()) for c in (3, *[width] * 4)]
        self.stem = nn.Sequential(*down[0], *down[1])
        self.stages = nn.ModuleList(nn.Sequential(*layers) for layers in down[2:])
        self.cls, self.reg = nn.Conv2d(width, CLASSES, 3, 1, 1), nn.Conv2d(width, 4 * (REG_MAX + 1), 3, 1, 1)
        nn.init.constant_(self.cls.bias, -4.6)  # a score of 0.01 at first

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        x, maps = self.stem(images), []
        for stage in self.stages:
            maps.append(x := stage(x))
        return [self.cls(m) for m in maps], [self.reg(m) for m in maps]


def scenes(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images with two rectangles each, red, green or blue, their boxes [B, 2, 4] xyxy and classes [B, 2]."""
    images, labels = torch.randn(count, 3, SIDE, SIDE) * 0.05 + 0.3, torch.randint(CLASSES, (count, 2))
    size = torch.randint(16, 48, (count, 2, 2))
    corner = (torch.rand(count, 2, 2) * (SIDE - size)).int()
    boxes = torch.cat([corner, corner + size], -1)
    for image, pair, classes in zip(images, boxes.tolist(), labels):
        for (x0, y0, x1, y1), label in zip(pair, classes):
            image[:, y0:y1, x0:x1] = torch.eye(3)[label][:, None, None]
    return images, boxes.float(), labels


torch.manual_seed(0)
model = Detector()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(150):
    images, boxes, labels = scenes(8)
    cls, reg = model(images)
    matched = gfl_ops.atss_assign([m.shape[2:] for m in cls], STRIDES, boxes, labels, anchor_scale=4.0)
    loss = gfl_ops.gfl_loss(cls, reg, STRIDES, matched, boxes, reg_max=REG_MAX)
    optimizer.zero_grad()
    (loss.cls + loss.box + loss.dfl).backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: cls {loss.cls:.3f}, box {loss.box:.3f}, dfl {loss.dfl:.3f}")
images, boxes, labels = scenes(16)
with torch.no_grad():
    found = gfl_ops.postprocess(*model(images), STRIDES, [[SIDE, SIDE]] * 16, reg_max=REG_MAX)
miss = [gfl_ops.box_iou_loss(found.boxes[:, 0], boxes[:, i], kind="iou", reduction="none") for i in (0, 1)]
print(f"mean IoU of the surest detection in 16 new images: {1 - torch.minimum(*miss).mean():.2f}")
