# SPDX-License-Identifier: Apache-2.0
"""What a backbone starts with: files, published weights (without a network here), and none."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gfl import PRESETS, backbone_weights, preset
from gfl.models import GFL, create_model

try:
    import timm
except ImportError:
    timm = None


def needs_timm(test: Callable) -> Callable:
    return pytest.mark.peers(pytest.mark.skipif(timm is None, reason="timm is not installed")(test))


def model(**fields: object) -> GFL:
    return create_model("gfl_r18_1x", num_classes=2, head_convs=1, **fields)


@pytest.fixture
def classifier(seed: int) -> dict[str, Tensor]:
    """A classifier's weights as torchvision has them, random."""
    torch.manual_seed(seed)
    weights = model().backbone.state_dict()
    weights = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in weights.items()}
    return weights | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


def same(backbone: torch.nn.Module, weights: dict[str, Tensor]) -> bool:
    own = backbone.state_dict()
    return all(torch.equal(value, weights[key]) for key, value in own.items())


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_a_file_of_a_classifier_or_of_a_whole_detector(prefix: str, classifier: dict, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    weights = {prefix + k: v for k, v in classifier.items()}
    if prefix:
        weights[prefix.replace("backbone", "head") + "fc.weight"] = torch.zeros(1)
    torch.save({"state_dict": weights}, path)
    detector = model()
    assert backbone_weights.load(detector.backbone, str(path)) == [f"backbone weights: {path}"]
    assert same(detector.backbone, classifier)
    assert detector.config.frozen_stages == 1


def test_deformable_convolutions_start_as_plain_ones(tmp_path: Path) -> None:
    plain, path = create_model("gfl_r50_1x").backbone, tmp_path / "resnet50.pth"
    torch.save(plain.state_dict(), path)
    deformable = create_model("gfl_r50_1x", dcn="v2").backbone
    backbone_weights.load(deformable, str(path))
    assert torch.equal(deformable.layer4[2].conv2.weight, plain.layer4[2].conv2.weight)
    assert not deformable.layer4[2].conv2.conv_offset.weight.any()


def test_a_file_of_another_network_is_named_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "resnet34.pth"
    torch.save(model(backbone="resnet34").backbone.state_dict(), path)
    with pytest.raises(ValueError, match=r"resnet34\.pth: the weights are not this.*\n.*unexpected: layer1\.2\.conv1"):
        backbone_weights.load(model().backbone, str(path))
    with pytest.raises(FileNotFoundError):
        backbone_weights.load(model().backbone, str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="must be a file, torchvision, timm or none"):
        backbone_weights.load(model().backbone, "")


def test_none_trains_everything_and_says_so() -> None:
    detector = model().train()
    notes = backbone_weights.load(detector.backbone, "none")
    assert notes == ["backbone weights: none; so no stage is frozen and the batch norms are trained"]
    assert all(p.requires_grad for p in detector.parameters()) and all(m.training for m in detector.modules())
    assert (detector.config.frozen_stages, detector.config.norm_eval) == (-1, False)


def test_every_network_has_a_published_file() -> None:
    shuffle = [*backbone_weights.SHUFFLENETS.values()]
    assert list(backbone_weights.PUBLISHED) == [*backbone_weights.ARCHITECTURES, *shuffle]
    for name, url in backbone_weights.PUBLISHED.items():
        assert re.fullmatch(rf"https://.*/{name}-[0-9a-f]{{8}}([0-9a-f]{{2}})?\.pth", url)
    widths = {preset(name).model.width for name in PRESETS if name.startswith("nanodet")}
    assert widths == backbone_weights.SHUFFLENETS.keys()


@pytest.mark.parametrize("name", ["m_416", "m_1.5x_416"])
def test_shufflenets_start_from_torchvisions_weights(
    name: str, cache: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which have a last convolution and a classifier."""
    torch.manual_seed(seed)
    detector = create_model(f"nanodet_plus_{name}")
    weights = {
        k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in detector.backbone.state_dict().items()
    }
    rest = {f"conv5.{i}.{k}": torch.zeros(1) for i, k in ((0, "weight"), (1, "weight"), (1, "running_var"))}
    cache.mkdir(parents=True)
    torch.save(weights | rest | {"fc.weight": torch.zeros(1000, 1024), "fc.bias": torch.zeros(1000)}, cache / "x.pth")
    digest = hashlib.sha256((cache / "x.pth").read_bytes()).hexdigest()[:10]
    (cache / "x.pth").rename(cache / f"x-{digest}.pth")
    key = backbone_weights.SHUFFLENETS[detector.config.width]
    monkeypatch.setitem(backbone_weights.PUBLISHED, key, f"https://example.org/x-{digest}.pth")
    assert backbone_weights.load(detector.backbone, "torchvision") == [f"backbone weights: {cache / f'x-{digest}.pth'}"]
    assert same(detector.backbone, weights)
    assert (detector.config.frozen_stages, detector.config.norm_eval) == (-1, False)
    slim = create_model(f"nanodet_plus_{name}", width=24)
    with pytest.raises(ValueError, match="for a `width` of 116 or 176, this backbone has 24"):
        backbone_weights.load(slim.backbone, "torchvision")
    with pytest.raises(ValueError, match="timm is for ResNets and timm's backbones"):
        backbone_weights.load(slim.backbone, "timm")


@pytest.mark.peers
def test_torchvisions_shufflenet_is_this_one(tmp_path: Path, seed: int) -> None:
    """Key by key, and with ReLU in place of LeakyReLU value by value."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(seed)
    for name, make in (("m_416", models.shufflenet_v2_x1_0), ("m_1.5x_416", models.shufflenet_v2_x1_5)):
        theirs, backbone = make(weights=None).eval(), create_model(f"nanodet_plus_{name}").backbone.eval()
        torch.save(theirs.state_dict(), tmp_path / "x.pth")
        backbone_weights.load(backbone, str(tmp_path / "x.pth"))
        for module in backbone.modules():
            if isinstance(module, torch.nn.LeakyReLU):
                module.negative_slope = 0.0
        images = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            x, want = theirs.maxpool(theirs.conv1(images)), []
            for stage in (theirs.stage2, theirs.stage3, theirs.stage4):
                x = stage(x)
                want.append(x)
            for one, other in zip(backbone(images), want, strict=True):
                torch.testing.assert_close(one, other)
        url = getattr(models, f"ShuffleNet_V2_X{'1_0' if name == 'm_416' else '1_5'}_Weights").IMAGENET1K_V1.url
        assert url == backbone_weights.PUBLISHED[backbone_weights.SHUFFLENETS[backbone.channels[0]]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def test_without_a_network_it_says_what_to_fetch_and_where_to_put_it(cache: Path, monkeypatch) -> None:
    url = "http://127.0.0.1:9/resnet18-f37072fd.pth"
    monkeypatch.setitem(backbone_weights.PUBLISHED, "resnet18", url)
    with pytest.raises(OSError, match=rf"refused.*fetch {url} and put it into {cache}"):
        backbone_weights.load(model().backbone, "torchvision")


def test_a_file_put_there_is_used_if_its_hash_is_right(cache: Path, classifier: dict, monkeypatch) -> None:
    cache.mkdir(parents=True)
    path = cache / "resnet18-f37072fd.pth"
    torch.save(classifier, path)
    with pytest.raises(ValueError, match=r"resnet18-f37072fd\.pth: damaged or another file: its SHA-256 begins with"):
        backbone_weights.load(model().backbone, "torchvision")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    name = f"resnet18-{digest}.pth"
    monkeypatch.setitem(backbone_weights.PUBLISHED, "resnet18", f"https://example.org/{name}")
    path.rename(cache / name)
    detector = model()
    assert backbone_weights.load(detector.backbone, "torchvision") == [f"backbone weights: {cache / name}"]
    assert same(detector.backbone, classifier)


def test_a_slim_backbone_has_no_published_weights() -> None:
    with pytest.raises(ValueError, match="for a `width` of 64, this backbone has 32"):
        backbone_weights.load(model(width=32).backbone, "torchvision")


@pytest.mark.skipif(timm is not None, reason="timm is installed")
def test_without_timm() -> None:
    with pytest.raises(RuntimeError, match="pip install timm"):
        backbone_weights.load(model().backbone, "timm")
    with pytest.raises(RuntimeError, match="timm:resnet18 needs timm: pip install timm"):
        model(backbone="timm:resnet18")


@needs_timm
def test_timms_weights_are_used_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    create, whole = timm.create_model, {}

    def pretrained(name: str, pretrained: bool = False, **rest: object) -> torch.nn.Module:
        assert pretrained
        whole[name] = create(name, pretrained=False, **rest)
        return whole[name]

    monkeypatch.setattr(timm, "create_model", pretrained)
    detector = model()
    assert "timm's resnet18, " in backbone_weights.load(detector.backbone, "timm")[0]
    assert same(detector.backbone, whole["resnet18"].state_dict())


@needs_timm
def test_timm_without_a_network_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = model(backbone="timm:convnext_atto", norm_eval=False)

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"no route to host.*https://huggingface\.co/timm/convnext_atto.*that file"):
        backbone_weights.load(detector.backbone, "timm")


@needs_timm
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_a_file_of_a_timm_model(name: str, tmp_path: Path) -> None:
    detector, path = model(backbone=f"timm:{name}"), tmp_path / "whole.pth"
    whole = timm.create_model(name, pretrained=False)
    torch.save(whole.state_dict(), path)
    backbone_weights.load(detector.backbone, str(path))
    first = next(iter(whole.parameters()))
    assert torch.equal(next(iter(detector.backbone.parameters())), first)
    torch.save(timm.create_model("regnetx_002").state_dict(), path)
    with pytest.raises(ValueError, match=r"whole\.pth: the weights are not.*\n  missing: "):
        backbone_weights.load(detector.backbone, str(path))
