# SPDX-License-Identifier: Apache-2.0
"""Pictures: what must be where in them."""

import numpy as np
import pytest
import torch
from PIL import Image

from gfl import draw
from gfl.draw import Edges


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def where(picture: Image.Image, color: tuple[int, int, int], tolerance: int = 0) -> np.ndarray:
    """Rows (y, x) of the pixels of a colour."""
    difference = np.abs(np.asarray(picture).astype(int) - np.array(color)).max(2)
    return np.argwhere(difference <= tolerance)


def peaked(bins: int, at: int) -> list[float]:
    return [float(k == at) for k in range(bins)]


def test_classes_have_colours_of_their_own():
    colors = [draw.class_color(label) for label in range(80)]
    assert len(set(colors)) == 80
    first = np.array(colors[:10])
    apart = np.abs(first[:, None] - first[None]).max(-1) + 255 * np.eye(10, dtype=int)
    assert apart.min() >= 48


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_box_is_drawn_where_it_is(scale):
    picture = draw.draw_detections(grey(200, 160), [[60, 50, 150, 120]], [3], ["cup"], [0.9], scale=scale)
    assert picture.size == (200 * scale, 160 * scale)
    pixels = where(picture, draw.class_color(3))
    low, high = pixels.min(0) / scale, pixels.max(0) / scale
    assert abs(low[1] - 60) <= 1.5 and abs(high[1] - 150) <= 1.5 and abs(high[0] - 120) <= 1.5


def test_an_image_without_detections_stays_as_it_is():
    image = Image.effect_noise((64, 48), 60).convert("RGB")
    assert np.array_equal(np.asarray(draw.draw_detections(image, [], [], [])), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_of_image(mode):
    picture = draw.draw_detections(grey(50, 40).convert(mode), [[5, 5, 30, 30]], [0], ["x"], [0.5])
    assert picture.mode == "RGB" and picture.size == (50, 40)


def test_labels_cover_no_other_label(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 350, (40, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 80, (40, 2))], 1).tolist()
    taken: list[list] = []
    tag = draw._tag

    def spy(*arguments):
        tag(*arguments)
        taken.append(arguments[-1])

    monkeypatch.setattr(draw, "_tag", spy)
    draw.draw_detections(grey(400, 400), boxes, [i % 5 for i in range(40)], ["thing"] * 40, rng.random(40).tolist())
    places = taken[-1]
    assert len(places) > 5
    for i, a in enumerate(places):
        assert a[0] >= 0 and a[1] >= 0 and a[2] <= 400 and a[3] <= 400
        for b in places[:i]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_the_label_of_a_box_at_the_top_edge_stays_in_the_picture():
    picture = draw.draw_detections(grey(300, 200), [[40, 0, 90, 30]], [1], ["hat"], [0.8])
    assert len(where(picture, draw.class_color(1), 12)) > 300


@pytest.mark.parametrize("box", [[-5, -9, 500, 500], [3, 3, 3, 3], [9.9, 9.9, 10.1, 10.1]])
def test_boxes_without_extent_or_over_the_edge(box):
    assert draw.draw_detections(grey(60, 60), [box], [0], ["x"], [0.5]).size == (60, 60)
    assert draw.draw_edges(grey(60, 60), box, [peaked(9, 2)] * 4, (10, 10), (8, 8)).mode == "RGB"


def doubts(bins: list[float]) -> list[float]:
    return Edges(torch.tensor([bins] * 4, dtype=torch.float64), torch.zeros(2), torch.ones(2)).doubt().tolist()


def test_an_edge_that_is_known_exactly_is_sharp_wherever_it_lies(seed):
    place = np.random.default_rng(seed).uniform(1, 7)
    low = int(place)
    between = [0.0] * 9
    between[low], between[low + 1] = 1 - (place - low), place - low
    assert doubts(between) == pytest.approx([0] * 4, abs=1e-5)
    box = [80 - 8 * place, 80 - 8 * place, 80 + 8 * place, 80 + 8 * place]
    picture = draw.draw_edges(grey(160, 160), box, [between] * 4, (80, 80), (8, 8), color=(255, 0, 0))
    assert len(where(picture, draw.SHARP, 45)) and not len(where(picture, draw.VAGUE, 45))
    # The dark lines of the expected values are where the edges are.
    frame, lines = where(picture, (255, 0, 0)), where(picture, draw.INK, 12)
    above, beside = lines[lines[:, 0] < 36 + 81], lines[lines[:, 1] > 9 + 300]
    assert above[:, 1].min() == pytest.approx(frame[:, 1].min(), abs=2)
    assert above[:, 1].max() == pytest.approx(frame[:, 1].max(), abs=2)
    assert beside[:, 0].min() == pytest.approx(frame[:, 0].min(), abs=2)
    assert beside[:, 0].max() == pytest.approx(frame[:, 0].max(), abs=2)


def test_an_edge_between_two_far_bins_is_vague():
    two = [0.5, 0, 0, 0, 0.5, 0, 0, 0, 0]
    assert doubts(two) == pytest.approx([2] * 4)
    picture = draw.draw_edges(grey(128, 128), [48, 48, 80, 80], [two] * 4, (64, 64), (8, 8))
    assert len(where(picture, draw.VAGUE, 45)) and not len(where(picture.crop((0, 0, 309, 110)), draw.SHARP, 45))


def test_bars_stand_where_their_bins_lie():
    # Location (64, 64), bins of 8 pixels: left edge at 64 - 3 * 8 = 40, right at 64 + 2 * 8 = 80.
    box, size = [40, 56, 80, 96], 300
    distributions = [peaked(17, 3), peaked(17, 1), peaked(17, 2), peaked(17, 4)]
    picture = draw.draw_edges(grey(128, 128), box, distributions, (64, 64), (8, 8), color=(255, 0, 0), size=size)
    frame = where(picture, (255, 0, 0))
    top, left = frame.min(0)
    bottom, right = frame.max(0)
    bars = where(picture, draw.SHARP, 45)
    strip = 9 + size  # the image ends there, the bars of top and bottom begin
    above, beside = bars[(bars[:, 0] < top - 20) & (bars[:, 1] < strip)], bars[bars[:, 1] > strip]
    middle = (above[:, 1].min() + above[:, 1].max()) / 2
    assert middle == pytest.approx((left + right) / 2, abs=3)
    bar = 0.43 * 8 * size / (1.7 * 40)
    assert above[:, 1].min() == pytest.approx(left - bar, abs=3) and above[:, 1].max() == pytest.approx(
        right + bar, abs=3
    )
    assert beside[:, 0].min() == pytest.approx(top - bar, abs=3)
    assert beside[:, 0].max() == pytest.approx(bottom + bar, abs=3)


def test_contact_sheet():
    sheet = draw.contact_sheet([grey(50, 40), grey(30, 60), grey(50, 60)], 2, gap=10)
    assert sheet.size == (110, 130)
    assert sheet.getpixel((100, 100)) == draw.PAPER and sheet.getpixel((65, 5)) == (128, 128, 128)
    with pytest.raises(ValueError, match="0 pictures"):
        draw.contact_sheet([], 2)
