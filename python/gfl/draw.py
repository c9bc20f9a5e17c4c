# SPDX-License-Identifier: Apache-2.0
"""Pictures of detections, and of the four distributions that a box was read from."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]

INK, PAPER, FAINT = (38, 42, 51), (255, 255, 255), (206, 210, 217)
SHARP, VAGUE = (18, 148, 132), (228, 90, 32)
# Deviations, in bins, at which an edge's colour is wholly `SHARP` and wholly `VAGUE`.
_SHARP_AT, _VAGUE_AT = 0.25, 1.25


def class_color(label: int) -> Color:
    """A colour of its own for each class: hues a golden section apart, every third round darker, every fourth paler."""
    hue = (0.02 + label * 0.6180339887) % 1.0
    saturation = 0.55 if label % 4 == 3 else 0.85
    value = 0.78 if label % 3 == 2 else 0.98
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def draw_detections(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    names: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    scale: float = 1.0,
) -> Image.Image:
    """A copy of an image with boxes, each in its class's colour, with name and score.

    Better detections lie over worse ones and choose the place of their label first: above the box, inside it, below it
    or at its right end, wherever it covers no other label; one that finds no place is left out, its box is not.

    Args:
        image: any mode, size (w, h).
        boxes: xyxy in the image's pixels, n of them.
        labels: class index of each, which decides its colour.
        names: what to write of each.
        scores: in [0, 1]; None if there are none (ground truth).
        scale: the picture is this many times as large as the image, for small images.

    Returns:
        RGB, size (round(w·scale), round(h·scale)).
    """
    width, height = round(image.width * scale), round(image.height * scale)
    picture = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture, "RGBA")
    shorter = min(width, height)
    line, font = max(2, round(shorter / 220)), _font(max(11, round(shorter / 32)))
    order = list(range(len(boxes)))
    if scores is not None:
        order.sort(key=lambda i: -scores[i])
    for i in reversed(order):
        _frame(pen, _scaled(boxes[i], scale), class_color(labels[i]), line)
    taken: list[Box] = []
    for i in order:
        text = names[i] if scores is None else f"{names[i]} {scores[i]:.2f}"
        _tag(pen, text, _scaled(boxes[i], scale), class_color(labels[i]), font, line, picture.size, taken)
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
    line in each distribution its expected value, which is the edge. The number is the standard deviation in pixels,
    less (in the variance) what two bins must have to stand for an edge between them: ±0.0 is an edge known exactly.
    Colours go from `SHARP`, where the network is sure, to `VAGUE`.

    Args:
        image: any mode.
        box: xyxy in the image's pixels.
        distributions: ``[4][R+1]`` probabilities, sides in the order left, top, right, bottom.
        location: (x, y) that the distances are measured from, in the image's pixels.
        stride: width and height of a bin in the image's pixels.
        title: written above, such as class and score.
        color: of the box.
        truth: xyxy of the true box, dashed in white; None if it is not known.
        size: side of the image's part of the picture, pixels.

    Returns:
        RGB, a little larger than `size` each way.
    """
    sides = [_Side(index, list(distributions[index]), location, stride) for index in range(4)]
    window = _window(image, box, truth)
    zoom = size / (window[2] - window[0])
    strip, head, pad = round(size * 0.27), round(size * 0.12), round(size * 0.03)
    picture = Image.new("RGB", (pad + size + strip + 3 * pad, head + strip + size + pad), PAPER)
    # What lies outside the image is black.
    crop = image.convert("RGB").crop(window).resize((size, size), Image.Resampling.BICUBIC)
    origin = (pad, head + strip)
    picture.paste(crop, origin)
    pen = ImageDraw.Draw(picture, "RGBA")
    font, small = _font(round(size / 17)), _font(round(size / 24))

    def place(x: float, y: float) -> tuple[float, float]:
        return origin[0] + (x - window[0]) * zoom, origin[1] + (y - window[1]) * zoom

    if truth is not None:
        _dashed(pen, (*place(truth[0], truth[1]), *place(truth[2], truth[3])))
    _frame(pen, (*place(box[0], box[1]), *place(box[2], box[3])), color, 2)
    tallest = max(max(side.bars) for side in sides)
    for side in sides:
        _histogram(pen, side, place, origin, size, strip, tallest, small)
    pen.line([origin[0], origin[1] - 1, origin[0] + size, origin[1] - 1], fill=FAINT)
    pen.line([origin[0] + size, origin[1], origin[0] + size, origin[1] + size], fill=FAINT)
    pen.text((pad, head / 2), title, fill=INK, font=font, anchor="lm")
    return picture


def contact_sheet(pictures: Sequence[Image.Image], columns: int, *, gap: int = 10, title: str = "") -> Image.Image:
    """Pictures in rows, each in a cell of the largest one's size, under a title if there is one.

    Raises:
        ValueError: no pictures, or `columns` below one.
    """
    if not pictures or columns < 1:
        raise ValueError(f"gfl.draw.contact_sheet: {len(pictures)} pictures in {columns} columns")
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    whole = columns * (width + gap) - gap
    head = 36 if title else 0
    sheet = Image.new("RGB", (whole, head + rows * (height + gap) - gap), PAPER)
    if title:
        ImageDraw.Draw(sheet).text((whole / 2, head / 2), title, fill=INK, font=_font(17), anchor="mm")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), head + i // columns * (height + gap)))
    return sheet


class _Side:
    """One edge's distribution along its axis of the image: 0 is x, 1 is y."""

    def __init__(self, index: int, bars: list[float], location: Sequence[float], stride: Sequence[float]) -> None:
        self.axis = index % 2
        self.bars = bars
        self.step = stride[self.axis] * (-1 if index < 2 else 1)
        self.start = location[self.axis]
        mean = sum(k * p for k, p in enumerate(bars))
        self.edge = self.start + mean * self.step
        # An edge that is known exactly is spread over the two bins around it all the same: that much is not doubt.
        forced = (mean - math.floor(mean)) * (math.ceil(mean) - mean)
        doubt = math.sqrt(max(0.0, sum((k - mean) ** 2 * p for k, p in enumerate(bars)) - forced))
        self.doubt = doubt * abs(self.step)
        share = min(1.0, max(0.0, (doubt - _SHARP_AT) / (_VAGUE_AT - _SHARP_AT)))
        red, green, blue = (round(a + share * (b - a)) for a, b in zip(SHARP, VAGUE))
        self.color: Color = (red, green, blue)


def _histogram(pen, side: _Side, place, origin, size: int, strip: int, tallest: float, font) -> None:
    """Bars, the expected value's line and the deviation of one side, in the strip beside the image."""
    room = strip * 0.68
    along = side.axis
    half = abs(place(side.step, side.step)[along] - place(0, 0)[along]) * 0.43
    low, high = origin[along], origin[along] + size

    def bar(center: float, half_width: float, length: float, fill) -> None:
        first, last = max(low, center - half_width), min(high, center + half_width)
        if last <= first:
            return
        if along == 0:
            pen.rectangle([first, origin[1] - 2 - length, last, origin[1] - 2], fill=fill)
        else:
            pen.rectangle([origin[0] + size + 2, first, origin[0] + size + 2 + length, last], fill=fill)

    for k, probability in enumerate(side.bars):
        length = room * probability / tallest
        if length >= 0.5:
            position = side.start + k * side.step
            bar(place(position, position)[along], half, length, (*side.color, 215))
    edge = min(high - 1.0, max(low, place(side.edge, side.edge)[along]))
    bar(edge, 0.75, room + 2, (*INK, 255))
    text = f"±{side.doubt:.1f}"
    if along == 0:
        x = min(high - 16.0, max(low + 16.0, edge))
        pen.text((x, origin[1] - room - 6), text, fill=side.color, font=font, anchor="ms")
    else:
        pen.text((origin[0] + size + room + 7, edge), text, fill=side.color, font=font, anchor="lm")


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


def _frame(pen: ImageDraw.ImageDraw, box: Box, color: Color, line: int) -> None:
    x1, y1, x2, y2 = (round(v) for v in box)
    x2, y2 = max(x1 + 1, x2), max(y1 + 1, y2)
    # A dark rim keeps the colour apart from an image of the same colour.
    pen.rectangle([x1 - 1, y1 - 1, x2 + 1, y2 + 1], outline=(0, 0, 0, 110), width=line + 2)
    pen.rectangle([x1, y1, x2, y2], outline=(*color, 255), width=line)


def _dashed(pen: ImageDraw.ImageDraw, box: Box, dash: int = 5) -> None:
    x1, y1, x2, y2 = box
    for start in range(0, round(x2 - x1), 2 * dash):
        for y in (y1, y2):
            pen.line([x1 + start, y, min(x2, x1 + start + dash), y], fill=PAPER, width=2)
    for start in range(0, round(y2 - y1), 2 * dash):
        for x in (x1, x2):
            pen.line([x, y1 + start, x, min(y2, y1 + start + dash)], fill=PAPER, width=2)


def _tag(pen, text: str, box: Box, color: Color, font, line: int, size: tuple[int, int], taken: list[Box]) -> None:
    left, top, right, bottom = font.getbbox(text)
    margin = max(2, line)
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x1, y1, x2, y2 = box
    places = [
        (x1 - line / 2, y1 - height),
        (x1 - line / 2, y2 + 1),
        (x1, y1),
        (x2 - width, y1 - height),
        (x2 + 1, y1),
        (x1 - width, y1),
        (x2 - width, y2 + 1),
    ]
    for x, y in places:
        x, y = min(max(0, x), size[0] - width), min(max(0, y), size[1] - height)
        place = (x, y, x + width, y + height)
        if not any(_overlap(place, other) for other in taken):
            taken.append(place)
            pen.rectangle([round(v) for v in place], fill=(*color, 235))
            dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
            pen.text((x + margin - left, y + margin - top), text, fill=INK if dark else PAPER, font=font)
            return


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _scaled(box: Sequence[float], scale: float) -> Box:
    x1, y1, x2, y2 = (float(side) * scale for side in box)
    return x1, y1, x2, y2


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
