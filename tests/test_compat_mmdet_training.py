# SPDX-License-Identifier: Apache-2.0
"""mmdet's GFL with a ResNet-18, trained on the demo's scenes, patched against unpatched."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import mmdet_stub

from gfl_ops.compat import mmdet as compat

pytestmark = pytest.mark.peers
if importlib.util.find_spec("mmdet") is None:
    pytest.skip(
        "mmdet is not installed; tests/support/peers/requirements.txt says what is needed", allow_module_level=True
    )

np = pytest.importorskip("numpy")
mmdet_stub.install()
import mmdet  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

SIDE, STEPS = 128, 20


def build(seed: int) -> Any:
    """mmdet's own config of the paper's model, with a smaller network and five classes."""
    init_default_scope("mmdet")
    path = Path(mmdet.__file__).parent / ".mim" / "configs" / "gfl" / "gfl_r50_fpn_1x_coco.py"
    config = Config.fromfile(path).model
    config.backbone.update(depth=18, init_cfg=None)
    config.neck.update(in_channels=[64, 128, 256, 512], out_channels=64)
    config.bbox_head.update(num_classes=5, in_channels=64, feat_channels=64, stacked_convs=2)
    torch.manual_seed(seed)
    model = MODELS.build(config)
    model.init_weights()
    return model


def batch_of(rng: Any) -> dict[str, Any]:
    """Two scenes, their boxes moved by less than half a pixel.

    On whole pixels cells are often as far from a box as each other, and mmdet leaves to its sort which are nearest.
    """
    from gfl.demo.scenes import draw_scene

    scenes = [draw_scene(SIDE, rng) for _ in range(2)]
    boxes = [torch.from_numpy((s.boxes + rng.uniform(-0.4, 0.4, s.boxes.shape)).astype("float32")) for s in scenes]
    meta = dict.fromkeys(("img_shape", "pad_shape", "ori_shape"), (SIDE, SIDE)) | {"scale_factor": (1.0, 1.0)}
    samples = [
        DetDataSample(
            gt_instances=InstanceData(bboxes=b, labels=torch.from_numpy(s.labels)),
            metainfo=meta,
        )
        for s, b in zip(scenes, boxes)
    ]
    return {"inputs": [torch.from_numpy(s.image).permute(2, 0, 1) for s in scenes], "data_samples": samples}


def curve(seed: int) -> tuple[list[list[float]], Any]:
    """The three losses of each step, and the trained model; mmdet's schedule, from its warm-up on."""
    model = build(seed).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    rng = np.random.default_rng(seed)
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.01 * (0.001 + 0.999 * step / 500)
        given = model.data_preprocessor(batch_of(rng), training=True)
        totals = [sum(part) for part in model(**given, mode="loss").values()]
        optimizer.zero_grad()
        sum(totals).backward()
        optimizer.step()
        losses.append([float(t.detach()) for t in totals])
    return losses, model


def test_it_trains_and_finds_the_same(seed: int) -> None:
    """20 steps from the same seed: each of the three losses within 1e-3; and the same detections at their end."""
    with compat.patch():
        ours, model = curve(seed)
    theirs, their_model = curve(seed)
    worst = max(abs(a - b) / (abs(b) + 1e-6) for x, y in zip(ours, theirs) for a, b in zip(x, y))
    print(f"{STEPS} steps: {theirs[0]} to {theirs[-1]}, largest relative difference {worst:.2e}")
    assert worst < 1e-3

    # Configs and checkpoints are mmdet's either way.
    model.load_state_dict(their_model.state_dict())
    their_model.bbox_head.test_cfg.score_thr = model.bbox_head.test_cfg.score_thr = 0.005
    batch = batch_of(np.random.default_rng(seed))
    with compat.patch():
        found = [sample.pred_instances for sample in model.eval().test_step(batch)]
    wanted = [sample.pred_instances for sample in their_model.eval().test_step(batch)]
    for a, b in zip(found, wanted, strict=True):
        print(f"{len(a)} and {len(b)} detections")
        assert abs(len(a) - len(b)) <= 1 and len(b) > 0
        if len(a) == len(b):
            torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-4)
