# SPDX-License-Identifier: Apache-2.0
"""Detection in the images of a folder or a bucket by Ray Data, on however many machines it has.

    pip install 'ray[data]' gfl-ops
    python ray_batch.py gfl_r50_1x s3://bucket/images s3://bucket/found

Each image becomes a line of JSON: its path, its detections, and an error if it can't be decoded.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import gfl


class Detect:
    """Keeps a detector between batches; Ray makes one per worker."""

    def __init__(self, model: str) -> None:
        self.detector = gfl.Detector(model, optimize=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        images = list(batch["bytes"])
        errors: dict[int, str] = {}
        found = iter(list(self.detector.stream(images, on_error=lambda one, why: errors.update({id(one): why}))))
        detections = [[] if id(one) in errors else next(found).to_dict()["detections"] for one in images]
        return {
            "path": list(batch["path"]),
            "detections": [json.dumps(one) for one in detections],
            "error": [errors.get(id(one), "") for one in images],
        }


def main(model: str, source: str, target: str) -> None:
    import ray

    gpus = int(torch.cuda.is_available())
    images = ray.data.read_binary_files(source, include_paths=True)
    found = images.map_batches(Detect, fn_constructor_args=(model,), batch_size=32, num_gpus=gpus, concurrency=(1, 64))
    found.write_json(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
