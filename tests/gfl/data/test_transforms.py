# SPDX-License-Identifier: Apache-2.0
"""Images of every kind, and their sizes, against plain arithmetic and OpenCV."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import real_data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gfl.config import Config, ModelConfig
from gfl.data import transforms

ORIENTATION = 0x0112


def random_image(generator: torch.Generator, height: int, width: int, channels: int = 3) -> torch.Tensor:
    """Smooth parts and noise, in the order in memory that a decoder leaves."""
    coarse = torch.rand((1, channels, 5, 7), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    noise = torch.rand((channels, height, width), generator=generator)
    image = (255 * (0.7 * smooth + 0.3 * noise)).to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def as_pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy().squeeze())


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The definition: half-pixel centres, edge repeated, fp64, not rounded."""

    def taps(new: int, old: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
        first = np.floor(place).astype(int)
        return first, np.minimum(first + 1, old - 1), place - first

    y0, y1, fy = taps(height, image.shape[1])
    x0, x1, fx = taps(width, image.shape[2])
    rows = image[:, y0] * (1 - fy)[:, None] + image[:, y1] * fy[:, None]
    return rows[:, :, x0] * (1 - fx) + rows[:, :, x1] * fx


@pytest.mark.parametrize("size", [(480, 640), (37, 51), (1, 9), (333, 500)], ids=str)
@pytest.mark.parametrize("new", [(800, 1067), (97, 64), (1, 1), (41, 211)], ids=str)
def test_resize_is_bilinear(size: tuple[int, int], new: tuple[int, int], generator: torch.Generator) -> None:
    image = random_image(generator, *size)
    resized = transforms.resize(image, *new)
    assert resized.dtype == torch.uint8 and resized.shape == (3, *new)
    exact = bilinear(image.numpy().astype(float), *new)
    # Rounded once in either direction, with weights of 15 bits.
    assert np.abs(resized.numpy() - exact).max() < 1.01


@pytest.mark.parametrize("fp32", [False, True], ids=["uint8", "fp32"])
@pytest.mark.parametrize("size", [(48, 64), (37, 51), (1, 9), (90, 33)], ids=str)
def test_stretching_samples_from_the_corner_without_a_shift(
    size: tuple[int, int], fp32: bool, generator: torch.Generator
) -> None:
    """Row j of H' rows is the source's row j·H / H', between rows by distance, 0 beyond the last one."""
    image, new = random_image(generator, *size), (41, 61)
    framed = np.pad(image.numpy().astype(float), ((0, 0), (0, 1), (0, 1)))
    rows, columns = (np.arange(side) * old / side for side, old in zip(new, size))
    y, x = rows.astype(int), columns.astype(int)
    fy, fx = (rows - y)[:, None], columns - x
    above, below = (framed[:, y + i][:, :, x] * (1 - fx) + framed[:, y + i][:, :, x + 1] * fx for i in (0, 1))
    resized = transforms.resize(image, *new, fp32=fp32, stretch=True)
    assert resized.dtype == torch.uint8 and resized.shape == (3, *new)
    # Rounded once in either direction, with weights of 15 bits.
    assert np.abs(resized.numpy() - (above * (1 - fy) + below * fy)).max() < 1.01


@pytest.mark.peers
@pytest.mark.parametrize("new", [(416, 416), (192, 256), (720, 480)], ids=str)
def test_stretching_is_opencvs_warp(new: tuple[int, int], generator: torch.Generator) -> None:
    """OpenCV rounds a sample's place to a 32nd of a pixel, so that neighbours of little contrast are compared."""
    cv2 = pytest.importorskip("cv2")
    coarse = torch.rand(1, 3, 9, 11, generator=generator) * 255
    image = torch.nn.functional.interpolate(coarse, (427, 640), mode="bilinear")[0].to(torch.uint8)
    matrix = np.array([[new[1] / 640, 0, 0], [0, new[0] / 427, 0]])
    theirs = torch.from_numpy(cv2.warpAffine(image.permute(1, 2, 0).numpy(), matrix, new[::-1])).permute(2, 0, 1)
    inside = (transforms.resize(image, *new, stretch=True).int() - theirs.int())[:, :-2, :-2]
    assert inside.abs().max() <= 2 and inside.abs().float().mean() < 0.5


@pytest.mark.parametrize("resize, expected", [("keep_ratio", (300, 400)), ("stretch", (320, 400))])
def test_images_keep_their_shape_unless_stretched(resize: str, expected: tuple[int, int]) -> None:
    test = Config().replace(resize=resize).test
    assert transforms.input_size((480, 640), 320, 400, test) == expected


@pytest.mark.peers
@pytest.mark.parametrize("new", [(800, 1067), (192, 256), (480, 721), (131, 97)], ids=str)
def test_resize_is_opencvs_within_one_level(new: tuple[int, int], generator: torch.Generator) -> None:
    cv2 = pytest.importorskip("cv2")
    image = random_image(generator, 427, 640)
    theirs = torch.from_numpy(cv2.resize(image.permute(1, 2, 0).numpy(), new[::-1], interpolation=cv2.INTER_LINEAR))
    assert (transforms.resize(image, *new).int() - theirs.permute(2, 0, 1).int()).abs().max() <= 1


@pytest.mark.parametrize(
    "size, limits, expected",
    [
        ((480, 640), (800, 1333), (800, 1067)),
        ((427, 640), (800, 1333), (800, 1199)),
        ((333, 640), (800, 1333), (694, 1333)),  # the long side limits; 693.6 up
        ((640, 333), (800, 1333), (1333, 694)),
        ((100, 100), (192, 192), (192, 192)),
        ((1, 4000), (800, 1333), (1, 1333)),  # a third of a pixel, but never none
    ],
)
def test_keep_ratio_size(size: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int]) -> None:
    assert transforms.keep_ratio_size(*size, *limits) == expected


@pytest.mark.peers
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(32, 1400).flatmap(lambda a: st.tuples(st.just(a), st.integers(a, 2000))),
)
def test_keep_ratio_size_is_mmcvs(height: int, width: int, limits: tuple[int, int]) -> None:
    mmcv = pytest.importorskip("mmcv.image")
    new_width, new_height = mmcv.rescale_size((width, height), (limits[1], limits[0]))
    assert transforms.keep_ratio_size(height, width, *limits) == (max(new_height, 1), max(new_width, 1))


def test_boxes_follow_the_image(generator: torch.Generator) -> None:
    boxes = torch.tensor([[0.0, 0.0, 640.0, 480.0], [10.0, 20.0, 110.0, 220.0]])
    resized = transforms.resize_boxes(boxes, (480, 640), (800, 1067))
    assert resized[0].tolist() == [0, 0, 1067, 800]
    torch.testing.assert_close(resized[1], torch.tensor([10 * 1067 / 640, 20 / 0.6, 110 * 1067 / 640, 220 / 0.6]))
    over = transforms.resize_boxes(torch.tensor([[-5.0, 3.0, 70.0, 50.0]]), (48, 64), (96, 128))
    assert over.tolist() == [[0, 6, 128, 96]]

    image = torch.zeros((3, 20, 30), dtype=torch.uint8)
    image[:, 4:9, 3:13] = 255
    box = transforms.flip_boxes(torch.tensor([[3.0, 4.0, 13.0, 9.0]]), 30)
    inside = torch.nonzero(image.flip(2)[0])
    assert box.tolist() == [[17, 4, 27, 9]]
    assert inside.min(0).values.tolist() == [4, 17] and inside.max(0).values.tolist() == [8, 26]


def test_pad_and_normalise(generator: torch.Generator) -> None:
    images = [random_image(generator, 20, 33), random_image(generator, 31, 7)]
    config = ModelConfig()
    batch, sizes = transforms.pad(images, 16)
    assert batch.shape == (2, 3, 32, 48) and sizes.tolist() == [[20, 33], [31, 7]]
    assert torch.equal(batch[0, :, :20, :33], images[0]) and batch[0, :, 20:].sum() + batch[0, :, :, 33:].sum() == 0
    before = batch.clone()
    result = transforms.normalise(batch, sizes)
    assert torch.equal(batch, before) and result.dtype == torch.float32 and result.is_contiguous()
    expected = torch.zeros(batch.shape, dtype=torch.float64)
    for row, image, (h, w) in zip(expected, images, sizes.int().tolist()):
        for c in range(3):
            row[c, :h, :w] = (image[c].double() - config.mean[c]) / config.std[c]
    # Two roundings of values up to 3.
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)
    other = dataclasses.replace(config, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), channel_order="bgr")
    blue_first = transforms.normalise(batch, sizes, other)
    torch.testing.assert_close(blue_first[0, 0, :20, :33], (images[0][2].float() - 3) / 6)
    torch.testing.assert_close(blue_first[1, 2, :31, :7], (images[1][0].float() - 1) / 4)
    whole = torch.tensor([[32.0, 48.0]] * 2)
    assert torch.equal(transforms.normalise(batch, None, other), transforms.normalise(batch, whole, other))
    floats = batch.float()
    transforms.normalise(floats, sizes)
    assert torch.equal(floats, before.float()), "the input was changed"


def test_no_image_is_a_batch_too() -> None:
    batch, sizes = transforms.pad([], 32)
    assert batch.shape == (0, 3, 32, 32) and sizes.shape == (0, 2)
    assert transforms.normalise(batch, sizes).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I"])
def test_modes(mode: str, generator: torch.Generator) -> None:
    image = as_pillow(random_image(generator, 11, 13))
    if mode.startswith("I"):
        levels = torch.randint(0, 65536, (11, 13), generator=generator).numpy()
        converted = Image.fromarray(levels.astype(np.uint16 if mode == "I;16" else np.int32))
        expected = np.repeat((levels // 256)[:, :, None], 3, 2)
    else:
        converted = image.convert("RGBA").convert("PA") if mode == "PA" else image.convert(mode)
        expected = np.asarray(converted.convert("RGBA").convert("RGB") if mode[0] == "P" else converted.convert("RGB"))
    assert converted.mode == mode
    tensor = transforms.to_tensor(converted)
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 11, 13)
    np.testing.assert_array_equal(tensor.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    "image, reason",
    [
        (Image.fromarray(np.zeros((3, 4), np.float32)), "no defined range"),
        (Image.fromarray(np.full((3, 4), 70000, np.int32)), "from 70000 to 70000"),
    ],
)
def test_modes_without_a_range(image: Image.Image, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        transforms.to_tensor(image)


def test_files(tmp_path: Path, generator: torch.Generator) -> None:
    image = random_image(generator, 40, 60)
    pillow = as_pillow(image)
    pillow.save(tmp_path / "rgb.png")
    pillow.convert("P").save(tmp_path / "palette.gif")
    pillow.convert("CMYK").save(tmp_path / "cmyk.jpg")
    levels = torch.randint(0, 65536, (40, 60), generator=generator).numpy().astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert torch.equal(transforms.read_image(tmp_path / "rgb.png"), image)
    assert transforms.read_image(str(tmp_path / "palette.gif")).shape == (3, 40, 60)
    cmyk = transforms.read_image(tmp_path / "cmyk.jpg")
    # JPEG's loss; inverted colours would be 100 off.
    assert (cmyk.float() - image.float()).abs().mean() < 30
    assert torch.equal(transforms.read_image(tmp_path / "deep.png")[1], torch.from_numpy(levels // 256).byte())


def test_exif_orientation(tmp_path: Path, generator: torch.Generator) -> None:
    """Upright as viewers and OpenCV show it, but for annotations of the stored pixels."""
    image = random_image(generator, 40, 60)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    file = tmp_path / "turned.png"
    as_pillow(image).save(file, exif=exif)
    upright = image.rot90(-1, (1, 2))
    assert torch.equal(transforms.read_image(file), upright)
    assert torch.equal(transforms.read_image(file, (60, 40)), upright)
    assert torch.equal(transforms.read_image(file, (40, 60)), image)
    with pytest.raises(ValueError, match=r"turned.png is 40×60 pixels, its annotation file says 30×50"):
        transforms.read_image(file, (50, 30))


def test_images_keep_their_memory_format(generator: torch.Generator) -> None:
    """A resized image of a file is copied into a batch of the same format, which is many times as fast."""
    image = random_image(generator, 40, 60).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    resized = transforms.resize(image, 50, 75)
    assert resized.stride() == (1, 225, 3)
    assert torch.equal(resized, transforms.resize(image.contiguous(), 50, 75))


def test_jpeg_files_by_another_decoder(tmp_path: Path, generator: torch.Generator) -> None:
    """simplejpeg gives pillow's pixels, and what it does not take is pillow's affair."""
    pytest.importorskip("simplejpeg")
    image = as_pillow(random_image(generator, 45, 67))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image.save(tmp_path / "plain.jpg")
    image.save(tmp_path / "progressive.jpg", progressive=True, subsampling=2, quality=60)
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.convert("L").save(tmp_path / "grey.jpg")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "plain.jpg").read_bytes()[:-400])
    for path in sorted(tmp_path.glob("*.jpg")):
        results = []
        for decoder in (transforms.simplejpeg, None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(transforms, "simplejpeg", decoder)
                try:
                    results.append(transforms.read_image(path))
                except transforms.UnreadableImage as error:
                    results.append(str(error))
        assert type(results[0]) is type(results[1]), path
        assert results[0] == results[1] if path.stem == "cut" else torch.equal(*results), path


def test_a_decoder_that_refuses_or_is_absent(tmp_path: Path, generator: torch.Generator, monkeypatch) -> None:
    as_pillow(random_image(generator, 40, 60)).save(tmp_path / "a.jpg")
    given: list[int] = []

    def decode_jpeg(content: bytes) -> np.ndarray:
        given.append(len(content))
        raise ValueError("Corrupt JPEG data")

    monkeypatch.setattr(transforms, "simplejpeg", SimpleNamespace(decode_jpeg_header=decode_jpeg))
    refused = transforms.read_image(tmp_path / "a.jpg")
    monkeypatch.setattr(transforms, "simplejpeg", None)
    assert torch.equal(refused, transforms.read_image(tmp_path / "a.jpg")) and len(given) == 1


@pytest.mark.parametrize("kind", ["empty", "text", "truncated jpeg", "truncated png", "broken png"])
def test_undecodable(kind: str, tmp_path: Path, generator: torch.Generator) -> None:
    file = tmp_path / "photo.jpg"
    as_pillow(random_image(generator, 64, 64)).save(file, format="PNG" if "png" in kind else "JPEG")
    content = file.read_bytes()
    broken = bytearray(content)
    broken[60:90] = bytes(30)
    file.write_bytes(
        {
            "empty": b"",
            "text": b"<html>404</html>",
            "broken png": bytes(broken),
        }.get(kind, content[: len(content) // 2])
    )
    with pytest.raises(transforms.UnreadableImage, match=r"photo\.jpg can't be decoded"):
        transforms.read_image(file)


def test_no_memory_is_not_undecodable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    monkeypatch.setattr(Image.Image, "load", full)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    with pytest.raises(MemoryError):
        transforms.read_image(tmp_path / "photo.png")


def test_missing_file_is_not_undecodable(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        transforms.read_image(tmp_path / "absent.jpg")


@pytest.mark.skipif(real_data.missing() is not None, reason=str(real_data.missing()))
def test_real_photos() -> None:
    for path in sorted((real_data.COCO / "images").glob("*.jpg"))[:5]:
        with Image.open(path) as photo:
            expected = np.asarray(photo.convert("RGB"))
        np.testing.assert_array_equal(transforms.read_image(path).permute(1, 2, 0).numpy(), expected)
