# SPDX-License-Identifier: Apache-2.0
"""One step: objects in slots give what lists give, nothing is read back, a warm-up leaves no trace."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import real_data
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gfl.config import Config
from gfl.data.loader import Batch, training_dataset, training_loader
from gfl.data.transforms import keep_ratio_size
from gfl.engine import step as step_module
from gfl.engine.graphs import GraphCache
from gfl.engine.step import Step, on_device, preserve_training_state, slots
from gfl.engine.train import train
from gfl.models import GFL, build
from gfl.models.losses import OPERATORS
from gfl_ops.core import backends

Small = Callable[..., Config]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: graphs and streams need one")


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a value: ``.item()``, ``bool(…)``, ``nonzero`` and their like."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        if name in self.WAITING:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Casts(TorchDispatchMode):
    """Counts conversions by the memory that they read."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.split(".")[0] == "_to_copy":
            self.of[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def batches(config: Config) -> Iterator[Batch]:
    return iter(training_loader(training_dataset(config), config))


def new_step(config: Config, seed: int, device: str = "cpu") -> Step:
    torch.manual_seed(seed)
    model = build(config.replace(num_classes=2).model, config.test).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    return Step(model, model, optimizer, config.train, torch.device(device))


def state(step: Step) -> list[Tensor]:
    momenta = [s["momentum_buffer"] for s in step.optimizer.state.values() if s.get("momentum_buffer") is not None]
    return [x.detach().clone() for x in (*step.model.state_dict().values(), *momenta, step.sums)]


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_objects_in_slots_are_the_objects(amp: str, clip: float, small: Small, seed: int) -> None:
    config = small(amp=amp, clip_grad_norm=clip)
    lists, slotted = new_step(config, seed), new_step(config, seed)
    for batch in batches(config):
        lists(batch, 0.01)
        slotted.set_rate(0.01)
        slotted.compute(batch.images, batch.image_sizes, *slots(batch, 7))
    assert lists.sums.gt(0).all()
    # The same arithmetic in the same order, whatever slots are left over.
    assert all(torch.equal(a, b) for a, b in zip(state(lists), state(slotted), strict=True))


@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_reads_nothing_back(amp: str, clip: float, small: Small, seed: int) -> None:
    config = small(amp=amp, clip_grad_norm=clip)
    step, batch = new_step(config, seed), next(batches(config))
    inputs = (batch.images, batch.image_sizes, *slots(batch, 5))
    step.compute(*inputs)
    with Reads() as reads:
        step.set_rate(0.02)
        step.compute(*inputs)
    assert reads.found == []
    with Reads() as reads:
        step.sums.sum().item()
        assert bool(step.sums.any())
    assert reads.found


def test_a_warm_up_leaves_no_trace(small: Small, seed: int) -> None:
    config = small()
    step, other = new_step(config, seed), new_step(config, seed)
    given = list(batches(config))
    inputs = [(b.images, b.image_sizes, *slots(b, 5)) for b in given]
    step.set_rate(0.05)
    other.set_rate(0.05)
    places = [x.data_ptr() for x in step.model.state_dict().values()]
    # Before the first step, when the optimizer has no state, and after it.
    for number in range(3):
        with preserve_training_state(step):
            step.compute(*inputs[(number + 1) % len(inputs)])
            step.compute(*inputs[number])
        if number:
            assert all(torch.equal(a, b) for a, b in zip(state(step), state(other), strict=True))
        step.compute(*inputs[number])
        other.compute(*inputs[number])
    assert all(torch.equal(a, b) for a, b in zip(state(step), state(other), strict=True))
    assert places == [x.data_ptr() for x in step.model.state_dict().values()]


def test_batches_with_more_objects_than_slots_go_without_a_graph(
    small: Small, seed: int, recording: Callable[..., Any]
) -> None:
    config = small(graph_slots=2)
    recorded, plain = new_step(config, seed), new_step(config, seed)
    recorded.graphs = GraphCache(16, record=recording)
    given = list(batches(config)) * 2
    for batch in given:
        recorded(batch, 0.01)
        plain(batch, 0.01)
    fits = {tuple(batch.images.shape) for batch in given if max(batch.counts) <= 2}
    assert len(recorded.graphs) == len(fits)
    assert all(torch.equal(a, b) for a, b in zip(state(recorded), state(plain), strict=True))


@pytest.mark.skipif(real_data.missing() is not None, reason=str(real_data.missing()))
@pytest.mark.parametrize("batch_size", [2, 16])
def test_random_scales_need_few_graphs(
    batch_size: int, small: Small, seed: int, recording: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """5000 photos of the real data's sizes at the paper's short sides of 480 to 800, in batches of one orientation."""
    step = new_step(small(train_long_side=1333, graph_slots=1), seed)
    made: list[tuple[int, ...]] = []
    step.graphs = GraphCache(record=lambda function, inputs: made.append(tuple(inputs[0].shape)) or function)
    computed: list[int] = []
    monkeypatch.setattr(step, "compute", lambda images, *rest: computed.append(images[0, 0].numel()))
    content, draw = json.loads(real_data.annotations().read_text()), random.Random(seed)
    photos = draw.choices([(image["height"], image["width"]) for image in content["images"]], k=5000)
    photos.sort(key=lambda size: size[0] > size[1])
    groups = [photos[i : i + batch_size] for i in range(0, len(photos), batch_size)]
    given = 0
    for group in draw.sample(groups, len(groups)):
        sizes = [keep_ratio_size(*size, draw.randint(480, 800), 1333) for size in group]
        height, width = (-(-max(sides) // 32) * 32 for sides in zip(*sizes))
        batch = Batch(torch.zeros(1, 1, height, width, dtype=torch.uint8), *[torch.zeros(1, 2)] * 3, *[None] * 4)
        batch = replace(batch, boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), counts=[0])
        step(batch, 0.0)
        given += height * width
    assert len(made) <= 25 and len(made) == len(set(made))
    assert sum(computed) < 1.25 * given


def test_a_rate_in_a_tensor_is_filled(small: Small, seed: int) -> None:
    step = new_step(small(), seed)
    rate = torch.tensor(0.0)
    step.optimizer.param_groups[0]["lr"] = rate
    step.set_rate(0.25)
    assert step.optimizer.param_groups[0]["lr"] is rate and float(rate) == 0.25


@pytest.mark.parametrize(
    ("assignment", "stem"), [(way, stem) for way, stems in OPERATORS.items() for stem in (*stems, "group_norm_relu")]
)
def test_a_graph_is_made_only_where_kernels_run_the_step(
    assignment: str, stem: str, small: Small, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "check_graph", lambda *_: None)
    monkeypatch.setattr(step_module, "GraphCache", lambda *_, **__: "graphs")
    config = small(graph=True, assignment=assignment)
    assert new_step(config, seed).graphs == "graphs"
    serving = backends.serving
    by_reference = lambda name, device: "reference" if name == stem else serving(name, device)  # noqa: E731
    monkeypatch.setattr(backends, "serving", by_reference)
    with pytest.warns(RuntimeWarning, match=f"`graph` has no effect: {stem} run on the reference"):
        assert new_step(config, seed).graphs is None


def test_a_graph_casts_each_weight_once(small: Small, seed: int, recording: Callable[..., Any]) -> None:
    """The towers' weights are used at every level."""
    config = small(amp="bf16")
    step, batch = new_step(config, seed), next(batches(config))
    step.graphs = GraphCache(record=recording)
    weights = [p for name, p in step.model.bbox_head.named_parameters() if name.endswith("conv.weight")]
    with Casts() as casts:
        step(batch, 0.01)
    assert weights and [casts.of[w.data_ptr()] for w in weights] == [1] * len(weights)


def test_the_algorithms_of_a_step_are_tuned_by_its_shape(small: Small, seed: int) -> None:
    config = small()
    step, log = new_step(config, seed), []

    @contextmanager
    def tuning(images: Tensor) -> Iterator[None]:
        log.append(images.shape)
        before = step.sums.clone()
        yield
        # Forward and backward were within.
        assert not torch.equal(step.sums, before)

    step._tuning = tuning  # type: ignore[assignment]
    given = list(batches(config))
    for batch in given:
        step(batch, 0.01)
    assert log == [batch.images.shape for batch in given]


def test_slots(generator: torch.Generator) -> None:
    boxes, labels = torch.rand(5, 4, generator=generator), torch.tensor([3, 1, 4, 1, 5])
    batch = Batch(torch.zeros(3, 3, 4, 4), torch.ones(3, 2), torch.ones(3, 2), boxes, labels, [2, 0, 3], [], [])
    placed, named = slots(batch, 4)
    assert named.tolist() == [[3, 1, -1, -1], [-1] * 4, [4, 1, 5, -1]]
    assert torch.equal(placed[0, :2], boxes[:2]) and torch.equal(placed[2, :3], boxes[2:])
    assert not placed[1].any() and not placed[0, 2:].any()
    with pytest.raises(ValueError, match="`graph_slots` is 2, an image has 3 objects"):
        slots(batch, 2)
    empty = Batch(batch.images, batch.image_sizes, batch.scale_factors, boxes[:0], labels[:0], [0, 0, 0], [], [])
    assert (slots(empty, 2)[1] == -1).all()


def test_batches_come_in_their_order(small: Small) -> None:
    config = small()
    want, got = list(batches(config)), list(on_device(batches(config), torch.device("cpu")))
    assert [b.image_ids for b in got] == [b.image_ids for b in want] and len(got) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where a graph is possible")
def test_a_graph_needs_a_gpu(small: Small, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`graph` needs a GPU"):
        train(small(graph=True), tmp_path / "run", device="cpu")


@GPU
@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_graph_trains_as_single_kernels_do_cuda(amp: str, small: Small, seed: int) -> None:
    config = small(amp=amp)
    steps = []
    for graph in (False, True):
        torch.manual_seed(seed)
        model = build(config.replace(num_classes=2).model, config.test).cuda().train()
        rate = torch.tensor(0.0, device="cuda") if graph else 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, fused=True)
        settings = config.replace(graph=graph, graph_slots=8)
        steps.append(Step(model, model, optimizer, settings.train, torch.device("cuda")))
    for _ in range(2):
        for batch in on_device(batches(config), torch.device("cuda")):
            for step in steps:
                step(batch, 0.01)
    single, graphed = steps
    assert graphed.graphs
    for a, b in zip(single.model.parameters(), graphed.model.parameters(), strict=True):
        # cuDNN may choose other algorithms for the two; TF32.
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


@GPU
def test_a_step_waits_for_nothing_cuda(small: Small, seed: int) -> None:
    config = small(amp="bf16")
    model: GFL = build(config.replace(num_classes=2).model, config.test).cuda().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)
    step = Step(model, model, optimizer, config.train, torch.device("cuda"))
    given = [batch.pin_memory().to("cuda") for batch in batches(config)]
    step(given[0], 0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(given[0], 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
