# SPDX-License-Identifier: Apache-2.0
"""NanoDet-Plus's losses and auxiliary head against plain calls of torch, as its authors' description has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gfl import preset
from gfl.models import GFL, build
from gfl.models.losses import AUXILIARY, LOSSES, Maps, Objects, soft_label_losses

CLASSES, BINS, STRIDES, SIZE = 3, 8, (8, 16, 32, 64), (96, 128)
HEADS = ("bbox_head", "aux_head")


def new_model(seed: int, **fields: object) -> GFL:
    """A small one for training, whose maps differ from place to place."""
    torch.manual_seed(seed)
    small = {"width": 12, "neck_channels": 16, "head_channels": 16, "num_classes": CLASSES, "aux_convs": 2}
    config = preset("nanodet_plus_m_320").replace(**{**small, **fields})
    model = build(config.model, config.test, training=True)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=1.4 * module.weight[0].numel() ** -0.5)
    heads = [head for head in (model.bbox_head, model.aux_head) if head is not None]
    for layer in (layer for head in heads for layer in head.class_layers()):
        nn.init.constant_(layer.bias[:CLASSES], 0.0)  # type: ignore[index]
    return model


@pytest.fixture
def model(seed: int) -> GFL:
    return new_model(seed)


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 3, *SIZE, generator=generator)


@pytest.fixture
def targets(generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Boxes of several sizes, overlapping ones too; an image without any."""

    def some(count: int) -> dict[str, Tensor]:
        corner = torch.rand(count, 2, generator=generator) * 60
        sides = 6 + torch.rand(count, 2, generator=generator) * 60
        limit = torch.tensor([SIZE[1], SIZE[0]] * 2)
        boxes = torch.minimum(torch.cat([corner, corner + sides], 1), limit)
        return {"boxes": boxes, "labels": torch.randint(CLASSES, (count,), generator=generator)}

    return [some(6), some(0), some(2)]


class Recorded:
    """What the parts of a network gave in its last loss, by their names."""

    def __init__(self, model: GFL) -> None:
        self.of: dict[str, Sequence[Tensor]] = {}
        for name in ("neck", "aux_fpn", *HEADS):
            module = getattr(model, name)
            if module is not None:
                module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: object, output: Sequence[Tensor]) -> None:
            self.of[name] = output

        return keep

    def rows(self, head: str) -> tuple[Tensor, Tensor]:
        """All levels' logits of classes ``[B, A, C]`` and of distributions ``[B, A, 4, bins]``."""
        cls, reg = (torch.cat([x.flatten(2) for x in maps], 2).transpose(1, 2) for maps in self.of[head])
        return cls, reg.unflatten(2, (4, BINS))


def priors() -> Tensor:
    """(x, y, stride) of each location."""
    cells = []
    for stride in STRIDES:
        y, x = torch.meshgrid(*(torch.arange(-(-side // stride)) * stride for side in SIZE), indexing="ij")
        cells.append(torch.stack([x, y, torch.full_like(x, stride)], -1).reshape(-1, 3))
    return torch.cat(cells).float()


def decoded(reg: Tensor) -> Tensor:
    distance = (reg.softmax(-1) * torch.arange(BINS)).sum(-1) * priors()[:, 2:].to(reg)
    centre = priors()[:, :2].to(reg)
    return torch.cat([centre - distance[..., :2], centre + distance[..., 2:]], -1)


def area(box: Tensor) -> Tensor:
    return (box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1)


def overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and the union."""
    inner = torch.cat([torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])], -1)
    union = (area(one) + area(other) - area(inner)).clamp(min=1e-6)
    return area(inner) / union, union


def assigned(scores: Tensor, boxes: Tensor, gt: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The object of each location, −1 for none, and its overlap: the assigner of dynamic soft labels."""
    slot, best = torch.full((len(scores),), -1), torch.zeros(len(scores))
    centre = priors()[:, None, :2]
    candidate = (torch.cat([centre - gt[:, :2], gt[:, 2:] - centre], -1).amin(-1) > 0).any(1).nonzero()[:, 0]
    if not len(candidate):
        return slot, best
    iou, _ = overlap(boxes[candidate, None], gt)
    soft = functional.one_hot(labels, scores.shape[1]) * iou[..., None]
    p = scores[candidate, None].expand_as(soft)
    cost = (functional.binary_cross_entropy(p, soft, reduction="none") * (soft - p) ** 2).sum(-1)
    cost = cost - 3 * (iou + 1e-7).log()
    matches = torch.zeros_like(cost, dtype=torch.bool)
    for number, k in enumerate(iou.topk(min(13, len(candidate)), 0).values.sum(0).int().clamp(min=1).tolist()):
        matches[cost[:, number].topk(k, largest=False).indices, number] = True
    several = matches.sum(1) > 1
    matches[several] = functional.one_hot(cost[several].argmin(1), len(gt)).bool()
    found = matches.any(1)
    chosen = matches[found].int().argmax(1)
    slot[candidate[found]] = chosen
    best[candidate[found]] = iou[found, chosen]
    return slot, best


def plain_losses(cls: Tensor, reg: Tensor, assignments: list, targets: list[dict[str, Tensor]]) -> list[Tensor]:
    """Of one head, in fp64: quality focal loss, GIoU loss, distribution focal loss, with their weights."""
    cls, reg = cls.double(), reg.double()
    positives, quality, sums, weights = 0, cls.new_zeros(()), [cls.new_zeros(()) for _ in range(2)], cls.new_zeros(())
    for x, sides, box, (slot, iou), target in zip(cls, reg, decoded(reg), assignments, targets, strict=True):
        positive = slot >= 0
        wanted = torch.zeros_like(x)
        wanted[positive, target["labels"][slot[positive]]] = iou[positive].double()
        entropy = functional.binary_cross_entropy_with_logits(x, wanted, reduction="none")
        quality = quality + (entropy * (wanted - x.sigmoid()) ** 2).sum()
        positives += int(positive.sum())
        weight = x[positive].detach().sigmoid().amax(1)
        weights = weights + weight.sum()
        goal, box = target["boxes"][slot[positive]].double(), box[positive]
        iou_now, union = overlap(box, goal)
        hull = area(torch.cat([torch.minimum(box[:, :2], goal[:, :2]), torch.maximum(box[:, 2:], goal[:, 2:])], 1))
        sums[0] = sums[0] + ((1 - iou_now + (hull - union) / hull) * weight).sum()
        centre, stride = priors()[positive, :2].double(), priors()[positive, 2:].double()
        distance = torch.cat([centre - goal[:, :2], goal[:, 2:] - centre], 1) / stride
        distance = distance.clamp(0, BINS - 1 - 0.1)
        log_p, low = sides[positive].log_softmax(-1), distance.long()
        two = [log_p.gather(2, i[..., None])[..., 0] for i in (low, low + 1)]
        sums[1] = sums[1] - (((low + 1 - distance) * two[0] + (distance - low) * two[1]).mean(1) * weight).sum()
    norm = weights.clamp(min=1)
    return [quality / max(positives, 1), 2 * sums[0] / norm, 0.25 * sums[1] / norm]


@pytest.mark.parametrize("guided", [True, False], ids=["auxiliary", "alone"])
def test_the_losses_are_those_of_plain_calls(
    guided: bool, seed: int, images: Tensor, targets: list[dict[str, Tensor]]
) -> None:
    model = new_model(seed, **({} if guided else {"aux_convs": 0})).train()
    recorded = Recorded(model)
    losses = model(images, targets=targets)
    assert tuple(losses) == model.loss_names == (LOSSES if not guided else (*LOSSES, AUXILIARY))
    heads = HEADS if guided else HEADS[:1]
    cls, reg = (x.detach() for x in recorded.rows(heads[-1]))
    assignments = [
        assigned(*of, t["boxes"], t["labels"]) for *of, t in zip(cls.sigmoid(), decoded(reg), targets, strict=True)
    ]
    assert sum(int((slot >= 0).sum()) for slot, _ in assignments) >= 8
    want = [plain_losses(*recorded.rows(head), assignments, targets) for head in heads]
    wanted = dict(zip(LOSSES, want[0], strict=True)) | ({AUXILIARY: sum(want[1])} if guided else {})
    for name, value in wanted.items():
        # Sums in fp32 of a few hundred locations, and boxes of which each corner is rounded.
        torch.testing.assert_close(losses[name].double(), value, rtol=2e-5, atol=1e-6)
        for head in heads:
            maps = [x for of in recorded.of[head] for x in of]
            got, plain = (
                torch.autograd.grad(x, maps, retain_graph=True, allow_unused=True) for x in (losses[name], value)
            )
            for one, other in zip(got, plain, strict=True):
                assert (one is None) == (other is None) or not one.any()
                if other is not None:
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()) + 1e-9)


def test_the_auxiliary_head_is_that_of_plain_calls(
    model: GFL, images: Tensor, targets: list[dict[str, Tensor]]
) -> None:
    """On both pyramids' maps: 3x3 convolutions, group norms of 32 groups, LeakyReLU, one layer for each output."""
    recorded, weights = Recorded(model.eval()), {k: v.double() for k, v in model.state_dict().items()}

    def tower(x: Tensor, name: str) -> Tensor:
        for i in range(2):
            key = f"aux_head.{name}.{i}"
            x = functional.conv2d(x, weights[f"{key}.conv.weight"], padding=1)
            x = functional.group_norm(x, 32, weights[f"{key}.gn.weight"], weights[f"{key}.gn.bias"])
            x = torch.where(x > 0, x, 0.1 * x)
        return x

    with torch.no_grad():
        model.loss(images, targets)
        levels = enumerate(zip(recorded.of["neck"], recorded.of["aux_fpn"], *recorded.of["aux_head"], strict=True))
        for level, (own, other, cls, reg) in levels:
            x = torch.cat([own, other], 1).double()
            last = [(weights[f"aux_head.{n}.weight"], weights[f"aux_head.{n}.bias"]) for n in ("gfl_cls", "gfl_reg")]
            want = functional.conv2d(tower(x, "cls_convs"), *last[0], padding=1)
            torch.testing.assert_close(cls.double(), want, rtol=1e-4, atol=1e-4)
            want = functional.conv2d(tower(x, "reg_convs"), *last[1], padding=1)
            want = want * weights[f"aux_head.scales.{level}.scale"]
            torch.testing.assert_close(reg.double(), want, rtol=1e-4, atol=1e-4)


def test_the_second_pyramid_starts_as_the_first_and_keys_are_the_authors() -> None:
    config = preset("nanodet_plus_m_416")
    model = build(config.model, training=True)
    own = model.state_dict()
    of_pyramid = {k.removeprefix("aux_fpn."): v for k, v in own.items() if k.startswith("aux_fpn.")}
    assert of_pyramid.keys() == model.neck.state_dict().keys()
    assert all(torch.equal(v, of_pyramid[k]) for k, v in model.neck.state_dict().items())
    convs = [
        f"{t}_convs.{i}.{k}" for t in ("cls", "reg") for i in range(4) for k in ("conv.weight", "gn.weight", "gn.bias")
    ]
    last = [f"gfl_{kind}.{k}" for kind in ("cls", "reg") for k in ("weight", "bias")]
    scales = [f"scales.{level}.scale" for level in range(4)]
    of_head = {k.removeprefix("aux_head."): list(v.shape) for k, v in own.items() if k.startswith("aux_head.")}
    assert sorted(of_head) == sorted([*convs, *last, *scales])
    assert of_head["cls_convs.0.conv.weight"] == [192, 192, 3, 3] and of_head["gfl_reg.weight"] == [32, 192, 3, 3]
    assert config.model.aux_convs and not any(k.startswith("aux_") for k in build(config.model).state_dict())


def test_detached_the_auxiliary_head_trains_only_itself(
    model: GFL, images: Tensor, targets: list[dict[str, Tensor]]
) -> None:
    def trained(detached: bool) -> set[str]:
        model.zero_grad(set_to_none=True)
        model.aux_detached = detached
        model.train()(images, targets=targets)[AUXILIARY].backward()
        return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}

    assert trained(False) == {"backbone", "neck", "aux_fpn", "aux_head"}
    assert trained(True) == {"aux_fpn", "aux_head"}


def test_padding_counts_for_nothing(model: GFL, targets: list[dict[str, Tensor]], generator: torch.Generator) -> None:
    """Of a batch in which each image is half padding, the locations outside are left out."""
    cells = [(len(targets), -(-SIZE[0] // stride), -(-SIZE[1] // stride)) for stride in STRIDES]
    cls = [torch.randn(b, CLASSES, h, w, generator=generator, requires_grad=True) for b, h, w in cells]
    reg = [torch.randn(b, 4 * BINS, h, w, generator=generator) for b, h, w in cells]
    for target in targets:
        target["boxes"] = target["boxes"].clamp(max=SIZE[1] / 2)
    sizes = torch.tensor([[SIZE[0], SIZE[1] / 2]] * len(targets))
    objects = Objects(*padded(targets), sizes)
    soft_label_losses(model.config, Maps(cls, reg), None, objects)["loss_cls"].backward()
    for x, stride in zip(cls, STRIDES, strict=True):
        inside = -(-SIZE[1] // 2 // stride)
        assert x.grad is not None and x.grad[..., :inside].ne(0).all() and not x.grad[..., inside:].any()


def padded(targets: list[dict[str, Tensor]]) -> Iterator[Tensor]:
    for name, value in (("boxes", 0), ("labels", -1)):
        yield nn.utils.rnn.pad_sequence([t[name] for t in targets], batch_first=True, padding_value=value)


def test_ranks_share_their_normalisers(
    model: GFL, images: Tensor, targets: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of two ranks' losses is the loss of the whole batch, where norms keep their statistics."""
    model.eval()
    whole = model.loss(images, targets)
    parts = [(images[:1], targets[:1]), (images[1:], targets[1:])]
    local: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda norms: local.append(norms.clone()))
    for part in parts:
        model.loss(*part)
    both = local[0] + local[1]
    assert both.shape == (3,) and both.min() > 2
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda norms: norms.copy_(both))
    ranks = [model.loss(*part) for part in parts]
    for name, value in whole.items():
        # Sums over fewer locations, in another order.
        torch.testing.assert_close((ranks[0][name] + ranks[1][name]) / 2, value, rtol=1e-5, atol=1e-7)


def test_weights_of_the_classes_scale_both_heads(model: GFL, images: Tensor, targets: list[dict[str, Tensor]]) -> None:
    def of_classes() -> Mapping[str, Tensor]:
        model.zero_grad(set_to_none=True)
        losses = model.eval()(images, targets=targets)
        (losses["loss_cls"] + losses[AUXILIARY]).backward()
        last = {"bbox_head": model.bbox_head.gfl_cls[0].bias, "aux_head": model.aux_head.gfl_cls.bias}  # type: ignore[union-attr]
        return {name: bias.grad[:CLASSES].clone() for name, bias in last.items()}

    before, factors = of_classes(), torch.tensor([0.0, 1.0, 3.0])
    model.class_weights = factors
    for name, gradient in of_classes().items():
        torch.testing.assert_close(gradient, before[name] * factors, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"assignment": "atss"}, r"`aux_convs` is for `assignment` soft_labels, got 2"),
        ({"legacy": True}, r"`legacy` is for `assignment` atss"),
        ({"aux_convs": 65}, r"`aux_convs` must be in \[0, 64\], got 65"),
        ({"assignment": "tal"}, r"`assignment` must be one of atss, soft_labels, got 'tal'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_configuration_may_not_say(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_model(0, **fields)
