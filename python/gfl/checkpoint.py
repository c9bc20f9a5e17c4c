# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: read without running code, written without losing the last one, loaded with every difference named."""

from __future__ import annotations

import importlib
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import models
from .config import Config
from .foreign import CLASS_KEYS, FORMAT, infer_model, normalise
from .foreign import Weights as Weights

# Objects that training frameworks store beside the weights, such as log histories: they become inert and are never
# imported. A file that asks for anything else is refused.
INERT_PACKAGES = {"mmengine", "mmcv", "mmdet", "numpy", "_codecs"}
INERT_BUILTINS = {"builtins.getattr"}  # how mmengine's log histories name their methods
# Buffers that a file need not have, since they hold no weights.
CONSTANT = ("num_batches_tracked", "bbox_head.integral.project")


class Loaded(NamedTuple):
    """A detector read from a file."""

    model: models.GFL  # in evaluation mode, on the CPU
    config: Config  # the whole configuration, with defaults where the file doesn't say
    classes: list[str] | None  # names in the order of the labels, if the file has them
    category_ids: list[int] | None  # of the annotation file that it was trained on, if the file has them


def meta(config: Config, classes: Sequence[str], category_ids: Sequence[int] | None = None) -> dict[str, Any]:
    """A checkpoint's metadata: format, configuration, class names and their category ids, by default 1 to C."""
    ids = range(1, len(classes) + 1) if category_ids is None else category_ids
    return {"format": FORMAT, "config": config.to_dict(), "classes": list(classes), "category_ids": list(ids)}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a checkpoint file, on the CPU, as they are; `normalise` makes sense of them.

    Only data is read: a file that asks for a function or class beyond tensors and plain containers is refused, except
    for the few that training frameworks store beside the weights, which become inert objects.

    Raises:
        OSError: no such file, or it can't be read.
        ValueError: truncated, not a checkpoint, or one that would run code. Names the file.
        RuntimeError: a safetensors file where that package is not installed.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    path.open("rb").close()  # raises the OSError of a file that is not there or not readable
    with torch.serialization.safe_globals(_inert(path)):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            asked = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if asked is not None:
                raise ValueError(
                    f"{path}: refused, since it asks for {asked[1]}, which is not data: to load it would run code"
                ) from None
            # An unpickler's text is left out: it advises to load the file unsafely.
            text = "" if isinstance(error, pickle.UnpicklingError) else str(error).split("\n")[0].split(". ")[0]
            reason = text or "its bytes are not a pickle of tensors"
            raise ValueError(f"{path}: truncated, or not a checkpoint ({reason})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: not a checkpoint: it holds a {type(content).__name__}, not a dictionary")
    return dict(content)


class _Inert:
    """Stands for an object that is not needed; accepts whatever its pickle passes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _inert(path: Path) -> list[Any]:
    """A class without behaviour for each object of `INERT_PACKAGES` that the file asks for."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a file of this kind: `torch.load` says what is wrong
        return []
    inert = [name for name in names if name.split(".")[0] in INERT_PACKAGES or name in INERT_BUILTINS]
    return [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in inert]


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        package = importlib.import_module("safetensors")
        load_file = importlib.import_module("safetensors.torch").load_file
    except ImportError as error:
        raise RuntimeError(f"{path}: safetensors files need that package: pip install safetensors") from error
    try:
        return dict(load_file(path))
    except package.SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from None


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that at every moment the file is the whole old one or the whole new one.

    It is written to a file beside it, flushed to the disk and renamed.

    Raises:
        OSError: it can't be written, for want of space or otherwise; the previous file is unchanged.
    """
    path = Path(path)
    # Always the same name: what a killed process left is overwritten by the next.
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause: BaseException | None = error
        # After a failed write torch raises another error, of a position that it didn't expect.
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        kept = "; the one written before it is kept" if path.exists() else ""
        raise OSError(cause.errno, f"checkpoint not written ({cause.strerror}){kept}", str(path)) from None
    with suppress(OSError):  # The renaming itself; not every file system can.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], *, allow_new_head: bool = False) -> list[str]:
    """Copy weights into a model, all of them or none.

    Counters of batch norms and the head's constant bins may be missing. With `allow_new_head` the model keeps its class
    layer where the number of classes differs. Returns notes for the log, in lines.

    Raises:
        ValueError: keys that are missing, unexpected, or of another shape, every one named; the model is unchanged.
    """
    own = model.state_dict()
    differing = [k for k, v in state_dict.items() if k in own and _shape(v) != list(own[k].shape)]
    other_classes = any(key in differing for key in CLASS_KEYS)
    skipped = CLASS_KEYS if allow_new_head and other_classes else ()
    problems = [f"missing: {k}" for k in own if k not in state_dict and not k.endswith(CONSTANT)]
    problems += [f"unexpected: {k}" for k in state_dict if k not in own]
    for k in (k for k in differing if k not in skipped):
        problems.append(f"shape: {k} is {_shape(state_dict[k])} in the file, {list(own[k].shape)} in the model")
    if problems:
        if other_classes and not skipped:
            problems.append("the numbers of classes differ; a training can start from it with a new last layer (init)")
        raise ValueError("the weights are not this model's:\n  " + "\n  ".join(problems))
    model.load_state_dict({k: v for k, v in state_dict.items() if k not in skipped}, strict=False)
    if not skipped:
        return []
    there, here = len(state_dict[CLASS_KEYS[0]]), len(own[CLASS_KEYS[0]])
    return [f"the weights are for {there} classes, the model has {here}: its last class layer stays as it was"]


def _shape(value: object) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def model_from(source: str | os.PathLike[str] | Mapping[str, Any]) -> Loaded:
    """The detector that a checkpoint holds.

    `source` is a file, or its contents. This package's files name their model; in another system's (`normalise` lists
    them) it is read off keys and shapes.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not a checkpoint, or not of a detector of this package. Names the file.
        RuntimeError: it needs a package that is not installed.
    """
    content, place = (source, "") if isinstance(source, Mapping) else (read(source), f"{os.fspath(source)}: ")
    try:
        weights = normalise(content)
        config = weights.config or Config(model=infer_model(weights))
        model = models.build(config.model, config.test)
        load_weights(model, weights.state_dict)
    except ValueError as error:
        raise ValueError(f"{place}{error}") from None
    return Loaded(model.eval(), config, weights.classes, weights.category_ids)
