# SPDX-License-Identifier: Apache-2.0
"""``gfl export``: a trained detector as a file that runs without this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import files
from . import DTYPES, add_config, given_config, parse_size

HELP = "export a trained detector to ONNX, torch.export or AOTInductor"
# Of the formats' files.
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "aotinductor": ".pt2"}
EPILOG = """\
The input `images` is fp32 [B, 3, H, W]: RGB, resized without antialiasing,
minus the mean (123.675, 116.28, 103.53), divided by the standard deviation
(58.395, 57.12, 57.375), zero-padded right and below; or as the checkpoint's
configuration says (NanoDet-Plus: BGR, stretched). An ONNX file has it in its
metadata. Outputs, in input pixels:

  maps        class logits cls_scores0.. [B, C, h, w] and distribution logits
              reg_preds0.. [B, 4(R+1), h, w]
  decoded     boxes [B, A, 4] xyxy and scores [B, A, C], probabilities, of all
              locations
  detections  ONNX: boxes [n, 4], scores [n], labels [n] of one image after
              NonMaxSuppression; of larger batches [B, K, 4], [B, K], [B, K],
              label -1 in unused slots; else the candidates before NMS, of
              the same shapes

With --input uint8 the inputs are `pixels`, RGB as image libraries give them,
and `sizes`, each image's (height, width) without its padding; nothing is left
to normalise: examples/onnx_detect.py.

The integral's softmax and matmul are fp32 in every file. An ONNX file lists
all nodes from there on under its metadata key `integral_nodes`: give these to
onnxruntime's quantize_static as nodes_to_exclude. `detections` vary in number,
which only its MinMax calibration takes; others need `decoded`.

  gfl export best.pt --out detector.onnx --size 800x1344
  gfl export best.pt --out detector.pt2 --format torch-export \\
    --outputs decoded --batch any
  gfl export best.pt --out detector.pt2 --format aotinductor --device cuda \\
    --dtype fp16"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "gfl export CHECKPOINT --out FILE [option …]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="trained model: this package's, mmdet's or GFocal's")
    add_config(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.add_argument("--format", choices=SUFFIXES, default="onnx", help="file format [%(default)s]")
    parser.add_argument("--size", metavar="HxW", help="input size, multiples of 32 [the model's test size]")
    parser.add_argument("--batch", default="1", metavar="N|any", help="images per call [%(default)s]")
    outputs = ("maps", "decoded", "detections")
    parser.add_argument("--outputs", choices=outputs, help="see below [detections; decoded for larger batches]")
    inputs = "fp32: normalised images; uint8: pixels [B, H, W, 3] and sizes [B, 2], ONNX only"
    parser.add_argument("--input", choices=("fp32", "uint8"), default="fp32", help=f"{inputs} [%(default)s]")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="network precision [%(default)s]")
    parser.add_argument("--device", default="cpu", help="device of a torch program: cpu, cuda, … [%(default)s]")


def run(options: argparse.Namespace) -> int:
    import torch

    from ..detector import Detector

    suffix = SUFFIXES[options.format]
    if options.out.suffix.lower() != suffix:
        others = ", ".join(f"{name} for {own}" for name, own in SUFFIXES.items())
        raise ValueError(f"`--out` must end in {suffix} for --format {options.format}, got {options.out} ({others})")
    if options.input == "uint8" and options.format != "onnx":
        raise ValueError("`--input` uint8 is for --format onnx")
    if options.out.exists() and not options.overwrite:
        raise ValueError(f"{options.out} is there already: choose another name, or add --overwrite")
    files.check_output(options.out, "--out", [options.checkpoint, options.config], suffix)
    batch = None if options.batch == "any" else int(options.batch) if options.batch.isdigit() else 0
    if batch is not None and batch < 1:
        raise ValueError(f"`--batch` must be a number of images or any, got {options.batch!r}")
    device = "cpu" if options.format == "onnx" else options.device
    dtype = getattr(torch, DTYPES[options.dtype])
    detector = Detector(options.checkpoint, device, dtype, config=given_config(options))
    size = parse_size(options.size, "--size") if options.size else None
    how = {"format": options.format, "size": size, "batch": batch, "outputs": options.outputs, "input": options.input}
    (height, width), outputs = detector.export(options.out, **how)
    shape = f"[{'B' if batch is None else batch}, 3, {height}, {width}]"
    files.say(f"images {shape} -> {outputs}; {options.out.stat().st_size / 1e6:.1f} MB")
    return 0
