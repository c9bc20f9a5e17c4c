# SPDX-License-Identifier: Apache-2.0
"""ultralytics' YOLOv8-n, from its yaml, with our operators: python examples/ultralytics_yolov8.py

In a training script it is one line too: ``gfl_ops.compat.ultralytics.patch()`` before ``YOLO("yolov8n.yaml")``.

Framework: ultralytics 8.3, 8.4
Replaces: `DFLoss`, `BboxLoss`, `TaskAlignedAssigner`, `DFL`, `non_max_suppression`, which has no time limit then,
    `v8DetectionLoss`
"""

import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import nms

from gfl_ops.compat.ultralytics import patch, unpatch

torch.manual_seed(0)
model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
model.args = get_cfg()
batch = {
    "img": torch.rand(2, 3, 128, 128),
    "batch_idx": torch.tensor([0.0, 0, 1]),
    "cls": torch.tensor([[0.0], [2], [1]]),
    "bboxes": torch.tensor([[0.3, 0.4, 0.4, 0.5], [0.7, 0.6, 0.5, 0.5], [0.5, 0.5, 0.6, 0.8]]),
}


def losses() -> list[float]:
    return model.train().loss(batch)[0].tolist()


names = patch()  # the one line
print("replaced by gfl_ops:", *names, sep="\n  ")
print("box, class and DFL loss with gfl_ops     ", losses())
with torch.no_grad():
    found = nms.non_max_suppression(model.eval()(batch["img"]), conf_thres=0.001)
print("detections:", [len(f) for f in found])
unpatch()
print("box, class and DFL loss with ultralytics'", losses())
