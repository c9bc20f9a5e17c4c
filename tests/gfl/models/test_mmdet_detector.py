# SPDX-License-Identifier: Apache-2.0
"""Whole detectors against those of the real mmdet 3.3.0: maps, losses, gradients, detections, and five steps of SGD.

Both have the same random weights, of a size that makes scores spread over (0, 1), so that there is something to detect.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peers import mmdet_stub
from torch import Tensor, nn

from gfl.checkpoint import load_weights, model_from
from gfl.models import GFL, create_model

pytestmark = pytest.mark.peers
if importlib.util.find_spec("mmdet") is None:
    pytest.skip(
        "mmdet is not installed; tests/support/peers/requirements.txt says what is needed", allow_module_level=True
    )

mmdet_stub.install()
import mmdet  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402

register_all_modules()
CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs" / "gfl"
LOSSES = ("loss_cls", "loss_bbox", "loss_dfl")
HEIGHT, WIDTH = 256, 320
# As in the published schedule's warm-up, for two images: a larger step overshoots, and then losses differ by chance.
RATE = 0.0005
# (h, w) of the two images, and to which size mmdet pads each by itself.
SIZES, PADDED = [(HEIGHT, WIDTH), (180, 250)], [(HEIGHT, WIDTH), (192, 256)]


class Pair(NamedTuple):
    """The same detector twice, and a batch."""

    ours: GFL
    theirs: nn.Module
    images: Tensor
    targets: list[dict[str, Tensor]]
    samples: list[Any]

    def losses(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        # mmdet counts the locations of an image's own padding in.
        ours = self.ours.loss(self.images, self.targets, PADDED)
        theirs = self.theirs.loss(self.images, self.samples)
        return ours, {name: sum(theirs[name]) for name in LOSSES}


def spread(model: GFL, generator: torch.Generator) -> None:
    """Weights like a trained network's: norms that do something, residual branches that add, scores that differ."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.7, 1.4, generator=generator)
            nn.init.normal_(module.bias, std=0.05, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.uniform_(parameter, 0.1, 0.3, generator=generator)
    head = model.bbox_head
    for convs in (head.cls_convs, head.reg_convs):
        for conv in convs:
            nn.init.normal_(conv.conv.weight, std=0.03, generator=generator)
            nn.init.normal_(conv.gn.bias, std=0.1, generator=generator)
    nn.init.normal_(head.gfl_cls.weight, std=0.06, generator=generator)
    nn.init.constant_(head.gfl_cls.bias, -7.0)
    nn.init.normal_(head.gfl_reg.weight, std=0.03, generator=generator)
    for scale in head.scales:
        nn.init.uniform_(scale.scale, 0.8, 1.2, generator=generator)


def drawn_targets(generator: torch.Generator) -> list[dict[str, Tensor]]:
    """A dozen objects from 12 pixels to half the image, eight in the first image and four in the second."""
    targets = []
    for count, (height, width) in zip((8, 4), SIZES):
        low, high = torch.tensor([12.0]).log(), torch.tensor([width / 2, height / 2]).log()
        size = (low + (high - low) * torch.rand(count, 2, generator=generator)).exp()
        corner = torch.rand(count, 2, generator=generator) * (torch.tensor([float(width), float(height)]) - size)
        labels = torch.randint(0, 80, (count,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + size], 1), "labels": labels})
    return targets


@pytest.fixture(scope="module", params=["gfl_r50_fpn_1x_coco", "gfl_x101-32x4d_fpn_ms-2x_coco"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    seed = torch.seed() % 2**31
    print(f"{request.param}: seed {seed}")
    generator = torch.manual_seed(seed)
    name = "gfl_r50_1x" if "r50" in request.param else "gfl_x101_32x4d_2x"
    ours = create_model(name)
    spread(ours, generator)
    theirs = MODELS.build(Config.fromfile(CONFIGS / f"{request.param}.py").model)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, HEIGHT, WIDTH, generator=generator)
    images[1, :, SIZES[1][0] :], images[1, :, :, SIZES[1][1] :] = 0, 0
    targets = drawn_targets(generator)
    samples = []
    for target, size, padded in zip(targets, SIZES, PADDED):
        meta = {"img_shape": size, "pad_shape": padded, "batch_input_shape": (HEIGHT, WIDTH), "scale_factor": (1, 1)}
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = InstanceData(bboxes=target["boxes"], labels=target["labels"])
        samples.append(sample)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield Pair(ours, theirs, images, targets, samples)
    torch.set_num_threads(threads)


def test_head_maps_and_detections(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        got = pair.ours.eval().predict_maps(pair.images)
        want = pair.theirs.eval()._forward(pair.images)
    worst = 0.0
    for maps, expected in zip(got, want):
        for a, b in zip(maps, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
            worst = max(worst, (a - b).abs().max().item())
    print(f"largest difference of a map {worst:.2e}")

    # Each reads the boxes off its own maps, which take long enough to compute once.
    monkeypatch.setattr(pair.ours, "predict_maps", lambda images: got)
    detections = pair.ours(pair.images, SIZES)
    metas = [sample.metainfo for sample in pair.samples]
    expected = pair.theirs.bbox_head.predict_by_feat(*want, batch_img_metas=metas, rescale=False)
    total = same = 0
    for i, theirs in enumerate(expected):
        count = int(detections.count[i])
        assert abs(count - len(theirs)) <= 1
        # Scores differ by ulps, boxes by what ulps of a distribution make of 16 strides of 128 pixels.
        near = (detections.scores[i, :count, None] - theirs.scores).abs() < 1e-4
        near &= detections.labels[i, :count, None] == theirs.labels
        near &= (detections.boxes[i, :count, None] - theirs.bboxes).abs().amax(-1) < 0.05
        total, same = total + len(theirs), same + int(near.any(0).sum())
    print(f"{same} of mmdet's {total} detections")
    assert total > 50 and same >= 0.98 * total


def compare_gradients(pair: Pair) -> None:
    expected = dict(pair.theirs.named_parameters())
    norms = {}
    for name, parameter in pair.ours.named_parameters():
        other = expected[name]
        assert parameter.requires_grad == other.requires_grad, name
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            norms[name] = parameter.grad.norm(), other.grad.norm()
    assert len(norms) > 100
    got, want = (torch.stack(values) for values in zip(*norms.values()))
    # Of a parameter that hardly matters, 1e-6 of all others' gradient.
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6 * want.norm().item())
    print(f"norms of {len(norms)} gradients, of all {got.norm():.5f} ({(got.norm() / want.norm() - 1).item():+.1e})")


def test_losses_gradients_and_five_steps(pair: Pair) -> None:
    """The first losses and gradients to 1e-3; each step adds to the difference, and five stay within 5e-3."""
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], RATE, momentum=0.9, weight_decay=1e-4)
        for m in (pair.ours.train(), pair.theirs.train())
    ]
    history = []
    for step in range(5):
        ours, theirs = pair.losses()
        shown = ", ".join(f"{n} {ours[n].item():.6f} ({(ours[n] / theirs[n] - 1).item():+.1e})" for n in LOSSES)
        print(f"step {step}: {shown}")
        for name in LOSSES:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3 if step == 0 else 5e-3, atol=1e-6)
        for losses, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            sum(losses.values()).backward()
        if step == 0:
            compare_gradients(pair)
        for optimizer in optimizers:
            optimizer.step()
        history.append(sum(ours.values()).item())
    assert history[-1] < history[0]


def test_a_checkpoint_of_the_real_one_loads(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "epoch_1.pth"
    names = tuple(f"thing {i}" for i in range(80))
    meta = {"mmengine_version": "0.10.7", "dataset_meta": {"classes": names}}
    hub = {"log_scalars": {"train/loss": HistoryBuffer([1.0, 0.5], [1, 1])}, "resumed_keys": {}}
    torch.save({"meta": meta, "state_dict": pair.theirs.state_dict(), "message_hub": hub}, path)
    with pytest.warns(UserWarning, match="the defaults are taken"):
        model, config, classes, _ = model_from(path)
    assert config.model == pair.ours.config and classes == list(names)
    weights, expected = model.state_dict(), pair.theirs.state_dict()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert load_weights(pair.ours, expected) == []
