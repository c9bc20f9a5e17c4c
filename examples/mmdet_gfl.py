# SPDX-License-Identifier: Apache-2.0
"""mmdet's GFL, from its own config, with our operators: python examples/mmdet_gfl.py (needs mmdet 3 and mmcv)

Framework: mmdet 3.3, mmyolo 0.6
Or: in a config, `custom_imports = dict(imports=["gfl_ops.compat.mmdet_patch"])`; part by part with types
    `FusedQualityFocalLoss`, `FusedATSSAssigner` and so on and `FusedGFLHead`,
    `custom_imports = dict(imports=["gfl_ops.compat.mmdet_registry"])`
Replaces: `QualityFocalLoss`, `DistributionFocalLoss`, `FocalLoss`, `VarifocalLoss`, `KnowledgeDistillationKLDivLoss`,
    `GIoULoss`, `DIoULoss`, `CIoULoss`, `EIoULoss`, `SIoULoss`, `IoULoss`, `Integral`, `batched_nms`, `ATSSAssigner`,
    `TaskAlignedAssigner`, `DynamicSoftLabelAssigner`, `SimOTAAssigner`, `BatchDynamicSoftLabelAssigner`,
    `BatchTaskAlignedAssigner`, `GFLHead.predict_by_feat`
"""

from pathlib import Path

import mmdet
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from gfl_ops.compat.mmdet import patch, unpatch

init_default_scope("mmdet")
config = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs/gfl/gfl_r50_fpn_1x_coco.py").model
config.backbone.update(depth=18, init_cfg=None)
config.neck.in_channels = [64, 128, 256, 512]
config.bbox_head.num_classes = 3
torch.manual_seed(0)
model = MODELS.build(config)

boxes = torch.tensor([[10.3, 20.8, 61.5, 90.1], [50.9, 41.2, 120.4, 110.6]])
truth = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))
meta = {"img_shape": (128, 128), "pad_shape": (128, 128), "ori_shape": (128, 128), "scale_factor": (1.0, 1.0)}
batch = {
    "inputs": [torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)],
    "data_samples": [DetDataSample(gt_instances=truth, metainfo=meta)],
}


def losses() -> dict[str, float]:
    given = model.data_preprocessor(batch, training=True)
    return {name: float(sum(parts)) for name, parts in model.train()(**given, mode="loss").items()}


names = patch()  # the one line
print("replaced by gfl_ops:", *names, sep="\n  ")
ours = losses()
detections = model.eval().test_step(batch)[0].pred_instances
unpatch()
print("losses with gfl_ops  ", ours)
print("losses with mmdet's  ", losses())
print("detections:", len(detections))
