# SPDX-License-Identifier: Apache-2.0
"""``gfl export``: a trained detector as a file that runs without this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._size import parse_size

HELP = "write a trained detector as ONNX or as a program of torch.export or AOTInductor"
FORMATS = ("onnx", "torch-export", "aotinductor")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
The input `images` is fp32 [B, 3, H, W]: RGB resized without antialiasing, less the mean 123.675, 116.28, 103.53, over
the deviation 58.395, 57.12, 57.375, zero in the padding right and below. Outputs, in pixels of the input:

  maps        class logits cls_scores0.. [B, C, h, w] and distribution logits reg_preds0.. [B, 4(R+1), h, w]
  decoded     boxes [B, A, 4] xyxy and scores [B, A, C], probabilities, of all locations
  detections  ONNX: boxes [n, 4], scores [n], labels [n] after NonMaxSuppression, of one image; in the other formats the
              candidates before NMS, boxes [B, K, 4], scores and labels [B, K]

Softmax and matmul of the integral are fp32 in every file. An ONNX file names them under its metadata key
`integral_nodes`: give these to a quantiser as nodes to leave alone.

  gfl export best.pt --out detector.onnx --size 800x1344
  gfl export best.pt --out detector.pt2 --format torch-export --outputs decoded --batch any
  gfl export best.pt --out detector.pt2 --format aotinductor --device cuda --dtype fp16"""
    parser.add_argument("checkpoint", help="file of a trained model: this package's, mmdet's or GFocal's")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="of the file [%(default)s]")
    parser.add_argument("--size", metavar="HxW", help="of the input, multiples of 32 [the model's test size]")
    parser.add_argument("--batch", default="1", metavar="N|any", help="images at a time [%(default)s]")
    parser.add_argument(
        "--outputs", choices=("maps", "decoded", "detections"), default=None, help="[detections; batches: decoded]"
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the network [%(default)s]")
    parser.add_argument("--device", default="cpu", help="that a program of torch runs on [%(default)s]")


def run(options: argparse.Namespace) -> int:
    import torch

    from ..checkpoint import model_from
    from ..engine import export
    from ..engine.distributed import choose_device

    if not options.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{options.out.parent}, the folder of {options.out}, is not there")
    batch = None if options.batch == "any" else int(options.batch) if options.batch.isdigit() else 0
    if batch is not None and batch < 1:
        raise ValueError(f"`--batch` must be a number of images or any, got {options.batch!r}")
    model, config, classes, _ = model_from(options.checkpoint)
    test = config.test
    size = parse_size(options.size, "--size") if options.size else _padded(test.short_side, test.long_side)
    outputs = options.outputs or (export.DETECTIONS if batch == 1 else export.DECODED)
    dtype = torch.float16 if options.dtype == "fp16" else torch.float32
    if options.format == "onnx":
        export.to_onnx(model, options.out, size, batch=batch, outputs=outputs, dtype=dtype, classes=classes)
    else:
        export.to_torch(
            model,
            options.out,
            size,
            batch=batch,
            outputs=outputs,
            dtype=dtype,
            compiled=options.format == "aotinductor",
            device=choose_device(options.device),
        )
    many = "B" if batch is None else batch
    print(f"images [{many}, 3, {size[0]}, {size[1]}] -> {outputs}; {options.out.stat().st_size / 1e6:.1f} MB")
    return 0


def _padded(short: int, long: int) -> tuple[int, int]:
    return -(-short // 32) * 32, -(-long // 32) * 32
