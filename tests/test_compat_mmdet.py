# SPDX-License-Identifier: Apache-2.0
"""The real mmdet, patched against unpatched: losses, heads of its own configs, assignment, NMS, predictions."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import mmdet_stub
from peers.compare import assert_as_exact, evaluate
from torch import Tensor

import gfl_ops
from gfl_ops.compat import mmdet as compat
from gfl_ops.core.random_inputs import boxes as draw_boxes

pytestmark = pytest.mark.peers
if importlib.util.find_spec("mmdet") is None:
    pytest.skip("mmdet is not installed; see tests/support/peers/requirements.txt", allow_module_level=True)

mmdet_stub.install()
import mmcv.ops  # noqa: E402
import mmdet  # noqa: E402
import mmdet.models  # noqa: E402
from mmdet.models.task_modules.assigners import ATSSAssigner, TaskAlignedAssigner  # noqa: E402
from mmdet.models.task_modules.prior_generators import AnchorGenerator  # noqa: E402
from mmdet.registry import MODELS, TASK_UTILS  # noqa: E402
from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
CLASSES = 7
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    compat.unpatch()


def both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What `call` gives with mmdet patched and as it is."""
    with compat.patch():
        ours = call()
    return ours, call()


# What is replaced, and that it comes back.


def test_it_says_what_it_replaces_and_puts_it_back() -> None:
    from mmdet.models.dense_heads import GFLHead, base_dense_head

    losses = mmdet.models.losses
    owners = [losses.QualityFocalLoss, losses.GIoULoss, losses.IoULoss, ATSSAssigner, GFLHead, mmcv.ops]
    before = [dict(vars(owner)) for owner in owners]
    theirs = base_dense_head.batched_nms
    names = compat.patch()
    ends = ("QualityFocalLoss", "DistributionFocalLoss", "FocalLoss", "VarifocalLoss", "KnowledgeDistillationKLDivLoss",
            "GIoULoss", "DIoULoss", "CIoULoss", "EIoULoss", "SIoULoss", "IoULoss", "Integral", "batched_nms",
            "ATSSAssigner", "TaskAlignedAssigner", "DynamicSoftLabelAssigner", "SimOTAAssigner",
            "predict_by_feat")  # fmt: skip
    # mmyolo's follows where mmyolo can be imported.
    assert [n.rsplit(".")[-1] for n in names if not n.startswith("mmyolo")] == list(ends)
    assert compat.patch() == names
    assert base_dense_head.batched_nms is sys.modules["mmcv.ops.nms"].batched_nms is mmcv.ops.batched_nms is not theirs
    late = types.ModuleType("imported_while_patched")
    exec("from mmcv.ops import batched_nms", vars(late))
    sys.modules[late.__name__] = late
    assert compat.unpatch() == names and compat.unpatch() == []
    assert [dict(vars(owner)) for owner in owners] == before
    assert base_dense_head.batched_nms is sys.modules["mmcv.ops.nms"].batched_nms is late.batched_nms is theirs
    del sys.modules[late.__name__]


def test_objects_built_before_are_served() -> None:
    loss = MODELS.build({"type": "QualityFocalLoss"})
    pred, target = torch.randn(3, 4).half(), (torch.tensor([0, 1, 4]), torch.rand(3).half())
    ours, theirs = both(lambda: loss(pred, target))
    assert ours.dtype == torch.float32 and theirs.dtype == torch.float16
    assert type(loss).__module__.startswith("mmdet")


def test_a_config_can_ask_for_it(tmp_path: Path) -> None:
    from mmengine.utils import import_modules_from_strings

    forward = mmdet.models.losses.GIoULoss.forward
    sys.modules.pop("gfl_ops.compat.mmdet_patch", None)
    (tmp_path / "config.py").write_text('custom_imports = dict(imports=["gfl_ops.compat.mmdet_patch"])')
    Config.fromfile(tmp_path / "config.py")
    assert mmdet.models.losses.GIoULoss.forward is not forward
    compat.unpatch()
    (tmp_path / "config.py").write_text('custom_imports = dict(imports=["gfl_ops.compat.mmdet_registry"])')
    Config.fromfile(tmp_path / "config.py")
    import_modules_from_strings(["gfl_ops.compat.mmdet_registry"])
    for name in gfl_ops.losses.__all__:
        if name != "Integral":
            assert type(MODELS.build({"type": f"Fused{name}"})) is getattr(gfl_ops, name)
    assert isinstance(TASK_UTILS.build({"type": "FusedATSSAssigner", "topk": 9}), ATSSAssigner)
    assert isinstance(TASK_UTILS.build({"type": "FusedTaskAlignedAssigner", "topk": 13}), TaskAlignedAssigner)
    head = build_head("gfl/gfl_r50_fpn_1x_coco.py", type="FusedGFLHead")
    assert isinstance(head.integral, gfl_ops.Integral)
    plain = build_head("gfl/gfl_r50_fpn_1x_coco.py")
    head.load_state_dict(plain.state_dict())


# The losses by themselves.

LOSSES = {
    "QualityFocalLoss": [{}, {"beta": 1.5, "loss_weight": 2.0}, {"activated": True}],
    "DistributionFocalLoss": [{"loss_weight": 0.25}],
    "GIoULoss": [{"loss_weight": 2.0}],
    **{f"{kind}IoULoss": [{}] for kind in "DCES"},
    "IoULoss": [{}, {"mode": "linear"}],
    "FocalLoss": [{}, {"activated": True, "gamma": 1.5}],
    "VarifocalLoss": [{}, {"iou_weighted": False}],
    "KnowledgeDistillationKLDivLoss": [{}, {"T": 3}],
}
CASES = ("mixed", "negative", "empty")
EACH_LOSS = pytest.mark.parametrize(("name", "options"), [(n, o) for n, many in LOSSES.items() for o in many], ids=str)


def drawn(name: str, case: str, options: dict[str, Any], g: torch.Generator) -> tuple[list[Tensor], Any]:
    """Leaves, and a function that arranges them as the loss's (pred, target, weight)."""
    n = 0 if case == "empty" else 41
    weight = torch.rand(n, generator=g)
    if name.endswith("IoULoss"):
        target = draw_boxes(n, CPU, torch.float32, g, extent=40.0)
        pred = target + torch.randn(n, 4, generator=g)
        if case == "negative":
            # mmdet gives pred's sum times 0 then, from which a weight would get a gradient of its own kind.
            return [pred, target], lambda p, t: (p, t, torch.zeros(n))
        return [pred, target, weight], lambda p, t, w: (p, t, w)
    if name == "DistributionFocalLoss":
        return [torch.randn(n, 17, generator=g) * 3, torch.rand(n, generator=g) * 15.9, weight], lambda *x: x
    if name == "KnowledgeDistillationKLDivLoss":
        return [*(torch.randn(n, 17, generator=g) * 3 for _ in range(2)), weight], lambda *x: x
    pred = torch.randn(n, CLASSES, generator=g) * 2
    pred = pred.sigmoid() * 0.96 + 0.02 if options.get("activated") else pred
    label = torch.randint(0, CLASSES + 1, (n,), generator=g)
    label[:] = CLASSES if case == "negative" else label
    if name == "FocalLoss":
        return [pred, weight], lambda p, w: (p, label, w)
    score = torch.rand(n, generator=g) * 0.9 + 0.05
    if name == "QualityFocalLoss":
        return [pred, score, weight], lambda p, s, w: (p, (label, s), w)
    dense = torch.nn.functional.one_hot(label, CLASSES + 1)[:, :CLASSES] * score[:, None]
    weights = torch.rand(n, CLASSES, generator=g)
    return [pred, dense, weights], lambda p, t, w: (p, t, w)


def loss_call(name: str, options: dict[str, Any], arrange: Any) -> Callable[..., Tensor]:
    """mmdet's loss as a function of the leaves."""
    loss = MODELS.build({"type": name, **options})
    return lambda *leaves: loss(*arrange(*leaves), avg_factor=3.0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "fp16", "bf16"])
@EACH_LOSS
def test_a_loss(name: str, options: dict[str, Any], dtype: str, case: str, generator: torch.Generator) -> None:
    kind = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    leaves, arrange = drawn(name, case, options, generator)
    leaves = [leaf.to(kind) for leaf in leaves]
    call = loss_call(name, options, arrange)
    truth = evaluate(call, [leaf.double() for leaf in leaves])
    # Sums of up to 41 losses in another order; a divergence is a hundredth of what cancels; SIoU: our eps of widths.
    share = {"KnowledgeDistillationKLDivLoss": 1e2, "SIoULoss": max(20.0, 1e-7 / torch.finfo(kind).eps)}.get(name, 20.0)
    assert_as_exact(*both(lambda: evaluate(call, leaves)), truth, share=share)


@EACH_LOSS
def test_a_loss_under_autocast(name: str, options: dict[str, Any], generator: torch.Generator) -> None:
    """bf16 predictions and fp32 targets, as a head gives them there; ours computes in fp32 all the same."""
    leaves, arrange = drawn(name, "mixed", options, generator)
    leaves[0] = leaves[0].bfloat16()
    call = loss_call(name, options, arrange)
    truth = evaluate(call, [leaf.double() for leaf in leaves])
    with compat.patch(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours = evaluate(call, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            theirs = evaluate(call, leaves)
        except RuntimeError as error:
            # torch has no such cross entropy of probabilities in mixed dtypes.
            print(f"mmdet's own fails: {error}")
            theirs = [t.to(leaf.dtype) for t, leaf in zip(truth, [torch.empty(()), *leaves])]
    assert ours[0].dtype == torch.float32
    assert_as_exact(ours, theirs, truth, share=20.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [0, 37])
def test_integral(n: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    from mmdet.models.dense_heads.gfl_head import Integral

    module = Integral(16)
    x = (torch.randn(n, 68, generator=generator) * 3).to(dtype)
    truth = evaluate(module, [x.double()])
    ours, theirs = both(lambda: evaluate(module, [x]))
    # A sum of 17 terms.
    assert_as_exact(ours, theirs, truth, share=17.0)


# Suppression.


def test_batched_nms(generator: torch.Generator) -> None:
    n = 300
    boxes = draw_boxes(n, CPU, torch.float32, generator, extent=100.0)
    scores, labels = torch.rand(n, generator=generator), torch.randint(0, 4, (n,), generator=generator)
    plain = {"type": "nms", "iou_threshold": 0.5}
    for idxs, config, more in (
        (labels, plain, {}),
        (labels, plain, {"class_agnostic": True}),
        (labels, {**plain, "class_agnostic": True}, {}),
        (labels, {**plain, "score_threshold": 0.4}, {}),
        (labels, {**plain, "max_num": 20, "split_thr": 10000}, {}),
        (labels, {**plain, "offset": 1}, {"class_agnostic": True}),
        (torch.ones(n), plain, {}),
        (labels.float() + 0.5, plain, {}),
        (labels, None, {}),
    ):
        (dets, keep), (want_dets, want_keep) = both(
            lambda i=idxs, c=config, m=more: mmcv.ops.batched_nms(boxes, scores, i, c, **m)
        )
        # Moved by the class's number times 101, coordinates lose up to 2⁻¹⁶, which may turn a close decision.
        assert len(set(keep.tolist()) ^ set(want_keep.tolist())) <= 1
        if torch.equal(keep, want_keep):
            assert torch.equal(dets, want_dets)
    with compat.patch():
        dets, keep = mmcv.ops.batched_nms(boxes[:0], scores[:0], labels[:0], plain)
        assert dets.shape == (0, 5) and keep.shape == (0,)
        with pytest.raises(NotImplementedError, match="softnms"):
            mmcv.ops.batched_nms(boxes, scores, labels, {"type": "soft_nms", "iou_threshold": 0.5})
        with pytest.raises(NotImplementedError, match="nms_rotated"):
            rotated = torch.cat([boxes, scores[:, None]], 1)
            mmcv.ops.batched_nms(rotated, scores, labels, {"type": "nms_rotated", "iou_threshold": 0.5})


# Assignment.


def priors(sizes: list[tuple[int, int]], strides: list[int], **options: Any) -> list[Tensor]:
    settings = {"ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1, "strides": strides, **options}
    return AnchorGenerator(**settings).grid_priors(sizes, device="cpu")


@pytest.mark.parametrize("options", [{}, {"center_offset": 0.5}, {"octave_base_scale": 4}], ids=str)
def test_assigner(options: dict[str, Any], generator: torch.Generator) -> None:
    assigner = TASK_UTILS.build({"type": "ATSSAssigner", "topk": 9})
    positives = different = 0
    for sizes in ([(40, 33), (20, 17), (10, 9), (5, 5), (3, 3)], [(3, 4), (1, 2), (1, 1)], [(1, 5), (5, 1)]):
        strides = [8, 16, 32, 64, 128][: len(sizes)]
        levels = priors(sizes, strides, **options)
        for count in (0, 1, 30):
            boxes = draw_boxes(count, CPU, torch.float32, generator, extent=8.0 * max(sizes[0]))
            truth = InstanceData(bboxes=boxes, labels=torch.randint(0, 80, (count,), generator=generator))
            given = InstanceData(priors=torch.cat(levels))
            assert compat.grid_of(given.priors, [len(p) for p in levels]) is not None
            ours, theirs = both(lambda g=given, p=levels, t=truth: assigner.assign(g, [len(x) for x in p], t))
            assert ours.num_gts == theirs.num_gts == count
            same = ours.gt_inds == theirs.gt_inds
            positives += int((theirs.gt_inds > 0).sum())
            different += int((~same).sum())
            assert torch.equal(ours.labels[same], theirs.labels[same])
            torch.testing.assert_close(ours.max_overlaps[same], theirs.max_overlaps[same], rtol=0, atol=1e-6)
            assert ours.gt_inds.dtype == theirs.gt_inds.dtype and ours.labels.dtype == theirs.labels.dtype
    print(f"{different} locations of {positives} positives differ: equal distances after mmdet's square root")
    assert positives > 30 and different <= 1 + 0.02 * positives


def test_assigner_of_what_is_no_grid(generator: torch.Generator) -> None:
    """Two priors a cell, priors in another order, DDOD's cost: mmdet's own code, whose results are equal then."""
    sizes, strides = [(12, 10), (6, 5)], [8, 16]
    boxes = draw_boxes(9, CPU, torch.float32, generator, extent=90.0)
    truth = InstanceData(bboxes=boxes, labels=torch.arange(9))
    two = priors(sizes, strides, ratios=[0.5, 2.0])
    one = priors(sizes, strides)
    for levels in (two, [level.flip(0) for level in one], [level[torch.arange(len(level)) != 7] for level in one]):
        given = InstanceData(priors=torch.cat(levels))
        assert compat.grid_of(given.priors, [len(p) for p in levels]) is None
        assigner = ATSSAssigner(topk=9)
        ours, theirs = both(lambda g=given, p=levels, a=assigner: a.assign(g, [len(x) for x in p], truth))
        assert torch.equal(ours.gt_inds, theirs.gt_inds) and torch.equal(ours.max_overlaps, theirs.max_overlaps)
    given = InstanceData(
        priors=torch.cat(one), scores=torch.randn(150, 9, generator=generator), bboxes=torch.cat(one) + 1
    )
    ours, theirs = both(lambda: ATSSAssigner(topk=9, alpha=0.8).assign(given, [120, 30], truth))
    assert torch.equal(ours.gt_inds, theirs.gt_inds)


# Heads of mmdet's own configs.


def build_head(path: str, **changes: Any) -> Any:
    model = Config.fromfile(CONFIGS / path).model
    settings = {"num_classes": CLASSES, "in_channels": 8, "feat_channels": 8, "stacked_convs": 1, **changes}
    if "rtmdet" in path or "yolox" in path:
        settings["norm_cfg"] = {"type": "BN"}
    else:
        settings["norm_cfg"] = {"type": "GN", "num_groups": 4}
    config = {**model.bbox_head, "train_cfg": model.train_cfg, "test_cfg": model.test_cfg, **settings}
    return MODELS.build(ConfigDict(config))


def scene(
    sizes: list[tuple[int, int]], counts: list[int], g: torch.Generator
) -> tuple[list[Any], list[dict[str, Any]]]:
    truth = []
    for count in counts:
        boxes = draw_boxes(count, CPU, torch.float32, g, extent=150.0)
        truth.append(InstanceData(bboxes=boxes, labels=torch.randint(0, CLASSES, (count,), generator=g)))
    shape = (sizes[0][0] * 8, sizes[0][1] * 8)
    metas = [{"img_shape": shape, "pad_shape": shape, "scale_factor": (1.25, 1.5)} for _ in counts]
    metas[0]["pad_shape"] = metas[0]["img_shape"] = (shape[0] - 40, shape[1])
    return truth, metas


HEADS = {
    "gfl": "gfl/gfl_r50_fpn_1x_coco.py",
    "atss": "atss/atss_r50_fpn_1x_coco.py",
    "tood": "tood/tood_r50_fpn_1x_coco.py",
    "rtmdet": "rtmdet/rtmdet_l_8xb32-300e_coco.py",
    "vfnet": "vfnet/vfnet_r50_fpn_1x_coco.py",
    "yolox": "yolox/yolox_s_8xb8-300e_coco.py",
}


def maps_of(name: str, sizes: list[tuple[int, int]], batch: int, g: torch.Generator) -> list[list[Tensor]]:
    """What the head's forward would give, level by level."""
    sides = {"gfl": [68], "vfnet": [4, 4], "atss": [4, 1], "yolox": [4, 1]}.get(name, [4])
    maps = []
    for part, channels in enumerate([CLASSES, *sides]):
        levels = [torch.randn(batch, channels, h, w, generator=g) for h, w in sizes]
        if name == "tood" and part == 0:
            levels = [x.sigmoid() * 0.96 + 0.02 for x in levels]
        elif part and name in ("tood", "rtmdet", "vfnet"):
            levels = [x.abs() * 3 + 0.5 for x in levels]
        if part and name in ("rtmdet", "vfnet"):
            levels = [x * 8 * 2**i for i, x in enumerate(levels)]
        if name == "tood" and part:
            # Boxes xyxy in units of the stride.
            levels = [torch.cat([-x[:, :2], x[:, 2:]], 1) + grid(x) for x in levels]
        maps.append(levels)
    return maps


def grid(x: Tensor) -> Tensor:
    h, w = x.shape[2:]
    points = torch.stack([torch.arange(w).expand(h, w), torch.arange(h)[:, None].expand(h, w)])
    return points.repeat(2, 1, 1)


@pytest.mark.parametrize("counts", [[6, 0, 4], [0, 0]], ids=["boxes", "no-boxes"])
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", [*HEADS, "tood-later"])
def test_head_losses(name: str, cast: torch.dtype | None, counts: list[int], generator: torch.Generator) -> None:
    """Losses and gradients of mmdet's heads as their configs have them; TOOD's after its first epochs too."""
    later, name = name == "tood-later", name.removesuffix("-later")
    head = build_head(HEADS[name])
    sizes = [(26, 32), (13, 16), (7, 8), (4, 4), (2, 2)][: len(head.prior_generator.strides)]
    maps = maps_of(name, sizes, len(counts), generator)
    truth, metas = scene(sizes, counts, generator)
    if name == "yolox":
        for objects in truth:  # a box without a location near its centre takes others, at costs that tie
            objects.bboxes[:, 2:] = torch.maximum(objects.bboxes[:, 2:], objects.bboxes[:, :2] + 24)
    if name == "tood":
        from mmengine.logging import MessageHub

        MessageHub.get_current_instance().update_info("epoch", 5 if later else 0)
    levels = len(sizes)

    def call(*flat: Tensor) -> list[Tensor]:
        parts = [list(flat[i * levels : (i + 1) * levels]) for i in range(len(maps))]
        if cast:
            # What a convolution under autocast gives.
            parts = [[x.to(cast) for x in part] for part in parts]
        with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
            losses = head.loss_by_feat(*parts, truth, metas)
        return [sum(v) if isinstance(v, list) else v for v in losses.values()]

    leaves = [x for part in maps for x in part]
    try:
        theirs = evaluate(call, leaves)
    except RuntimeError as error:
        assert cast is not None
        pytest.skip(f"mmdet's own {name} fails under autocast: {error}")
    with compat.patch():
        ours = evaluate(call, leaves)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # Sums of thousands of terms in another order; in bf16 theirs rounds each of them, to 2⁻⁹.
        scale = float(b.double().abs().max())
        assert float((a.double() - b.double()).abs().max()) <= (2e-5 if cast is None else 4e-2) * scale + 1e-7, i


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", ["GFLHead", "FusedGFLHead"])
def test_predictions_of_gfl(kind: str, rescale: bool, generator: torch.Generator) -> None:
    import gfl_ops.compat.mmdet_registry  # noqa: F401

    head = build_head(HEADS["gfl"], type=kind)
    plain = build_head(HEADS["gfl"])
    sizes = [(26, 32), (13, 16), (7, 8), (4, 4), (2, 2)]
    cls, reg = maps_of("gfl", sizes, 3, generator)
    _, metas = scene(sizes, [0, 0, 0], generator)
    cls = [c * 2 - 3 for c in cls]
    cls = [torch.cat([c[:2], torch.full_like(c[2:], -20.0)]) for c in cls]
    want = plain.predict_by_feat(cls, reg, batch_img_metas=metas, rescale=rescale)
    with compat.patch() if kind == "GFLHead" else contextlib.nullcontext():
        got = head.predict_by_feat(cls, reg, batch_img_metas=metas, rescale=rescale)
    assert len(got[2]) == len(want[2]) == 0
    for a, b in zip(got, want):
        assert set(a.keys()) == set(b.keys())
        assert a.labels.dtype == b.labels.dtype and a.bboxes.shape[1] == 4
        theirs = [(c, s, *box) for c, s, box in zip(b.labels.tolist(), b.scores.tolist(), b.bboxes.tolist())]
        mine = [(c, s, *box) for c, s, box in zip(a.labels.tolist(), a.scores.tolist(), a.bboxes.tolist())]
        missing = [t for t in theirs if not any(max(abs(x - y) for x, y in zip(t, m)) < 5e-3 for m in mine)]
        # mmdet suppresses after moving the classes apart in fp32, so a close pair may be decided otherwise.
        assert len(mine) == len(theirs) and len(missing) <= 0.02 * len(theirs)


def test_predictions_that_are_not_ours_to_serve(generator: torch.Generator) -> None:
    """Other test settings and subclasses with a way of their own go through mmdet's code, with equal results."""
    head = build_head(HEADS["gfl"])
    sizes = [(10, 8), (5, 4), (3, 2), (2, 1), (1, 1)]
    cls, reg = maps_of("gfl", sizes, 1, generator)
    _, metas = scene(sizes, [0], generator)
    for change in (
        {"min_bbox_size": 20},
        {"max_per_img": -1},
        {"nms": {"type": "nms", "iou_threshold": 0.6, "max_num": 5}},
    ):
        config = ConfigDict({**head.test_cfg, **change})
        ours, theirs = both(lambda c=config: head.predict_by_feat(cls, reg, batch_img_metas=metas, cfg=c))
        assert len(ours[0]) == len(theirs[0])
        torch.testing.assert_close(ours[0].scores, theirs[0].scores)
    ours, theirs = both(lambda: head.predict_by_feat(cls, reg, batch_img_metas=metas, with_nms=False))
    torch.testing.assert_close(ours[0].bboxes, theirs[0].bboxes, rtol=0, atol=1e-3)

    class Own(type(head)):  # type: ignore[misc]
        def _predict_by_feat_single(self, *arguments: Any, **options: Any) -> str:
            return "its own"

    head.__class__ = Own
    with compat.patch():
        assert head.predict_by_feat(cls, reg, batch_img_metas=metas) == ["its own"]
