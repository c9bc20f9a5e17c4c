# SPDX-License-Identifier: Apache-2.0
"""`rtmdet_loss` against the losses of mmdet's RTMDetHead and mmyolo's, on drawn and on real boxes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import mmdet_stub
from peers.assignment_scenes import FLAT, SCENES, SIDE, STRIDES, Given, drawn, needs, theirs_of_wide_cuts
from peers.compare import evaluate
from torch import Tensor

import gfl_ops
from gfl_ops.ops.head.task_aligned_reference import locations

pytestmark = pytest.mark.peers
if importlib.util.find_spec("mmdet") is None:
    pytest.skip("mmdet is not installed (tests/support/peers/requirements.txt)", allow_module_level=True)

CORNERS = locations(FLAT, STRIDES, [0.0] * 3, torch.device("cpu"))


def head_of(package: str, classes: int) -> Any:
    """RTMDet's head as a config has it, without its convolutions' norms over processes."""
    mmdet_stub.install()
    import mmdet
    from mmengine.config import Config, ConfigDict

    if package == "mmdet":
        from mmdet.registry import MODELS
        from mmengine.registry import DefaultScope

        path = Path(mmdet.__file__).parent / ".mim" / "configs" / "rtmdet" / "rtmdet_tiny_8xb32-300e_coco.py"
        model = Config.fromfile(path).model
        options = {"in_channels": 8, "feat_channels": 8, "stacked_convs": 1, "num_classes": classes}
        options |= {"norm_cfg": {"type": "BN"}, "train_cfg": model.train_cfg, "test_cfg": model.test_cfg}
        with DefaultScope.overwrite_default_scope("mmdet"):
            return MODELS.build(ConfigDict({**model.bbox_head, **options}))
    import mmcv

    with pytest.MonkeyPatch.context() as its_number:
        its_number.setattr(mmcv, "__version__", "2.0.1")
        import mmyolo
    from mmengine.registry import DefaultScope
    from mmyolo.registry import MODELS
    from mmyolo.utils import register_all_modules

    path = Path(mmyolo.__file__).parent / ".mim" / "configs" / "rtmdet" / "rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py"
    model = Config.fromfile(path).model
    head = model.bbox_head
    head.head_module.update(num_classes=classes, norm_cfg={"type": "BN"})
    model.train_cfg.assigner.num_classes = classes
    with DefaultScope.overwrite_default_scope("mmyolo"):
        register_all_modules(init_default_scope=False)
        return MODELS.build(ConfigDict({**head, "train_cfg": model.train_cfg, "test_cfg": model.test_cfg}))


def maps(rows: Tensor) -> list[Tensor]:
    sizes = list(zip(FLAT[::2], FLAT[1::2]))
    parts = rows.transpose(1, 2).split([h * w for h, w in sizes], 2)
    return [part.unflatten(2, size).contiguous() for part, size in zip(parts, sizes)]


def few(g: torch.Generator) -> Given:
    return drawn(g, slots=3)


@needs("mmdet")
@pytest.mark.parametrize("scene", [*SCENES, "few"])
@pytest.mark.parametrize("package", ["mmdet", pytest.param("mmyolo", marks=needs("mmyolo"))])
def test_losses_and_gradients(package: str, scene: str, generator: torch.Generator) -> None:
    make = {**SCENES, "few": few}[scene]
    heads: dict[int, Any] = {}

    def draw() -> dict[str, Any]:
        scores, boxes, _, labels, gt, mask = make(generator)
        distance = torch.cat([CORNERS - boxes[..., :2], boxes[..., 2:] - CORNERS], -1)
        labelled = torch.where(mask[..., 0] > 0, labels[..., 0].long(), -1)
        logits = scores.clamp(1e-4, 1 - 1e-4).logit()
        return {"leaves": [*maps(logits), *maps(distance)], "gt": gt, "labels": labelled, "classes": scores.shape[-1]}

    def theirs(given: dict[str, Any]) -> list[Tensor]:
        from mmengine.structures import InstanceData

        head = heads.setdefault(given["classes"], head_of(package, given["classes"]))
        pairs = zip(given["gt"], given["labels"])
        truth = [InstanceData(bboxes=b[y >= 0], labels=y[y >= 0]) for b, y in pairs]
        shape = (SIDE, SIDE)
        meta = {"img_shape": shape, "pad_shape": shape, "batch_input_shape": shape, "scale_factor": (1.0, 1.0)}

        def call(*leaves: Tensor) -> list[Tensor]:
            distances = list(leaves[3:])
            if package == "mmyolo":  # whose maps are in cells
                distances = [m / stride for m, stride in zip(distances, STRIDES)]
            losses = head.loss_by_feat(list(leaves[:3]), distances, truth, [meta] * len(truth))
            return [sum(v) if isinstance(v, list) else v for v in losses.values()]

        return evaluate(call, given["leaves"])

    given, want = theirs_of_wide_cuts(draw, theirs)

    def ours(*leaves: Tensor) -> list[Tensor]:
        objects = given["gt"], given["labels"]
        found = gfl_ops.rtmdet_loss(list(leaves[:3]), list(leaves[3:]), STRIDES, *objects, variant=package)
        return [found.cls, found.box]

    got = evaluate(ours, given["leaves"])
    assert want[0] > 0 and want[1] > 0
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        # Sums of many thousand terms in another order.
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-7, i
