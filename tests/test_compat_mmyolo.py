# SPDX-License-Identifier: Apache-2.0
"""mmyolo's detectors, which build their losses and suppression from mmdet's, with mmdet patched against unpatched."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import mmdet_stub
from peers.compare import evaluate
from torch import Tensor

from gfl_ops.compat import mmdet as compat
from gfl_ops.core.random_inputs import boxes as draw_boxes

pytestmark = pytest.mark.peers
if importlib.util.find_spec("mmdet") is None or importlib.util.find_spec("mmyolo") is None:
    pytest.skip(
        "mmdet or mmyolo is not installed (tests/support/peers/requirements_alone.txt)", allow_module_level=True
    )

mmdet_stub.install()
import mmcv  # noqa: E402

# mmyolo 0.6.0 refuses mmcv from 2.1 on by its number; nothing that is used here differs.
with pytest.MonkeyPatch.context() as its_number:
    its_number.setattr(mmcv, "__version__", "2.0.1")
    import mmyolo
from mmengine.config import Config  # noqa: E402
from mmengine.logging import MessageHub  # noqa: E402
from mmengine.registry import DefaultScope  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402
from mmyolo.registry import MODELS  # noqa: E402
from mmyolo.utils import register_all_modules  # noqa: E402

CONFIGS = Path(mmyolo.__file__).parent / ".mim" / "configs"
MODELS_OF = {
    "rtmdet": "rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py",
    "yolov8": "yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py",
    "ppyoloe": "ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py",
}
CLASSES, SIDE = 80, 96


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    with DefaultScope.overwrite_default_scope("mmyolo"):
        register_all_modules(init_default_scope=False)
        yield
    compat.unpatch()


def small(name: str, seed: int) -> Any:
    """The model of mmyolo's own config, with batch norms of one process."""
    config = Config.fromfile(CONFIGS / MODELS_OF[name]).model

    def adapt(part: Any) -> None:
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if key == "init_cfg":
                part[key] = None
            elif value == "SyncBN":
                part[key] = "BN"
            elif isinstance(value, (dict, list)):
                adapt(value)

    adapt(config)
    torch.manual_seed(seed)
    return MODELS.build(config)


def scene(counts: list[int], g: torch.Generator) -> list[InstanceData]:
    return [
        InstanceData(
            bboxes=draw_boxes(n, torch.device("cpu"), torch.float32, g, extent=float(SIDE)),
            labels=torch.randint(0, CLASSES, (n,), generator=g),
        )
        for n in counts
    ]


@pytest.mark.parametrize("counts", [[5, 2], [0, 0]], ids=["boxes", "no-boxes"])
@pytest.mark.parametrize("name", ["rtmdet", "yolov8", "ppyoloe", "ppyoloe-later"])
def test_losses(name: str, counts: list[int], generator: torch.Generator, seed: int) -> None:
    """Values and gradients of the head's losses; PP-YOLOE's by its first assigner, ATSS, and by its later one."""
    later, name = name.endswith("-later"), name.removesuffix("-later")
    model = small(name, seed).train()
    MessageHub.get_current_instance().update_info("epoch", 60 if later else 0)
    with torch.no_grad():
        maps = model.bbox_head(model.extract_feat(torch.rand(2, 3, SIDE, SIDE, generator=generator)))
    truth, meta = scene(counts, generator), {"img_shape": (SIDE, SIDE), "batch_input_shape": (SIDE, SIDE)}
    # YOLOv8 and PP-YOLOE give the distributions beside the boxes read from them.
    levels = [len(part) for part in maps]

    def call(*leaves: Tensor) -> list[Tensor]:
        parts = [list(leaves[sum(levels[:i]) : sum(levels[: i + 1])]) for i in range(len(levels))]
        return list(model.bbox_head.loss_by_feat(*parts, truth, [meta] * len(counts)).values())

    leaves = [x for part in maps for x in part]
    theirs = evaluate(call, leaves)
    with compat.patch():
        ours = evaluate(call, leaves)
    assert any(float(x.abs().max()) > 0 for x in ours)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # Sums of thousands of terms in another order.
        scale = float(b.detach().abs().max())
        assert float((a - b).detach().abs().max()) <= 2e-5 * scale + 1e-7, i


@pytest.mark.parametrize("name", MODELS_OF)
def test_predictions(name: str, generator: torch.Generator, seed: int) -> None:
    model = small(name, seed).eval()
    with torch.no_grad():
        maps = model.bbox_head(model.extract_feat(torch.rand(2, 3, SIDE, SIDE, generator=generator)))
    # As built every place has nearly the same score.
    scores = [torch.randn(x.shape, generator=generator) * 1.5 - 4 for x in maps[0]]
    boxes = [x + torch.rand(x.shape, generator=generator) for x in maps[1]]
    meta = {"img_shape": (SIDE, SIDE), "ori_shape": (SIDE, SIDE), "scale_factor": (1.0, 1.0), "pad_param": None}

    def call() -> list[Any]:
        return model.bbox_head.predict_by_feat(scores, boxes, batch_img_metas=[meta] * 2, rescale=False)

    with compat.patch():
        ours = call()
    for a, b in zip(ours, call(), strict=True):
        assert len(a) == len(b) > 0
        # mmcv suppresses after moving the classes apart in fp32, so a close pair may be decided otherwise.
        alike = (a.scores - b.scores).abs() < 1e-6
        assert int((~alike).sum()) <= 0.02 * len(b) + 1
