# SPDX-License-Identifier: Apache-2.0
"""What `postprocess` says of bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from postprocess_calls import BACKENDS, flat, run

import gfl_ops
from gfl_ops.core import checks


def replaced(position: int, value: Any) -> Any:
    def change(args: list[Any]) -> list[Any]:
        args[position] = value(args[position]) if callable(value) else value
        return args

    return change


BAD = [
    ("cls_scores", replaced(0, torch.zeros(1, 2, 2, 3)), {}, TypeError, "list or tuple of tensors"),
    ("cls_scores", replaced(0, []), {}, ValueError, "at least one level"),
    ("cls_scores", replaced(0, lambda c: c * 9), {}, NotImplementedError, "more than 8 levels"),
    ("cls_scores[1]", replaced(0, lambda c: [c[0], c[1].int()]), {}, TypeError, "dtypes"),
    ("cls_scores[1]", replaced(0, lambda c: [c[0], c[1].half()]), {}, TypeError, "dtype of the first level"),
    ("cls_scores[0]", replaced(0, lambda c: [c[0][0], c[1]]), {}, ValueError, "[B, C, H, W]"),
    ("cls_scores[1]", replaced(0, lambda c: [c[0], c[1][:, :1]]), {}, ValueError, "[1, 2, H, W], got [1, 1, 1, 2]"),
    ("cls_scores[1]", replaced(0, lambda c: [c[0], c[1].to("meta")]), {}, ValueError, "on the device"),
    ("reg_preds", replaced(1, lambda r: r[:1]), {}, ValueError, "as many levels as `cls_scores`, 2, got 1"),
    ("reg_preds[0]", replaced(1, lambda r: [None, r[1]]), {}, TypeError, "must be a tensor"),
    ("reg_preds[0]", lambda a: a, {"reg_max": 16}, ValueError, "[1, 68, 2, 3], got [1, 8, 2, 3]"),
    ("reg_preds[1]", replaced(1, lambda r: [r[0], r[1][..., :1]]), {}, ValueError, "[1, 8, 1, 2]"),
    ("reg_preds[1]", replaced(1, lambda r: [r[0], r[1].bfloat16()]), {}, TypeError, "dtype of the first level"),
    ("strides", replaced(2, 8.0), {}, TypeError, "list or tuple of numbers"),
    ("strides", replaced(2, [8.0]), {}, ValueError, "one number per level, 2, got 1"),
    ("strides[1]", replaced(2, [8.0, 0.0]), {}, ValueError, "must be > 0"),
    ("strides[0]", replaced(2, [float("nan"), 8.0]), {}, ValueError, "NaN"),
    ("strides[0]", replaced(2, [(8, 8), (16, 16)]), {}, TypeError, "must be a number"),
    ("image_sizes", replaced(3, 5), {}, TypeError, "tensor or a list"),
    ("image_sizes", replaced(3, [(4, 4), (4, 4)]), {}, ValueError, "one pair per image, 1, got 2"),
    ("image_sizes[0]", replaced(3, [4]), {}, ValueError, "pair of numbers"),
    ("image_sizes[0]", replaced(3, [(4, "4")]), {}, TypeError, "must be a number"),
    ("image_sizes", replaced(3, torch.zeros(2)), {}, ValueError, "[B, 2] = [1, 2], got [2]"),
    ("image_sizes", replaced(3, torch.zeros(1, 2, dtype=torch.bool)), {}, TypeError, "dtypes"),
    ("scale_factors", lambda a: a, {"scale_factors": torch.ones(1, 4)}, ValueError, "[B, 2] = [1, 2], got [1, 4]"),
    ("reg_max", lambda a: a, {"reg_max": 0}, ValueError, ">= 1"),
    ("reg_max", lambda a: a, {"reg_max": 129}, NotImplementedError, "<= 128"),
    ("reg_max", lambda a: a, {"reg_max": 1.0}, TypeError, "integer"),
    ("score_threshold", lambda a: a, {"score_threshold": float("nan")}, ValueError, "NaN"),
    ("nms_pre", lambda a: a, {"nms_pre": 10.5}, TypeError, "integer"),
    ("iou_threshold", lambda a: a, {"iou_threshold": None}, TypeError, "number"),
    ("max_detections", lambda a: a, {"max_detections": -1}, ValueError, ">= 0"),
    ("center_offset", lambda a: a, {"center_offset": [0.5]}, ValueError, "one number per level, 2, got 1"),
    ("center_offset", lambda a: a, {"center_offset": "0.5"}, TypeError, "number"),
    ("topk_mode", lambda a: a, {"topk_mode": "box"}, ValueError, "'pair', 'anchor', got 'box'"),
]


@pytest.mark.parametrize(
    ("argument", "change", "keywords", "error", "text"), BAD, ids=[f"{b[0]}-{b[4][:24]}" for b in BAD]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend: str, argument: str, change: Any, keywords: Any, error: type, text: str) -> None:
    args = change(list(flat([(2, 3), (1, 2)])))
    with gfl_ops.set_backend(backend), pytest.raises(error) as raised:
        gfl_ops.postprocess(*args, **{"reg_max": 1, **keywords})
    message = str(raised.value)
    assert message.startswith(f"gfl_ops.postprocess: `{argument}` ") and text in message, message


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_checked_when_asked(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = (*flat([(2, 3)])[:3], [(0, 10)])
    assert run(backend, "cpu", args).count.tolist() == [0]
    monkeypatch.setattr(checks, "SYNCHRONISING", True)
    with pytest.raises(ValueError, match="`image_sizes` must be positive and finite"):
        run(backend, "cpu", args)


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not there")
def test_a_direct_call_of_the_operator_is_checked() -> None:
    def call(**changes: Any) -> Any:
        cls, reg, strides, _ = flat([(2, 3)])
        values = {
            "cls_scores": cls,
            "reg_preds": reg,
            "strides": strides,
            "image_sizes": torch.ones((1, 2)),
            "scale_factors": None,
            "reg_max": 1,
            "score_threshold": 0.05,
            "nms_pre": 10,
            "iou_threshold": 0.6,
            "max_detections": 5,
            "center_offset": [0.0],
            "anchor_topk": False,
            "activated": False,
            "legacy": False,
        }
        return torch.ops.gfl.postprocess(**{**values, **changes})

    assert call()[4].tolist() == [[0, 0, -1, -1, -1]]
    for changes in (
        {"cls_scores": []},
        {"reg_max": 2},
        {"reg_max": 500},
        {"strides": []},
        {"image_sizes": torch.ones((2, 2))},
        {"image_sizes": torch.ones((1, 2)).double()},
        {"scale_factors": torch.ones((1,))},
        {"max_detections": -1},
        {"reg_preds": [torch.ones((1, 8, 2, 2))]},
        {"cls_scores": [torch.ones((1, 2, 2, 3)).int()]},
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError), match="gfl: `"):
            call(**changes)
