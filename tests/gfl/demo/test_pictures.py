# SPDX-License-Identifier: Apache-2.0
"""Which boxes the demo shows with their distributions."""

import pytest
import torch
from PIL import Image

from gfl.data.coco import CocoDataset
from gfl.demo import pictures
from gfl.demo.scenes import CLASSES, write_dataset
from gfl.detector import Result
from gfl.draw import Edges


def spread(at: float, width: int) -> torch.Tensor:
    """17 bins around a place: width 0 as an edge known exactly, else evenly over that many bins to each side."""
    bins = torch.arange(17.0)
    if width == 0:
        return (1 - (bins - at).abs()).clamp(min=0)
    near = ((bins - at).abs() <= width).float()
    return near / near.sum()


RIGHT = 2


class Sure:
    """Finds the true boxes; the right edges of each scene are in doubt by its number, of one in four not at all."""

    def __init__(self, scenes: CocoDataset) -> None:
        self.scenes = scenes

    def stream(self, paths, edges=False):
        for i, path in enumerate(paths):
            _, boxes, labels, _, size = self.scenes[i]
            n = len(boxes)
            centre = (boxes[:, :2] + boxes[:, 2:]) / 2
            distance = torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], 1) / 8
            rows = [
                torch.stack([spread(float(d), i % 4 if side == RIGHT else 0) for side, d in enumerate(four)])
                for four in distance
            ]
            probabilities = torch.stack(rows) if n else torch.zeros(0, 4, 17)
            yield Result(
                boxes=boxes,
                scores=torch.full((n,), 0.9),
                labels=labels,
                names=[CLASSES[label] for label in labels],
                category_ids=(labels + 1).tolist(),
                size=size,
                path=path,
                edges=Edges(probabilities, centre, torch.full((n, 2), 8.0)) if edges else None,
                _pixels=None,
            )


@pytest.fixture
def scenes(tmp_path, seed) -> CocoDataset:
    write_dataset(tmp_path, train=0, val=16, seed=seed)
    return CocoDataset(tmp_path / "annotations/val.json", tmp_path / "val")


def test_doubt_is_none_for_exact_edges_and_the_deviation_for_others():
    probabilities = torch.stack([spread(4.3, 0), spread(5, 1), spread(5, 2), spread(0, 0)])[None]
    doubt = Edges(probabilities, torch.zeros(1, 2), torch.ones(1, 2)).doubt()
    torch.testing.assert_close(doubt, torch.tensor([[0, (2 / 3) ** 0.5, 2**0.5, 0]]), atol=2e-3, rtol=1e-4)


def test_distributions_show_sharp_boxes_first_then_the_most_doubtful(scenes, monkeypatch):
    shown = []

    def record(self, index, *, truth=None, size=300):
        assert truth == pytest.approx(self.boxes[index].tolist())
        shown.append((self.path, float(self.edges.doubt()[index].max())))
        return Image.new("RGB", (10, 10))

    monkeypatch.setattr(Result, "draw_edges", record)
    assert pictures.distributions(Sure(scenes), scenes, 3, 2) is not None
    assert len(shown) == 6 and len({path for path, _ in shown}) == 6
    assert max(doubt for _, doubt in shown[:2]) < 0.05
    assert min(doubt for _, doubt in shown[2:]) > 1


def test_nothing_to_show(scenes, monkeypatch):
    monkeypatch.setattr(pictures, "SURE", 0.95)
    assert pictures.distributions(Sure(scenes), scenes) is None


def test_detections_are_of_the_first_scenes(scenes):
    side = int(Image.open(scenes.path(0)).width * pictures.SCALE)
    assert pictures.detections(Sure(scenes), scenes, 3, 2).size == (3 * side + 20, 36 + 2 * side + 10)
