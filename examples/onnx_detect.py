# SPDX-License-Identifier: Apache-2.0
"""Detections by ONNX Runtime alone: python examples/onnx_detect.py detector.onnx photo.jpg

The file comes from: gfl export best.pt --out detector.onnx --input uint8
Framework: ONNX Runtime
Replaces: torch and this package, where a detector is only run"""

import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(model: str, photo: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    _, height, width, _ = session.get_inputs()[0].shape
    names = session.get_modelmeta().custom_metadata_map.get("classes", "").split("\n")

    image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    scale = min(width / image.width, height / image.height)
    size = round(image.width * scale), round(image.height * scale)
    pixels = np.zeros((1, height, width, 3), np.uint8)
    # The weights were trained on images that were resized without antialiasing, which OpenCV's INTER_LINEAR is too.
    pixels[0, : size[1], : size[0]] = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    sizes = np.array([[size[1], size[0]]], np.int64)

    boxes, scores, labels = session.run(None, {"pixels": pixels, "sizes": sizes})
    for box, score, label in zip(boxes / scale, scores, labels):
        name = names[label] if label < len(names) else label
        print(f"{name} {score:.2f}", *(f"{side:.1f}" for side in box))


if __name__ == "__main__":
    main(*sys.argv[1:])
