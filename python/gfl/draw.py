# SPDX-License-Identifier: Apache-2.0
"""Pictures of detections, and of the four distributions that a box is read from."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import gfl_ops

from .files import printable

if TYPE_CHECKING:
    from .data.loader import Batch

Color = tuple[int, ...]

INK, PAPER, FAINT = (38, 42, 51), (255, 255, 255), (206, 210, 217)
SHARP, VAGUE = (18, 148, 132), (228, 90, 32)
# Standard deviations, in bins, at which an edge is wholly `SHARP` and wholly `VAGUE`.
SHARP_AT, VAGUE_AT = 0.25, 1.25
MAX_NAME = 60
_font = ImageFont.load_default


def class_color(label: int) -> Color:
    """A distinct colour per class: hues a golden section apart, every third darker, every fourth paler."""
    hue = (0.02 + label * 0.6180339887) % 1.0
    saturation = 0.55 if label % 4 == 3 else 0.85
    value = 0.78 if label % 3 == 2 else 0.98
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))


class Edges(NamedTuple):
    """The distributions of n boxes' edges.

    Attributes:
        probabilities: fp32 ``[n, 4, R+1]``, sides in the order left, top, right, bottom.
        locations: fp32 ``[n, 2]``, (x, y) that the distances are measured from, in pixels.
        bins: fp32 ``[n, 2]``, width and height of a bin in the same pixels: left and right edge lie at
            ``x ∓ expected bin · width``, top and bottom edge at ``y ∓ expected bin · height``.
    """

    probabilities: Tensor
    locations: Tensor
    bins: Tensor

    def doubt(self) -> Tensor:
        """Standard deviation of each edge in bins, ``[n, 4]``, less what an edge that is known exactly must have.

        Such an edge is spread over the two bins around it, with variance f·(1−f) at the fraction f between them, and
        no distribution of that mean has less.
        """
        bins = torch.arange(self.probabilities.shape[-1], device=self.probabilities.device)
        mean = (self.probabilities * bins).sum(-1)
        variance = gfl_ops.side_uncertainty(self.probabilities)[..., 0]
        return (variance - mean.frac() * (1 - mean.frac())).clamp(min=0).sqrt()


def draw_detections(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    names: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    scale: float = 1.0,
) -> Image.Image:
    """A copy of an image with boxes in their classes' colours, with name and score.

    Better detections lie over worse ones and choose the place of their label first: above the box, inside it, below it
    or at its right end, wherever it covers no other label. A label that finds no place is left out.

    Boxes are xyxy in the pixels of the image, which may have any mode; labels are class indices, which decide colours;
    without `scores` it is ground truth. The RGB picture is `scale` times as large as the image.
    """
    width, height = round(image.width * scale), round(image.height * scale)
    picture = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture, "RGBA")
    shorter = min(width, height)
    line, font = max(2, round(shorter / 220)), _font(max(11, round(shorter / 32)))
    scaled = [[float(side) * scale for side in box] for box in boxes]
    order = sorted(range(len(boxes)), key=lambda i: 0.0 if scores is None else -scores[i])
    for i in reversed(order):
        _frame(pen, scaled[i], class_color(labels[i]), line)
    taken: list[Sequence[float]] = []
    for i in order:
        name = _shown(names[i])
        text = name if scores is None else f"{name} {scores[i]:.2f}"
        _tag(pen, text, scaled[i], class_color(labels[i]), font, line, picture.size, taken)
    return picture


def draw_edges(
    image: Image.Image,
    box: Sequence[float],
    distributions: Sequence[Sequence[float]],
    location: Sequence[float],
    stride: Sequence[float],
    *,
    title: str = "",
    color: Color = SHARP,
    truth: Sequence[float] | None = None,
    size: int = 300,
) -> Image.Image:
    """A box with the distributions of its four edges drawn beside them, each bar where its bin lies in the image.

    Left and right edge are above the image, top and bottom at its right. A bar's length is its bin's probability, the
    dark line is the expected value, which is the edge. The number is the standard deviation in pixels that
    `Edges.doubt` gives: ±0.0 is an edge known exactly. Colours go from `SHARP`, where the network is sure, to
    `VAGUE`.

    Args:
        image: any mode.
        box: xyxy in the image's pixels, as all that follows.
        distributions: ``[4][R+1]`` probabilities, sides in the order left, top, right, bottom.
        location: (x, y) that the distances are measured from.
        stride: width and height of a bin.
        title: written above, such as class and score.
        color: of the box.
        truth: xyxy of the true box, dashed in white, if it is known.
        size: side of the image's part of the RGB picture, pixels.
    """
    window = _window(image, box, truth)
    zoom = size / (window[2] - window[0])
    strip, head, pad = round(size * 0.27), round(size * 0.12), round(size * 0.03)
    picture = Image.new("RGB", (pad + size + strip + 3 * pad, head + strip + size + pad), PAPER)
    # What lies outside the image is black.
    crop = image.convert("RGB").crop(window).resize((size, size), Image.Resampling.BICUBIC)
    left, top = origin = (pad, head + strip)
    picture.paste(crop, origin)
    pen = ImageDraw.Draw(picture, "RGBA")
    font, small = _font(round(size / 17)), _font(round(size / 24))

    def place(value: float, axis: int) -> float:
        return origin[axis] + (value - window[axis]) * zoom

    if truth is not None:
        _dashed(pen, [place(value, i % 2) for i, value in enumerate(truth)])
    _frame(pen, [place(value, i % 2) for i, value in enumerate(box)], color, 2)

    def bar(axis: int, center: float, half: float, length: float, fill: tuple[int, ...]) -> None:
        first, last = max(origin[axis], center - half), min(origin[axis] + size, center + half)
        if last > first and axis == 0:
            pen.rectangle([first, top - 2 - length, last, top - 2], fill=fill)
        elif last > first:
            pen.rectangle([left + size + 2, first, left + size + 2 + length, last], fill=fill)

    room, tallest = strip * 0.68, max(max(bins) for bins in distributions)
    sides = Edges(torch.tensor(distributions, dtype=torch.float64), torch.tensor(location), torch.tensor(stride))
    for side, (bins, doubt) in enumerate(zip(distributions, sides.doubt().tolist())):
        axis, start = side % 2, location[side % 2]
        step = stride[axis] * (-1 if side < 2 else 1)
        half = abs(place(step, axis) - place(0, axis)) * 0.43
        share = min(1.0, max(0.0, (doubt - SHARP_AT) / (VAGUE_AT - SHARP_AT)))
        sure = tuple(round(a + share * (b - a)) for a, b in zip(SHARP, VAGUE))
        for k, probability in enumerate(bins):
            if (length := room * probability / tallest) >= 0.5:
                bar(axis, place(start + k * step, axis), half, length, (*sure, 215))
        mean = sum(k * probability for k, probability in enumerate(bins))
        edge = min(origin[axis] + size - 1.0, max(origin[axis], place(start + mean * step, axis)))
        bar(axis, edge, 0.75, room + 2, (*INK, 255))
        text = f"±{doubt * abs(step):.1f}"
        if axis == 0:
            x = min(left + size - 16.0, max(left + 16.0, edge))
            pen.text((x, top - room - 6), text, fill=sure, font=small, anchor="ms")
        else:
            pen.text((left + size + room + 7, edge), text, fill=sure, font=small, anchor="lm")
    pen.line([left, top - 1, left + size, top - 1], fill=FAINT)
    pen.line([left + size, top, left + size, top + size], fill=FAINT)
    pen.text((pad, head / 2), _shown(title), fill=INK, font=font, anchor="lm")
    return picture


def contact_sheet(pictures: Sequence[Image.Image], columns: int, *, gap: int = 10, title: str = "") -> Image.Image:
    """Pictures in rows, each in a cell of the largest one's size, under a title if there is one."""
    if not pictures or columns < 1:
        raise ValueError(f"gfl.draw.contact_sheet: {len(pictures)} pictures in {columns} columns")
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    whole, head = columns * (width + gap) - gap, 36 if title else 0
    sheet = Image.new("RGB", (whole, head + rows * (height + gap) - gap), PAPER)
    if title:
        ImageDraw.Draw(sheet).text((whole / 2, head / 2), title, fill=INK, font=_font(17), anchor="mm")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), head + i // columns * (height + gap)))
    return sheet


def draw_batch(batch: Batch, names: Sequence[str], columns: int = 4, most: int = 16, side: int = 400) -> Image.Image:
    """The first images of a batch as the network gets them, padding too, with their boxes."""
    pictures = []
    for row, target in zip(range(min(len(batch.counts), most)), batch.targets):
        photo = Image.fromarray(batch.images[row].permute(1, 2, 0).cpu().numpy())
        labels, boxes = target["labels"].tolist(), target["boxes"].tolist()
        scale = side / max(photo.size)
        pictures.append(draw_detections(photo, boxes, labels, [names[label] for label in labels], scale=scale))
    return contact_sheet(pictures, columns)


def _shown(name: str) -> str:
    """A name as it is drawn: one line of at most `MAX_NAME` letters."""
    text = printable(name)
    return text if len(text) <= MAX_NAME else f"{text[: MAX_NAME - 1]}…"


def _window(image: Image.Image, box: Sequence[float], truth: Sequence[float] | None) -> tuple[int, int, int, int]:
    """A square of whole pixels around a box with room at its edges, within the image if it is large enough."""
    boxes = [box] if truth is None else [box, truth]
    low = [min(b[i] for b in boxes) for i in (0, 1)]
    high = [max(b[i] for b in boxes) for i in (2, 3)]
    side = max(8, math.ceil(1.7 * max(high[0] - low[0], high[1] - low[1])))
    start = []
    for length, first, last in zip(image.size, low, high):
        middle = round((first + last - side) / 2)
        start.append(min(max(0, middle), length - side) if side <= length else middle)
    return start[0], start[1], start[0] + side, start[1] + side


def _frame(pen: ImageDraw.ImageDraw, box: Sequence[float], color: Color, line: int) -> None:
    x1, y1, x2, y2 = (round(v) for v in box)
    x2, y2 = max(x1 + 1, x2), max(y1 + 1, y2)
    # A dark rim keeps the colour apart from an image of the same colour.
    pen.rectangle([x1 - 1, y1 - 1, x2 + 1, y2 + 1], outline=(0, 0, 0, 110), width=line + 2)
    pen.rectangle([x1, y1, x2, y2], outline=(*color, 255), width=line)


def _dashed(pen: ImageDraw.ImageDraw, box: Sequence[float], dash: int = 5) -> None:
    x1, y1, x2, y2 = box
    for start in range(0, round(x2 - x1), 2 * dash):
        for y in (y1, y2):
            pen.line([x1 + start, y, min(x2, x1 + start + dash), y], fill=PAPER, width=2)
    for start in range(0, round(y2 - y1), 2 * dash):
        for x in (x1, x2):
            pen.line([x, y1 + start, x, min(y2, y1 + start + dash)], fill=PAPER, width=2)


def _tag(pen, text: str, box: Sequence[float], color: Color, font, line: int, size: tuple[int, int], taken) -> None:
    left, top, right, bottom = font.getbbox(text)
    margin = max(2, line)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x1, y1, x2, y2 = box
    starts, ends = x1 - line / 2, x2 - width
    places = [(starts, y1 - height), (starts, y2 + 1), (x1, y1), (ends, y1 - height), (x2 + 1, y1), (x1 - width, y1)]
    for x, y in [*places, (ends, y2 + 1)]:
        x, y = min(max(0, x), size[0] - width), min(max(0, y), size[1] - height)
        if all(x >= t[2] or t[0] >= x + width or y >= t[3] or t[1] >= y + height for t in taken):
            taken.append(place := (x, y, x + width, y + height))
            pen.rectangle([round(v) for v in place], fill=(*color, 235))
            dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
            pen.text((x + margin - left, y + margin - top), text, fill=INK if dark else PAPER, font=font)
            return
