# SPDX-License-Identifier: Apache-2.0
"""`gfl.Detector` on every kind of source, and the distributions that it tells."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from gfl import checkpoint, draw
from gfl.config import Config
from gfl.config import preset as config_preset
from gfl.detector import Detector
from gfl.models import build
from gfl.sources import find_images

SIZE = (100, 150)  # height, width


@pytest.fixture
def photo(seed) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC))


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("boxes", "scores", "labels"))


def test_all_kinds_of_one_image_give_the_same(model, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    detector = Detector(model)
    result = detector(photo)
    assert len(result) > 3 and len(result.names) == len(result.boxes) == len(result.scores) == len(result.labels)
    tensor = torch.from_numpy(photo).permute(2, 0, 1)
    kinds = (Image.fromarray(photo), tensor, tensor.contiguous(), tmp_path / "photo.png", str(tmp_path / "photo.png"))
    for source in kinds:
        assert same(detector(source), result)
    for other in detector(list(kinds)):
        assert same(other, result)
    assert detector(tmp_path / "photo.png").path == tmp_path / "photo.png" and result.path is None


def test_boxes_are_in_the_images_own_pixels(model, photo):
    # 192 pixels of input: this image is enlarged by 1.28; boxes of the network, divided by hand.
    from gfl.data import transforms

    height, width = transforms.keep_ratio_size(*SIZE, 192, 192)
    image = transforms.resize(torch.from_numpy(photo).permute(2, 0, 1), height, width)
    images, sizes = transforms.pad([image], 32)
    found = model(transforms.normalise(images, sizes), sizes)
    result = Detector(model)(photo)
    count = int(found[3][0])
    scale = torch.tensor([SIZE[1] / width, SIZE[0] / height]).repeat(2)
    torch.testing.assert_close(result.boxes, found.boxes[0, :count] * scale, rtol=1e-5, atol=1e-4)
    assert torch.equal(result.scores, found.scores[0, :count])
    assert result.boxes.min() >= 0
    assert (result.boxes <= torch.tensor([SIZE[1], SIZE[0]] * 2)).all()
    assert result.size == SIZE


def test_a_folder_and_a_glob_come_by_name_and_broken_files_are_told_of(model, folder):
    detector = Detector(model, batch_size=2)
    names = [result.path.name for result in detector(folder)]
    assert names == ["a.jpg", "b.png", "c.PNG", "d.bmp"]
    assert [result.path.name for result in detector(str(folder / "?.[pb][nm]*"))] == ["b.png", "d.bmp"]
    (folder / "b2.png").write_bytes((folder / "b.png").read_bytes()[:60])
    with pytest.warns(UserWarning, match=r"b2\.png"):
        results = detector(folder)
    assert [result.path.name for result in results] == names
    with pytest.raises(ValueError, match=r"b2\.png"):
        detector(folder / "b2.png")
    with pytest.raises(ValueError, match=r"b2\.png"):
        detector([folder / "b.png", folder / "b2.png"])


def test_an_image_in_a_batch_gives_what_it_gives_alone(model, folder):
    alone = Detector(model)(folder)
    for batch_size in (2, 3, 8):
        for one, other in zip(alone, Detector(model, batch_size=batch_size)(folder), strict=True):
            assert one.path == other.path and len(one) == len(other)
            torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)


def test_a_photo_is_taken_as_a_viewer_shows_it(model, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side, to be turned clockwise by 90 degrees
    upright = np.ascontiguousarray(np.rot90(photo, -1))
    Image.fromarray(photo).save(tmp_path / "turned.png", exif=exif)
    detector = Detector(model)
    result = detector(tmp_path / "turned.png")
    assert result.size == (SIZE[1], SIZE[0])
    assert same(result, detector(upright)) and same(result, detector(Image.open(tmp_path / "turned.png")))
    assert result.image().size == (SIZE[0], SIZE[1])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_of_image(model, photo, mode, tmp_path):
    image = Image.fromarray(photo).convert(mode)
    assert Detector(model)(image).size == SIZE
    if mode == "L":
        assert same(Detector(model)(image), Detector(model)(np.asarray(image)))


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        (np.zeros((4, 5, 3), np.float32), TypeError, "uint8"),
        (torch.zeros(3, 4, 5), TypeError, "uint8"),
        (np.zeros((4, 5, 5), np.uint8), ValueError, r"\[H, W, 3\]"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), ValueError, r"\[3, H, W\]"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, r"\[0, 5, 3\]"),
        (7, TypeError, "int"),
        ("nowhere/at/all.jpg", ValueError, "nowhere/at/all.jpg"),
        ("nowhere/*.jpg", ValueError, r"nowhere/\*\.jpg"),
    ],
    ids=[
        "float-array",
        "float-tensor",
        "five-channels",
        "tensor-of-last-channels",
        "empty",
        "int",
        "no-file",
        "no-match",
    ],
)
def test_what_is_no_image_is_refused(model, source, error, says):
    with pytest.raises(error, match=says):
        Detector(model)(source)


def test_an_empty_folder_is_refused_and_an_empty_list_is_not(model, tmp_path):
    with pytest.raises(ValueError, match="no image files"):
        find_images(tmp_path)
    assert Detector(model)([]) == []


def test_thresholds_and_the_models_state(model, photo):
    everything = Detector(model, score_threshold=0.01)(photo)
    middle = float(everything.scores.median()) + 1e-4  # between two scores, not at one
    some = Detector(model, score_threshold=middle)(photo)
    assert len(everything) > len(some) and (some.scores > middle).all()
    assert model.test.score_threshold == 0.05 and not model.training
    model.train()
    assert same(Detector(model)(photo), Detector(model.eval())(photo))
    model.train()
    Detector(model)(photo)
    assert model.training


def test_lower_precision(model, photo):
    exact, rough = Detector(model)(photo), Detector(model, dtype=torch.bfloat16)(photo)
    assert abs(float(exact.scores[0]) - float(rough.scores[0])) < 0.1
    with pytest.raises(TypeError, match="`dtype`"):
        Detector(model, dtype=torch.int8)


def test_arguments_are_checked(model):
    with pytest.raises(ValueError, match="`classes` must be 3 names"):
        Detector(model, classes=["one"])
    with pytest.raises(ValueError, match="`batch_size`"):
        Detector(model, batch_size=0)
    with pytest.raises(ValueError, match="`device`"):
        Detector(model, "abacus")


def saved(model, path, classes=("cup", "cat", "car")):
    config = dataclasses.replace(config_preset("gfl_tiny"), model=model.config)
    checkpoint.write(path, {"meta": checkpoint.meta(config, classes), "state_dict": model.state_dict()})
    return path


def test_a_checkpoint_brings_names_and_settings(model, photo, tmp_path):
    detector = Detector(saved(model, tmp_path / "best.pt"), "cpu")
    result = detector(photo)
    assert same(result, Detector(model)(photo))
    assert detector.classes == ["cup", "cat", "car"]
    assert result.names == [detector.classes[label] for label in result.labels]
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"broken\.pt"):
        Detector(tmp_path / "broken.pt")


def test_coco_results(model, photo):
    result = Detector(model)(photo)
    listed = result.to_coco(17)
    assert len(listed) == len(result)
    for entry, box, label in zip(listed, result.boxes.tolist(), result.labels.tolist()):
        assert entry["image_id"] == 17 and entry["category_id"] == label + 1
        x, y, w, h = entry["bbox"]
        assert [x, y, x + w, y + h] == pytest.approx(box)
    json.dumps(listed)


@pytest.mark.parametrize("legacy", [False, True], ids=["corner", "legacy"])
@pytest.mark.parametrize("center_offset", [0.0, 0.5])
def test_distributions_give_back_the_boxes(model, photo, legacy, center_offset):
    if legacy and center_offset:
        pytest.skip("legacy geometry has its own centres")
    model._config = dataclasses.replace(model._config, legacy=legacy, center_offset=center_offset)
    result = Detector(model)(photo, edges=True)
    edges = result.edges
    bins = edges.probabilities.shape[2]
    assert edges.probabilities.shape == (len(result), 4, 17)
    torch.testing.assert_close(edges.probabilities.sum(2), torch.ones(len(result), 4))
    distance = (edges.probabilities * torch.arange(bins)).sum(2)
    x, y = edges.locations.unbind(1)
    w, h = edges.bins.unbind(1)
    boxes = torch.stack(
        [x - distance[:, 0] * w, y - distance[:, 1] * h, x + distance[:, 2] * w, y + distance[:, 3] * h], 1
    )
    limit = torch.tensor([SIZE[1], SIZE[0]] * 2, dtype=torch.float32)
    if legacy:
        limit = limit - 1 / 1.28
    torch.testing.assert_close(torch.minimum(boxes.clamp(min=0), limit), result.boxes, rtol=1e-4, atol=1e-2)


def test_pictures(model, photo, tmp_path):
    detector = Detector(model, classes=["cup", "cat", "car"])
    result = detector(photo, edges=True)
    picture = result.draw(score_threshold=0, scale=2)
    assert picture.size == (2 * SIZE[1], 2 * SIZE[0])
    assert np.array_equal(np.asarray(result.draw(score_threshold=1.1)), photo)
    assert result.draw_edges(0).size[0] > 300
    with pytest.raises(ValueError, match="edges=True"):
        detector(photo).draw_edges(0)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    again = detector(tmp_path / "photo.png").draw(score_threshold=0, scale=2)
    assert np.array_equal(np.asarray(again), np.asarray(picture))
    assert draw.contact_sheet([picture, again], 2).width == 4 * SIZE[1] + 10


def test_no_detections(photo):
    model = build(config_preset("gfl_tiny").replace(num_classes=3).model)
    result = Detector(model)(photo, edges=True)
    assert len(result) == 0 and result.boxes.shape == (0, 4) and result.edges.probabilities.shape == (0, 4, 17)
    assert result.to_coco(1) == [] and result.draw().size == (SIZE[1], SIZE[0])


def test_optimized_it_finds_the_same_and_keeps_its_settings(model, folder):
    plain, quick = Detector(model), Detector(model, optimize=True, score_threshold=0.1)
    assert quick.model is model and not quick._network.training
    for a, b in zip(plain(folder), quick(folder, edges=True)):
        # Maps differ in their last digits: scores too, and places where they are equal but for that.
        n = int((a.scores > 0.11).sum())
        assert n <= len(b) and (b.scores > 0.1).all() and b.edges.probabilities.shape[0] == len(b)
        torch.testing.assert_close(a.scores[:n], b.scores[:n], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="`compile` goes with"):
        Detector(model, compile=True)


def test_streams_hold_few_images(model, folder):
    taken = []

    class Watched(list):
        def __iter__(self):
            for item in super().__iter__():
                taken.append(item)
                yield item

    results = Detector(model).stream(Watched(find_images(folder)))
    next(results)
    assert len(taken) == 1


def test_the_command_writes_pictures_and_one_file(model, folder, tmp_path_factory, capsys):
    from gfl.cli import main

    out = tmp_path_factory.mktemp("out") / "found"
    file = saved(model, tmp_path_factory.mktemp("model") / "best.pt")
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    (folder / "inner" / "a.jpg").write_bytes((folder / "a.jpg").read_bytes())
    arguments = [str(file), str(folder), str(folder / "inner" / "*.jpg"), "--out", str(out), "--device", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["detect", *arguments, "--score", "0.2", "--edges"]) == 0
    said = capsys.readouterr()
    assert "broken.png" in said.err and "5 images, 1 unreadable" in said.out
    assert {"a.jpg", "a-2.jpg", "b.jpg", "c.jpg", "d.jpg", "detections.json"} <= {p.name for p in out.iterdir()}
    found = json.loads((out / "detections.json").read_text())
    assert [c["name"] for c in found["categories"]] == ["cup", "cat", "car"]
    assert [image["id"] for image in found["images"]] == [1, 2, 3, 4, 5]
    assert all(a["score"] > 0.2 and a["image_id"] in range(1, 6) for a in found["annotations"])
    assert (found["images"][0]["width"], found["images"][0]["height"]) == Image.open(folder / "a.jpg").size


def test_the_command_does_not_write_among_the_images(model, folder, capsys):
    from gfl.cli import main

    file = saved(model, folder / "best.pt")
    assert main(["detect", str(file), str(folder), "--out", str(folder)]) == 1
    assert "among the images" in capsys.readouterr().err
    assert main(["detect", str(file), str(folder / "none.jpg"), "--out", str(folder / "out")]) == 1
    assert "none.jpg" in capsys.readouterr().err


def test_configuration_of_a_checkpoint_is_its_own(model, tmp_path):
    own, config, classes, _ = checkpoint.model_from(saved(model, tmp_path / "x.pt"))
    assert isinstance(config, Config) and classes == ["cup", "cat", "car"] and own.test.short_side == 192
