# SPDX-License-Identifier: Apache-2.0
"""The losses as NanoDet, GFocal v1, YOLOv6, PP-YOLOE and D-FINE call them: python examples/dialects.py

Framework: NanoDet, GFocal v1, YOLOv6 and PP-YOLOE, D-FINE
Replaces: their losses by their own calls
"""

import torch

from gfl_ops.compat import dfine, gfocal_v1, nanodet, yolov6

torch.manual_seed(0)
n, classes = 100, 20
logits = torch.randn(n, classes, requires_grad=True)
label, quality = torch.randint(0, classes + 1, (n,)), torch.rand(n)

# NanoDet: labels 0 to C - 1, anything else is background.
print("nanodet   QFL", nanodet.QualityFocalLoss(beta=2.0)(logits, (label, quality), avg_factor=30).item())
print("nanodet   DFL", nanodet.DistributionFocalLoss()(torch.randn(40, 8), torch.rand(40) * 6.9, avg_factor=4).item())

# GFocal v1: 0 is background, the score an argument of its own, no sum over the classes.
print("gfocal v1 QFL", gfocal_v1.QualityFocalLoss()(logits, label, quality, avg_factor=30).item())

# YOLOv6 gives probabilities, PP-YOLOE in super-gradients logits; both count the last bin, 16, of 17.
one_hot = torch.nn.functional.one_hot(label, classes + 1)[:, :classes]
target = one_hot * quality[:, None]
print("yolov6    VFL", yolov6.VarifocalLoss()(logits.sigmoid(), target, one_hot).item() / target.sum().item())
print("pp-yoloe  VFL", yolov6.VarifocalLoss(activated=False)(logits, target, one_hot).item() / target.sum().item())
corner = torch.rand(1, n, 2) * 10
boxes = torch.cat([corner, corner + 4], -1)
loss_iou, loss_dfl = yolov6.BboxLoss(classes, 16, use_dfl=True)(
    torch.randn(1, n, 68), boxes + 0.5, corner[0] + 2, boxes, target[None], target.sum(), label[None] < classes
)
print("yolov6    IoU and DFL", loss_iou.item(), loss_dfl.item())

# D-FINE: offsets on bins that are dense around 0.
reference = torch.rand(n, 4) * 0.5 + 0.25
edges = torch.cat([reference[:, :2] - 0.1, reference[:, :2] + 0.1], 1)
bins = dfine.bbox2distance(reference, edges, 32, 4.0, torch.tensor([0.5]))
student, teacher = torch.randn(4 * n, 33), torch.randn(4 * n, 33)
print("d-fine    FGL", dfine.unimodal_distribution_focal_loss(student, *bins, avg_factor=n).item())
weight, matched = torch.rand(4 * n), torch.arange(4 * n) < 80
print("d-fine    DDF", dfine.decoupled_distillation_loss(student, teacher, weight, matched).item())
