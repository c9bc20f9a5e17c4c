# SPDX-License-Identifier: Apache-2.0
"""torchvision's FCOS with our operators: python examples/torchvision_fcos.py

Framework: torchvision 0.28
Replaces: `sigmoid_focal_loss`, `generalized_box_iou_loss`, `nms`, `batched_nms`, in FCOS, RetinaNet and wherever else
"""

import torch
from torchvision.models.detection import fcos_resnet50_fpn

from gfl_ops.compat.torchvision import patch

torch.manual_seed(0)
model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, min_size=128, max_size=128)
images = [torch.rand(3, 128, 128)]
targets = [{"boxes": torch.tensor([[10.0, 20, 60, 90], [50, 40, 120, 110]]), "labels": torch.tensor([1, 3])}]


def losses() -> dict[str, float]:
    with torch.no_grad():
        return {name: float(value) for name, value in model.train()(images, targets).items()}


with patch() as names:  # or patch() once, at the start of a training
    print("replaced by gfl_ops:", *names, sep="\n  ")
    print("losses with gfl_ops      ", losses())
    with torch.no_grad():
        print("detections:", len(model.eval()(images)[0]["boxes"]))
print("losses with torchvision's", losses())
