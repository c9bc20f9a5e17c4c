# SPDX-License-Identifier: Apache-2.0
"""What a training may be asked for beyond the paper's: each does what it says, and a resumed training can't be told."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gfl import checkpoint
from gfl.config import Config
from gfl.data.cache import ImageCache
from gfl.data.loader import training_batches, training_dataset, training_order
from gfl.engine import settings as limits
from gfl.engine import train as training
from gfl.engine.callbacks import Callback
from gfl.engine.distributed import Process
from gfl.engine.log import EVALUATIONS, STEPS, TEXT
from gfl.engine.optimizer import SCALE, Average, depth, weight_groups
from gfl.engine.settings import class_weights, largest_batch
from gfl.engine.step import Step
from gfl.engine.train import BEST, LAST, train
from gfl.models import build

Small = Callable[..., Config]
EVERYTHING = {
    "ema": 0.9,
    "accumulate": 2,
    "layer_decay": 0.7,
    "norm_decay": False,
    "class_weights": "balanced",
    "repeat_threshold": 0.9,
    "cache": "ram",
    "optimizer": "adamw",
    "lr": 1e-3,
    "clip_grad_norm": 1.0,
}


def states(out: Path) -> dict[str, Tensor]:
    content = checkpoint.read(out / LAST)
    return {f"{part} {key}": value for part in ("state_dict", "ema") for key, value in content.get(part, {}).items()}


class Killed(BaseException):
    pass


def killed_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    step, done = Step.__call__, itertools.count(1)

    def and_die(self: Step, *arguments: Any) -> None:
        step(self, *arguments)
        if next(done) == steps:
            raise Killed

    patch.setattr(Step, "__call__", and_die)


@pytest.mark.parametrize("options", [EVERYTHING, {"steps": 7, "ema": 0.5, "cache": "disk"}], ids=["all", "steps"])
def test_a_resumed_training_ends_the_same_to_the_bit(
    options: dict[str, Any], small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(eval_every=1, checkpoint_steps=2, **options)
    train(config, tmp_path / "whole", device="cpu")
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed", device="cpu")
    train(config, tmp_path / "killed", resume=True, device="cpu")
    one, other = states(tmp_path / "whole"), states(tmp_path / "killed")
    assert one.keys() == other.keys() and [key for key in one if not torch.equal(one[key], other[key])] == []
    ends = [checkpoint.read(tmp_path / name / LAST)["training"]["position"]["step"] for name in ("whole", "killed")]
    assert ends == [options.get("steps", 10)] * 2
    assert not list((tmp_path / "killed").glob(".part-*"))
    for table in (STEPS, EVALUATIONS):
        lines = [(tmp_path / name / table).read_text().splitlines() for name in ("whole", "killed")]
        assert len(lines[0]) == len(lines[1])


def test_a_training_stops_in_the_middle_of_an_epoch_by_its_steps(small: Small, tmp_path: Path) -> None:
    metrics = train(small(steps=6, epochs=1, log_steps=50), tmp_path / "run", device="cpu")
    rows = (tmp_path / "run" / STEPS).read_text().splitlines()
    # A line per epoch at least, though 50 steps are more than there are.
    assert [row.split(",")[0] for row in rows[1:]] == ["4"] and metrics
    assert (tmp_path / "run" / EVALUATIONS).read_text().splitlines()[1].startswith("6,2,")
    assert checkpoint.read(tmp_path / "run" / LAST)["training"]["position"]["step"] == 6


def test_a_checkpoint_of_an_earlier_version_goes_on(small: Small, tmp_path: Path) -> None:
    train(small(epochs=1), tmp_path / "run", device="cpu")
    content = checkpoint.read(tmp_path / "run" / LAST)
    position = content["training"]["position"]
    position["evaluated"] = position.pop("evaluated_step") // 4
    del position["stale"]
    checkpoint.write(tmp_path / "run" / LAST, content)
    train(small(epochs=2), tmp_path / "run", resume=True, device="cpu")
    rows = (tmp_path / "run" / EVALUATIONS).read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["4", "1"], ["8", "2"]]


def test_the_average_is_evaluated_and_kept(small: Small, tmp_path: Path) -> None:
    train(small(ema=0.99, epochs=1), tmp_path / "run", device="cpu")
    last, best = (checkpoint.read(tmp_path / "run" / name) for name in (LAST, BEST))
    assert all(torch.equal(value, best["state_dict"][key]) for key, value in last["ema"].items())
    assert any(not torch.equal(value, last["state_dict"][key]) for key, value in last["ema"].items())
    # Whoever takes weights from the last checkpoint gets the averaged ones.
    model, *_ = checkpoint.model_from(tmp_path / "run" / LAST)
    assert all(torch.equal(value, last["ema"][key]) for key, value in model.state_dict().items())


def test_an_average_is_what_torch_calls_one() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average, expected = Average(model, 0.5), None
    for number in range(6):
        with torch.no_grad():
            model[0].weight.fill_(number)
            model[1].num_batches_tracked.fill_(number)
        average.update_parameters(model)
        decay = min(0.5, (1 + number) / (10 + number))
        expected = float(number) if expected is None else decay * expected + (1 - decay) * number
        assert average.module[0].weight[0, 0].item() == pytest.approx(expected)
        assert int(average.module[1].num_batches_tracked) == number


def new_step(config: Config, seed: int) -> Step:
    torch.manual_seed(seed)
    model = build(config.replace(num_classes=2).model, config.test).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    return Step(model, model, optimizer, config.train, torch.device("cpu"))


def gradients(step: Step) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}


def test_parts_add_up_to_the_mean_of_their_gradients(small: Small, seed: int) -> None:
    config = small(batch_size=4, norm_eval=True)
    (batch, *_) = training.training_loader(training_dataset(config), config)
    step = new_step(config.replace(accumulate=2), seed)
    step(batch, 0.0)
    whole, parts = gradients(step), batch.parts(2)
    assert [part.counts for part in parts] == [batch.counts[:2], batch.counts[2:]]
    assert torch.equal(torch.cat([part.boxes for part in parts]), batch.boxes)
    alone = []
    for part in parts:
        step = new_step(config, seed)
        step(part, 0.0)
        alone.append(gradients(step))
    for name, value in whole.items():
        torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2, rtol=1e-4, atol=1e-6)


def test_weights_of_classes_weight_the_gradients_of_their_logits(small: Small, seed: int) -> None:
    config = small()
    (batch, *_) = training.training_loader(training_dataset(config), config)
    found = []
    for weights in (None, torch.tensor([3.0, 0.5])):
        step = new_step(config, seed)
        step.model.class_weights = weights
        step(batch, 0.0)
        found.append((gradients(step), step.sums.clone()))
    (plain, sums), (weighted, weighted_sums) = found
    assert torch.equal(sums, weighted_sums)
    bias = "bbox_head.gfl_cls.bias"
    torch.testing.assert_close(weighted[bias], plain[bias] * torch.tensor([3.0, 0.5]))
    # The boxes' branch learns as before.
    assert torch.equal(weighted["bbox_head.gfl_reg.weight"], plain["bbox_head.gfl_reg.weight"])


def labelled(*labels: int) -> Any:
    annotations = SimpleNamespace(labels=torch.tensor(labels))
    return SimpleNamespace(classes=["a", "b"], annotations=annotations)


def test_balanced_weights_are_one_on_average() -> None:
    weights = class_weights("balanced", labelled(0, 0, 0, 0, 1), torch.device("cpu"))
    assert weights is not None and weights[1] / weights[0] == pytest.approx(2)
    assert float(4 * weights[0] + weights[1]) == pytest.approx(5)
    given = class_weights("1,0.5", labelled(0), torch.device("cpu"))
    assert given is not None and given.tolist() == [1, 0.5]
    for wrong in ("1", "a,b", "1,-1", "1,nan"):
        with pytest.raises(ValueError, match="`class_weights` must be"):
            class_weights(wrong, labelled(0), torch.device("cpu"))


def test_images_of_rare_classes_come_again(seed: int) -> None:
    labels = [[0]] * 16 + [[0, 1]] * 4

    class Data(SimpleNamespace):
        def __len__(self) -> int:
            return len(labels)

    sizes = torch.tensor([[4, 6]] * 10 + [[6, 4]] * 10)
    data: Any = Data(labels_of=lambda index: torch.tensor(labels[index]), sizes=sizes)
    total: Counter[int] = Counter()
    for epoch in range(200):
        order = training_order(data, seed, epoch, 0.45)
        # 16 images once, 4 of a class in a fifth of the images √(0.45 / 0.2) = 1.5 times.
        assert len(order) == 22 and order == training_order(data, seed, epoch, 0.45)
        assert len(training_batches(data, 4, seed, epoch, 0.45)) == 6
        counts = Counter(order)
        assert all(counts[index] == 1 for index in range(16)) and sum(counts[index] for index in range(16, 20)) == 6
        assert all(counts[index] in (1, 2) for index in range(16, 20))
        total.update(order)
    # Four standard deviations of a mean of 200 fair draws.
    assert all(total[index] / 200 == pytest.approx(1.5, abs=4 * 0.5 / math.sqrt(200)) for index in range(16, 20))
    assert sorted(training_order(data, seed, 0)) == list(range(20))


def test_groups_of_weights_have_their_rate_and_decay(small: Small) -> None:
    config = small(layer_decay=0.5, norm_decay=False, frozen_stages=-1)
    model = build(config.model, config.test)
    groups = weight_groups(model, config.train)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group.get(SCALE, 1) == 0.5 ** depth(names[parameter])
            assert ("weight_decay" in group) == (parameter.ndim <= 1)
    assert [depth(f"backbone.{name}") for name in ("conv1.weight", "layer1.0.x", "layer4.1.y")] == [5, 4, 1]
    assert [depth(f"backbone.body.{name}") for name in ("stem_0.x", "stages_0.x", "stages.3.x")] == [5, 4, 1]
    assert depth("neck.x") == depth("bbox_head.x") == 0
    assert len(weight_groups(model, small().train)) == 1


def test_it_stops_when_nothing_gets_better(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.2, 0.3, 0.1, 0.3, 0.9])

    def measured(*_: object, **__: object) -> Any:
        return dict.fromkeys(("AP", "AP50", "AP75"), next(values)), []

    monkeypatch.setattr(training, "evaluate", measured)
    config = small(epochs=9, eval_every=1, patience=2)
    train(config, tmp_path / "run", device="cpu")
    train(config, tmp_path / "run", resume=True, device="cpu")
    rows = (tmp_path / "run" / EVALUATIONS).read_text().splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["1", "2", "3", "4"]
    assert "no higher AP for 2 evaluations: the training ends after step 16" in (tmp_path / "run" / TEXT).read_text()


@pytest.mark.parametrize("file", [True, False])
def test_a_cache_reads_each_image_once(file: bool, tmp_path: Path, generator: torch.Generator) -> None:
    sizes = torch.tensor([[5, 7], [2, 3]])
    cache = ImageCache(sizes, tmp_path / "pixels" if file else None)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes.tolist()]
    reads: Counter[int] = Counter()

    def read(index: int) -> Tensor:
        reads[index] += 1
        return images[index]

    for _ in range(2):
        for index in (1, 0):
            got = cache.get(index, lambda index=index: read(index))
            assert torch.equal(got, images[index])
            got.zero_()
    assert reads == {0: 1, 1: 1}
    cache.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", [True, False])
def test_workers_fill_the_same_cache(file: bool, small: Small, tmp_path: Path) -> None:
    config = small(workers=2)
    plain, cached = training_dataset(config), training_dataset(config)
    cached.cache = ImageCache(cached.sizes, tmp_path / "pixels" if file else None)
    loader = training.training_loader(cached, config)
    for epoch in range(2):
        want = training.training_loader(plain, config.replace(workers=0), epoch)
        assert all(torch.equal(a.images, b.images) for a, b in zip(loader.at(epoch), want, strict=True))
        assert bool(cached.cache.there.all())


def test_a_cache_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`cache` needs 1536.0 GiB for decoded images, .* set it to ram or none"):
        ImageCache(torch.tensor([[2**20, 2**19]]), tmp_path / "pixels")
    assert not list(tmp_path.iterdir())


def test_a_batch_is_as_large_as_the_memory(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU by name: a step takes 3 GiB for itself and 2 per image, of 40 free ones."""
    gib = 2**30
    monkeypatch.setattr(limits, "_memory", lambda model, config, images, device: (3 + 2 * images) * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (36 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * gib)
    config, model = small(batch_size=0), torch.nn.Identity()
    gpu: Any = torch.device("cuda", 0)
    assert largest_batch(model, config, Process(0, 2, gpu)) == 2 * math.floor((0.8 * 40 - 3) / 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`batch_size` 0 measures a GPU's memory; on cpu give a number"):
        largest_batch(model, config, Process(0, 1, torch.device("cpu")))  # type: ignore[arg-type]


def test_measuring_leaves_the_model_as_it_is(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 5)
    config = small()
    model = build(config.replace(num_classes=2).model, config.test)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert limits._memory(model, config, 2, torch.device("cpu")) == 5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's front end alone; its kernels are torch's business."""
    compile, compiled = torch.nn.Module.compile, []

    def eager(self: torch.nn.Module) -> None:
        compiled.append(type(self).__name__)
        compile(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    same = {"epochs": 1, "val_annotations": "", "train_short_side": (64, 64)}
    for name, on in (("plain", False), ("compiled", True)):
        train(small(compile=on, **same), tmp_path / name, device="cpu")
    assert compiled == ["ResNet", "FPN", "GFLHead"]
    one, other = states(tmp_path / "plain"), states(tmp_path / "compiled")
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-6)


def test_callbacks_are_told_of_everything(small: Small, tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []

    class Told(Callback):
        def on_step(self, step: int, figures: Mapping[str, float]) -> None:
            told.append(("step", step, {"loss", "lr", "images_per_second", "data_wait", "memory_gib"} <= set(figures)))

        def on_epoch(self, epoch: int) -> None:
            told.append(("epoch", epoch))

        def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
            told.append(("evaluation", step, "AP" in metrics))

    train(small(log_steps=2), tmp_path / "run", device="cpu", callbacks=[Told(), Callback()])
    assert told == [
        *(("step", 2, True), ("step", 4, True), ("epoch", 1)),
        *(("step", 6, True), ("step", 8, True), ("epoch", 2), ("evaluation", 8, True)),
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"accumulate": 3}, "`accumulate` must divide the 2 images"),
        ({"ema": 1.0}, "`ema` must be below 1"),
        ({"layer_decay": 1.5}, "`layer_decay` must be at most 1"),
        ({"steps": -1}, "`steps` must not be negative"),
    ],
)
def test_a_wrong_option_is_named(change: dict[str, Any], text: str, small: Small, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        train(small(**change), tmp_path / "run", device="cpu")
