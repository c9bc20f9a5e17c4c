# SPDX-License-Identifier: Apache-2.0
"""From an image file to a normalised batch, by the steps that the published weights were trained with."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from .. import files
from ..config import InferenceConfig, ModelConfig

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Bytes of an image file, of which the largest photos have a tenth.
LARGEST_FILE = 2**29
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 swap height and width
_TURN = Image.Transpose
TURNS = {
    **{2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE},
    **{6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90},
}


class UnreadableImage(ValueError):
    """A file that is there but can't be decoded; the text names it and says why."""


class ConflictingOrientations(ValueError):
    """Photos of one set whose boxes are partly on upright pixels and partly on stored ones."""


def read_image(
    path: str | Path, size: tuple[int, int] | None = None, upright: Callable[[], bool] = lambda: True
) -> Tensor:
    """An image file as RGB, uint8 ``[3, H, W]`` in channels-last memory format.

    It is turned upright by its EXIF orientation, as OpenCV and viewers do, unless `size`, the (height, width) in pixels
    that annotations refer to, tells that they were made on the stored pixels. Where the size is the same either way
    `upright` is asked. Of an animation it is the first frame; `to_tensor` tells about other modes than RGB.

    Raises:
        OSError: the file can't be read (it is missing, for example).
        UnreadableImage: it can't be decoded, is no regular file, or too large.
        ValueError: the image is not of `size`.
    """
    try:
        content = files.read_bytes(path, LARGEST_FILE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EFBIG):
            raise
        raise UnreadableImage(f"{path} can't be decoded: {files.reason(error)}") from None
    image = _jpeg(content)
    if image is None:
        image = _by_pillow(path, content, size, upright)
    if size is not None and tuple(image.shape[1:]) != size:
        shape = f"{image.shape[2]}×{image.shape[1]}"
        raise ValueError(f"{path} is {shape} pixels, its annotation file says {size[1]}×{size[0]}")
    return image


def _jpeg(content: bytes) -> Tensor | None:
    """A JPEG file by simplejpeg, with pillow's very pixels but sooner; None for what is damaged, large or not plain."""
    if simplejpeg is None or not content.startswith(b"\xff\xd8") or b"Exif\0\0" in content:
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if colors != "YCbCr" or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
    except ValueError:
        return None


def _by_pillow(path: str | Path, content: bytes, size: tuple[int, int] | None, upright: Callable[[], bool]) -> Tensor:
    with _open(path, io.BytesIO(content)) as stored:
        try:
            stored.load()
            unturned, turned = _sizes(stored)
            turn = TURNS.get(_orientation(stored))
            if turn is not None and size == unturned and (size != turned or not upright()):
                turn = None
            return to_tensor(stored if turn is None else stored.transpose(turn))
        except (ConflictingOrientations, MemoryError):
            raise
        # Pillow's decoders raise many types on broken files (SyntaxError, struct.error, DecompressionBombError, …).
        except Exception as error:
            raise UnreadableImage(f"{path} can't be decoded: {files.reason(error)}") from error


def stored_size(path: str | Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of an image file's pixels as they are stored, and upright; UnreadableImage if it has none."""
    try:
        with files.open_regular(path) as file, _open(path, file) as stored:
            return _sizes(stored)
    except OSError as error:
        raise UnreadableImage(f"{path} can't be read: {files.reason(error)}") from None


def _open(path: str | Path, file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file)
    except Exception as error:
        raise UnreadableImage(f"{path} can't be decoded: {files.reason(error)}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 for none, and for broken EXIF data, which say nothing about the pixels."""
    if image.format == "TIFF":  # pillow itself turns it
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


def _sizes(image: Image.Image) -> tuple[tuple[int, int], tuple[int, int]]:
    height, width = image.height, image.width
    return (height, width), (width, height) if 5 <= _orientation(image) <= 8 else (height, width)


def to_tensor(image: Image.Image) -> Tensor:
    """A pillow image of any mode as RGB, uint8 ``[3, H, W]`` in channels-last memory format.

    Grey is repeated, a palette is looked up, transparency is dropped, CMYK and YCbCr are converted, 16 bits are cut to
    their upper 8 (as in OpenCV, except CMYK). A mode without a defined range (32-bit floats) and integers of more than
    16 bits are a ValueError.
    """
    if image.mode.startswith("I"):  # I;16, I;16B, and I for what some formats give
        levels = np.asarray(image).astype(np.int64)
        if levels.min(initial=0) < 0 or levels.max(initial=0) > 0xFFFF:
            raise ValueError(f"pixels of mode {image.mode} reach from {levels.min()} to {levels.max()}, not 0 to 65535")
        pixels = (levels >> 8).astype(np.uint8)[:, :, None].repeat(3, 2)
    elif image.mode == "F":
        raise ValueError("pixels of mode F (32-bit floats) have no defined range")
    else:
        # A palette's transparency only converts quietly by way of RGBA.
        rgb = image if image.mode == "RGB" else (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
        pixels = np.array(rgb)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def input_size(size: tuple[int, int], short_side: int, long_side: int, test: InferenceConfig) -> tuple[int, int]:
    """(height, width) that an image of `size` is resized to, by ``test.resize`` and the given sides."""
    return (short_side, long_side) if test.resize == "stretch" else keep_ratio_size(*size, short_side, long_side)


def keep_ratio_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) at the largest scale at which neither the short nor the long side exceeds its limit.

    Rounded half up, as mmdet's ``Resize(keep_ratio=True)``; at least one pixel.
    """
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize(image: Tensor, height: int, width: int, fp32: bool = False, stretch: bool = False) -> Tensor:
    """An image uint8 ``[3, H, W]`` in another size, the same at any number of threads.

    Bilinear, half-pixel centres, no antialiasing: within one level of OpenCV's ``INTER_LINEAR``. With `stretch` it is
    sampled at (i·W/width, j·H/height) without a shift, 0 outside, as OpenCV's ``warpAffine`` does in NanoDet. With
    `fp32` as a GPU has to interpolate, at most one level from the CPU's fixed-point weights.
    """
    if tuple(image.shape[1:]) == (height, width):
        return image
    given = image[None].float() if fp32 else image[None]
    if stretch:
        # Corners aligned, one pixel more on both sides: the step between samples is then (W + 1 - 1) / (width + 1 - 1).
        rows, columns = given.shape[2:]
        wider = given.new_zeros(1, rows + 1, columns + 1, 3).permute(0, 3, 1, 2)
        wider[:, :, :rows, :columns] = given
        larger = functional.interpolate(wider, (height + 1, width + 1), mode="bilinear", align_corners=True)
        resized = larger[0, :, :height, :width]
    else:
        if not fp32 and not image.is_cuda:
            # A batch of one may have any stride; by this one its memory format is seen and kept, which takes half the
            # time here, and a tenth where the image is copied into a batch.
            rows = max(length * stride for length, stride in zip(image.shape, image.stride()))
            given = given.as_strided(given.shape, (rows, *image.stride()))
        resized = functional.interpolate(given, (height, width), mode="bilinear", align_corners=False)[0]
    return resized.round_().clamp_(0, 255).to(torch.uint8) if fp32 else resized


def resize_boxes(boxes: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """fp32 xyxy `boxes` ``[n, 4]`` of an image of `old_size` (height, width) in one of `new_size`, clipped to it."""
    height, width = new_size
    scale = boxes.new_tensor([width / old_size[1], height / old_size[0]]).repeat(2)
    return torch.minimum((boxes * scale).clamp(min=0), boxes.new_tensor([width, height, width, height]))


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """xyxy `boxes` ``[n, 4]`` of an image of that width, mirrored left to right."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], 1)


def pad(images: Sequence[Tensor], divisor: int) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[3, H, W]`` of several sizes in one tensor on their device, padded right and below.

    Returns:
        uint8 ``[B, 3, H, W]`` in channels-last memory format, H and W multiples of `divisor`, zero in the padding, and
        on the CPU fp32 ``[B, 2]``, each image's (height, width) without it.
    """
    sizes = [tuple(image.shape[1:]) for image in images]
    height, width = (-(-max((s[i] for s in sizes), default=1) // divisor) * divisor for i in (0, 1))
    shape, device = (len(images), 3, height, width), images[0].device if images else None
    batch = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last).zero_()
    for row, image, (h, w) in zip(batch, images, sizes, strict=True):
        row[:, :h, :w] = image
    return batch, torch.tensor(sizes, dtype=torch.float32).reshape(-1, 2)


def normalise(images: Tensor, image_sizes: Tensor | None, config: ModelConfig | None = None) -> Tensor:
    """The network's input, fp32, contiguous: mean subtracted, divided by the deviation, padded with zero.

    Args:
        images: RGB, uint8 (or of any type, in levels of 0 to 255) ``[B, 3, H, W]``.
        image_sizes: ``[B, 2]``, (height, width) without padding, on the same device; the host does not wait for it.
            None: there is no padding.
        config: the network's, with `mean`, `std` and `channel_order`; by default those of ImageNet, RGB.
    """
    config = config or ModelConfig()
    channels = list(enumerate(zip(config.mean, config.std, strict=True)))
    if config.channel_order == "bgr":
        channels.reverse()
    result = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for place, (source, (mean, std)) in enumerate(channels):
        result[:, place].copy_(images[:, source]).sub_(mean).div_(std)
    if image_sizes is None:
        return result
    rows = torch.arange(images.shape[2], device=images.device)[None] < image_sizes[:, :1]
    columns = torch.arange(images.shape[3], device=images.device)[None] < image_sizes[:, 1:]
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return result.masked_fill_(~inside, 0)
