# SPDX-License-Identifier: Apache-2.0
"""Which images a batch has, how they are augmented, and that nothing of it depends on the processes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gfl.config import Config
from gfl.data import loader, transforms
from gfl.data.coco import CocoDataset

Make = Callable[[int], CocoDataset]


class Sizes:
    """A data set of which only the sizes are known."""

    def __init__(self, sizes: list[tuple[int, int]]):
        self.sizes = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.sizes)


sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=70)
of_sizes = sizes.map(lambda s: cast(CocoDataset, Sizes(s)))


def settings(**values: Any) -> Config:
    few = {"batch_size": 4, "workers": 0, "train_short_side": (32, 64), "train_long_side": 80, "short_side": 48}
    return Config().replace(**{**few, "long_side": 64, "test_batch_size": 3, "flip": 0.5, **values})


def assert_same(one: Iterable[loader.Batch], other: Iterable[loader.Batch]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.image_ids == b.image_ids and a.original_sizes == b.original_sizes and a.unreadable == b.unreadable
        for name in ("images", "image_sizes", "scale_factors"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        for x, y in zip(a.targets, b.targets, strict=True):
            assert torch.equal(x["boxes"], y["boxes"]) and torch.equal(x["labels"], y["labels"])


@given(of_sizes, st.integers(1, 12), st.integers(0, 99), st.integers(0, 99))
def test_every_image_once_an_epoch(data: CocoDataset, batch_size: int, seed: int, epoch: int) -> None:
    batches = loader.training_batches(data, batch_size, seed, epoch)
    assert all(len(batch) == batch_size for batch in batches)
    assert len(batches) == -(-len(data) // batch_size)
    count = Counter(index for batch in batches for index in batch)
    assert sorted(count) == list(range(len(data)))
    if len(data) % batch_size == 0:
        assert set(count.values()) == {1}
    else:  # only what fills the last batch comes again
        assert count.total() - len(data) == -len(data) % batch_size
    assert batches == loader.training_batches(data, batch_size, seed, epoch)


@given(of_sizes, st.integers(1, 8), st.integers(0, 99))
def test_batches_are_landscape_or_portrait(data: CocoDataset, batch_size: int, epoch: int) -> None:
    portrait = (data.sizes[:, 0] > data.sizes[:, 1]).tolist()
    batches = loader.training_batches(data, batch_size, 0, epoch)
    whole = sum(n // batch_size for n in Counter(portrait).values())
    assert all(len({portrait[i] for i in batch}) == 1 for batch in batches[:whole])
    assert len(batches) - whole <= 2


def test_epochs_and_seeds_differ() -> None:
    data = cast(CocoDataset, Sizes([(1, 1)] * 64))
    orders = [loader.training_batches(data, 8, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({str(order) for order in orders}) == 9
    assert all(sorted(itertools.chain(*order)) == list(range(64)) for order in orders)


@given(of_sizes, st.integers(1, 8), st.integers(1, 5))
def test_test_batches(data: CocoDataset, batch_size: int, world: int) -> None:
    batches = loader.test_batches(data, batch_size)
    dealt = [batch for rank in range(world) for batch in batches[rank::world]]
    assert sorted(index for batch in dealt for index in batch) == list(range(len(data)))
    assert all(len(batch) == batch_size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= batch_size


def test_a_batch_is_what_it_says(dataset: Make) -> None:
    data, config = dataset(7), settings(flip=0.0)
    batches = list(loader.training_loader(data, config, epoch=3))
    assert len(batches) == 2
    shorts = set()
    for batch in batches:
        assert batch.images.shape[0] == 4 and batch.images.dtype == torch.uint8
        assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0
        for row, image_id in enumerate(batch.image_ids):
            sample = data[data.image_ids.index(image_id)]
            height, width = batch.image_sizes[row].int().tolist()
            resized = transforms.resize(sample.image, height, width)
            assert torch.equal(batch.images[row, :, :height, :width], resized)
            assert batch.images[row, :, height:].sum() == 0 and batch.images[row, :, :, width:].sum() == 0
            assert batch.original_sizes[row] == sample.size
            factors = torch.tensor([width / sample.size[1], height / sample.size[0]])
            torch.testing.assert_close(batch.scale_factors[row], factors)
            expected = (sample.boxes * factors.repeat(2)).clamp(max=max(height, width))
            torch.testing.assert_close(batch.targets[row]["boxes"], expected)
            assert torch.equal(batch.targets[row]["labels"], sample.labels)
            short, long = sorted((height, width))
            assert short <= 64 and long <= 80 and (short >= 32 or long == 80)
            shorts.add(short)
    assert len(shorts) > 1


def test_short_sides_are_uniform_and_half_is_flipped(dataset: Make) -> None:
    data, config = dataset(1), settings(train_short_side=(30, 34), train_long_side=400, batch_size=1)
    reader = loader.BatchReader(data, config, training=True)
    new_sizes = {short: transforms.keep_ratio_size(*data[0].size, short, 400) for short in range(30, 35)}
    plain = {short: transforms.resize(data[0].image, *size) for short, size in new_sizes.items()}
    drawn, flipped = Counter[int](), 0
    for epoch in range(500):
        batch = reader.read(epoch, [0])
        height, width = batch.image_sizes[0].int().tolist()
        image, short = batch.images[0, :, :height, :width], min(height, width)
        drawn[short] += 1
        is_flipped = torch.equal(image, plain[short].flip(2))
        assert is_flipped or torch.equal(image, plain[short])
        flipped += is_flipped
    # 100 ± 9 each and 250 ± 11; the draws are fixed, five deviations only say that the rule is right.
    assert sorted(drawn) == list(range(30, 35)) and all(abs(n - 100) < 45 for n in drawn.values())
    assert abs(flipped - 250) < 56


def test_a_batch_with_an_image_without_objects(write: Callable[..., Path], dataset: Make) -> None:
    data = dataset(4)
    content = json.loads(data.annotations.path.read_text())
    without = {data.image_ids[0], data.image_ids[2]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in without]
    data = CocoDataset(write("fewer.json", **content), data.images)
    (batch,) = loader.training_loader(data, settings(workers=1))
    assert [len(t["boxes"]) == 0 for t in batch.targets] == [image in without for image in batch.image_ids]
    assert all(t["boxes"].shape == (len(t["labels"]), 4) for t in batch.targets)


def test_flip_of_all(dataset: Make) -> None:
    data = dataset(3)
    plain, mirrored = (next(iter(loader.training_loader(data, settings(flip=flip)))) for flip in (0.0, 1.0))
    assert plain.image_ids == mirrored.image_ids
    for row in range(len(plain.image_ids)):
        height, width = plain.image_sizes[row].int().tolist()
        assert torch.equal(plain.images[row, :, :height, :width].flip(2), mirrored.images[row, :, :height, :width])
        expected = transforms.flip_boxes(plain.targets[row]["boxes"], width)
        assert torch.equal(mirrored.targets[row]["boxes"], expected)


def test_workers_change_nothing(dataset: Make) -> None:
    data = dataset(11)
    alone = loader.training_loader(data, settings(), epoch=1)
    helped = loader.training_loader(data, settings(workers=2), epoch=1)
    assert_same(alone, helped)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    # The same workers go on with another epoch, and with one that was left in its midst.
    next(iter(helped.at(5)))
    assert_same(alone.at(2), helped.at(2))
    assert torch.equal(torch.get_rng_state(), before), "reading drew from the training's generator"


def test_workers_end_with_their_loader(dataset: Make) -> None:
    before = multiprocessing.active_children()
    reading = loader.training_loader(dataset(9), settings(workers=2))
    next(iter(reading))
    workers = [worker for worker in multiprocessing.active_children() if worker not in before]
    assert len(workers) == min(2, len(os.sched_getaffinity(0)))
    del reading
    # At once, not after the 5 seconds that torch gives them before it kills them.
    assert all(worker.exitcode == 0 for worker in workers)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_resuming_gives_the_rest(start: int, dataset: Make) -> None:
    data = dataset(11)
    whole = list(loader.training_loader(data, settings(), epoch=4))
    rest = loader.training_loader(data, settings(), epoch=4, start_batch=start)
    assert len(rest) == len(whole) - start
    assert_same(whole[start:], rest)


def test_ranks_share_each_batch(dataset: Make) -> None:
    data, config = dataset(10), settings()
    whole = list(loader.training_loader(data, config, epoch=1))
    parts = [list(loader.training_loader(data, config, epoch=1, rank=rank, world=2)) for rank in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert list(itertools.chain(*(share.image_ids for share in shares))) == batch.image_ids
        for row, (share, place) in enumerate((share, place) for share in shares for place in range(2)):
            h, w = batch.image_sizes[row].int().tolist()
            assert torch.equal(share.images[place, :, :h, :w], batch.images[row, :, :h, :w])
            assert torch.equal(share.targets[place]["boxes"], batch.targets[row]["boxes"])


def test_test_batches_do_not_depend_on_the_ranks(dataset: Make) -> None:
    data, config = dataset(8), settings()
    whole = list(loader.test_loader(data, config))
    parts = [list(loader.test_loader(data, config, rank, 3)) for rank in range(3)]
    assert_same(whole, [parts[n % 3][n // 3] for n in range(len(whole))])
    for batch in whole:
        for row, size in enumerate(batch.original_sizes):
            assert tuple(batch.image_sizes[row].int().tolist()) == transforms.keep_ratio_size(*size, 48, 64)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_undecodable_images_in_training(workers: int, dataset: Make) -> None:
    data = dataset(9)
    broken = [data.path(3), data.path(4)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    config = settings(workers=workers, batch_size=3)
    reading = loader.training_loader(data, config)
    with pytest.warns(UserWarning, match=r"\.png can't be decoded: .*; it is passed over") as warned:
        batches = list(reading)
    # Not what Python 3.12 says of the fork of a process with threads.
    ours = [w for w in warned if issubclass(w.category, UserWarning)]
    assert sorted(str(w.message).split()[0] for w in ours) == [str(path) for path in broken]
    expected = [[data.image_ids[5 if i in (3, 4) else i] for i in b] for b in loader.training_batches(data, 3, 0, 0)]
    assert [batch.image_ids for batch in batches] == expected
    assert data.problems["images that can't be decoded, passed over"] == 2
    # Again, but neither counted nor warned of.
    assert_same(batches, reading.at(0))
    assert data.problems["images that can't be decoded, passed over"] == 2


def test_nothing_can_be_decoded(dataset: Make) -> None:
    data = dataset(3)
    for index in range(3):
        data.path(index).write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 3 images can be decoded; .*\.png can't be decoded"):
        next(iter(loader.training_loader(data, settings())))


def test_undecodable_images_in_a_test(dataset: Make) -> None:
    data = dataset(7)
    batches = list(loader.test_loader(data, settings()))
    lost = batches[0].image_ids[1], *batches[2].image_ids
    for image_id in lost:
        data.path(data.image_ids.index(image_id)).write_bytes(b"GIF89a")
    with pytest.warns(UserWarning, match="can't be decoded"):
        fewer = list(loader.test_loader(data, settings()))
    assert [len(batch.image_ids) for batch in fewer] == [2, 3, 0]
    assert fewer[2].images.shape == (0, 3, 32, 32) and len(fewer[2].unreadable) == 1
    found = itertools.chain(*(batch.image_ids for batch in fewer))
    assert sorted(found) == sorted(set(data.image_ids) - set(lost))
    assert data.problems["images that can't be decoded, passed over"] == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_images_come_out_plainly(workers: int, dataset: Make) -> None:
    data = dataset(2)
    data.sizes[1, 0] += 1
    with pytest.raises(ValueError, match=r"^.*1\.png is \d+×\d+ pixels, its annotation file says \d+×\d+$"):
        list(loader.test_loader(data, settings(workers=workers)))
    data.sizes[1, 0] -= 1
    data.path(0).unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.png"):
        list(loader.training_loader(data, settings(workers=workers)))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"batch_size": 0}, "`batch_size` must be positive, got 0"),
        ({"batch_size": 5}, "`batch_size` must be a multiple of the 2 processes, got 5"),
        ({"train_short_side": (64, 32)}, "`train_short_side` must rise"),
        ({"train_long_side": 50}, "stay within `train_long_side`, got 32,64 and 50"),
        ({"flip": 1.5}, "`flip` must be in 0 to 1"),
    ],
)
def test_wrong_settings(values: dict[str, Any], message: str, dataset: Make) -> None:
    with pytest.raises(ValueError, match=message):
        loader.training_loader(dataset(2), settings(**values), world=2)


def test_wrong_positions(dataset: Make) -> None:
    data = dataset(2)
    with pytest.raises(ValueError, match="an epoch has 1 batches, got `start_batch` = 2"):
        loader.training_loader(data, settings(), start_batch=2)
    with pytest.raises(ValueError, match="`test_batch_size` must be positive"):
        loader.test_loader(data, settings(test_batch_size=0))


def test_data_sets_of_a_configuration(dataset: Make, tmp_path: Path) -> None:
    dataset(4)
    names = {"train_annotations": "annotations.json", "val_annotations": "annotations.json"}
    config = settings(data=str(tmp_path), train_images="images", val_images="images", **names)
    for data in (loader.training_dataset(config), loader.validation_dataset(config)):
        assert len(data) == 4 and data.path(0) == tmp_path / "images" / "0.png"
    with pytest.raises(ValueError, match="`val_annotations` is empty"):
        loader.validation_dataset(config.replace(val_annotations=""))
    batch = next(iter(loader.training_loader(data, settings()))).to("cpu")
    assert isinstance(batch, loader.Batch) and len(batch.targets) == 4
    assert sum(isinstance(value, torch.Tensor) for value in vars(batch).values()) == 5
