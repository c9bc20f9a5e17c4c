# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end: data, training, evaluation, pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import files
from ..config import Config, preset
from ..data.loader import validation_dataset
from ..detector import Detector
from ..engine.folder import BEST, CONFIG
from ..engine.train import train
from ..files import replacing, say
from . import ITERATIONS, pictures
from .scenes import write_dataset

BATCH, EPOCHS, SIZE = 8, 8, 160
# What a demo that was interrupted needs to go on.
STATE = "demo.json"
PICTURES = ("detections.jpg", "distributions.jpg")
# A batch of small images does not occupy more.
MOST_THREADS = 8


def configuration(data: Path, seed: int, amp: str) -> Config:
    """`gfl_tiny` on the drawn data, changed only where training from scratch in minutes needs it."""
    return preset("gfl_tiny").replace(
        data=str(data),
        train_annotations="annotations/train.json",
        train_images="train",
        val_annotations="annotations/val.json",
        val_images="val",
        workers=1,
        **dict.fromkeys(("short_side", "long_side", "train_long_side"), SIZE),
        train_short_side=(SIZE, SIZE),
        # In the same time, more steps of a small network learn more than fewer of a larger one.
        width=16,
        head_convs=1,
        # Objects reach to half of the image, so levels of larger strides would have nothing to learn.
        strides=(8, 16, 32),
        anchor_scale=6.0,
        # Many small steps: there are few images, and no pretrained backbone to spoil.
        batch_size=BATCH,
        epochs=EPOCHS,
        optimizer="adamw",
        lr=0.01,
        weight_decay=0.05,
        schedule="cosine",
        warmup_steps=100,
        eval_every=0,
        amp=amp,
        seed=seed,
    )


def run_demo(out: str | Path, *, seed: int = 0, iterations: int = ITERATIONS, device: str = "cpu") -> dict[str, float]:
    """Draws scenes, trains on them from scratch, evaluates on others, writes two pictures, and prints what it does.

    `out`, a new folder or one in which the same demo was interrupted, gets ``data/``, ``training/`` (as `gfl train`
    leaves it), ``detections.jpg`` and ``distributions.jpg``. The seed is that of the scenes, the initial weights and
    the order of images. There are as many scenes as iterations, steps of 8 images, so each is seen eight times. Returns
    the metrics on the held-out scenes. It is a ValueError if `iterations` is below 1, or `out` holds another demo or a
    finished one.
    """
    if iterations < 1:
        raise ValueError(f"gfl demo: `iterations` must be at least 1, got {iterations}")
    out = Path(out)
    state = _begin(out, {"seed": seed, "iterations": iterations})
    started = time.perf_counter()
    amp = "bf16" if device != "cpu" or computes_bf16() else "none"
    torch.set_num_threads(min(torch.get_num_threads(), MOST_THREADS))
    held_out = max(8, min(300, iterations // 8))
    if not state["drawn"]:
        say(f"drawing {iterations} scenes to train on and {held_out} held-out ones")
        write_dataset(out / "data", train=iterations, val=held_out, size=SIZE, seed=seed)
        files.write_json(out / STATE, state := state | {"drawn": True})
    drawn = time.perf_counter()
    config = configuration(out / "data", seed, amp)
    threads = torch.get_num_threads()
    machine = f"{threads} CPU thread{'s' * (threads > 1)}" if device == "cpu" else device
    machine += f", {'fp32' if amp == 'none' else amp}"
    say(f"training gfl_tiny from scratch: {iterations} steps of {BATCH} images on {machine}")
    begun = (out / "training" / CONFIG).exists()
    metrics = train(config, out / "training", device=device, resume=begun)
    trained = time.perf_counter()

    best = out / "training" / BEST
    detector = Detector(best, device)
    scenes = validation_dataset(config)
    draw: tuple[Any, ...] = (pictures.detections, pictures.distributions)
    made: dict[str, Image.Image | None] = {name: one(detector, scenes) for name, one in zip(PICTURES, draw)}
    figures = "  ".join(f"{what} {metrics[name]:.3f}" for name, what in _SHOWN.items())
    say(f"\n  {held_out} held-out scenes  {figures}")
    say(f"  {'time':<20}drawing {drawn - started:.0f} s, training and evaluation {trained - drawn:.0f} s")
    for name, picture in made.items():
        if picture is None:
            say(f"  {name:<20}none: no detection is confident enough; train for longer")
        else:
            with replacing(out / name) as part:
                picture.save(part, quality=80)
            say(f"  {name:<20}{out / name}")
    files.write_json(out / STATE, state | {"finished": True})
    say(f"  {'detector':<20}{best}\n\nTry it:")
    say(f"  gfl detect {best} {out / 'data' / 'val'} --out {out / 'found'}")
    return metrics


def _begin(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Where the demo in a folder stands; a ValueError if another one, or other files, are in it."""
    new = settings | {"drawn": False, "finished": False}
    if (out / STATE).exists():
        state = json.loads(files.read_bytes(out / STATE))
        if not state["finished"] and all(state[name] == value for name, value in settings.items()):
            say(f"going on with the demo in {out}")
            return state
    made_before = [name for name in (STATE, "data", "training", *PICTURES) if (out / name).exists()]
    if made_before:
        raise ValueError(f"{out} holds a demo, or other files ({made_before[0]}): choose another folder for this one")
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / STATE, new)
    return new


# Below 32 pixels square is small in COCO's terms.
_SHOWN = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "APs": "small", "APm": "medium"}


def computes_bf16() -> bool:
    """Whether this CPU has bf16 instructions (AVX512-BF16 or AMX); where bf16 is emulated, fp32 is faster."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)
