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
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import models
from .config import Config
from .foreign import FORMAT, Weights, infer_model, normalise

__all__ = [
    "FORMAT",
    "Loaded",
    "Weights",
    "infer_model",
    "load_weights",
    "meta",
    "model_from",
    "normalise",
    "read",
    "write",
]

# What training frameworks leave beside the weights and nobody here reads: log histories, numpy's numbers. Replaced by
# something inert, never imported; whatever else a file asks for is refused.
INERT_PACKAGES = {"mmengine", "mmcv", "mmdet", "numpy", "_codecs"}
# mmengine's log histories name their methods by it.
INERT_BUILTINS = {"builtins.getattr"}
# Do not have to be in a file: they hold no weights.
CONSTANT = ("num_batches_tracked", "bbox_head.integral.project")
# The only weights whose shape depends on the number of classes.
CLASS_KEYS = ("bbox_head.gfl_cls.weight", "bbox_head.gfl_cls.bias")


class Loaded(NamedTuple):
    """A detector out of a file.

    Attributes:
        model: in evaluation mode, on the CPU.
        config: the whole configuration, with defaults where the file doesn't say.
        classes: names in the order of the labels, if the file has them.
        category_ids: of the annotation file that it was trained on, in that order, if the file has them.
    """

    model: models.GFL
    config: Config
    classes: list[str] | None
    category_ids: list[int] | None


def meta(config: Config, classes: Sequence[str], category_ids: Sequence[int] | None = None) -> dict[str, Any]:
    """What a checkpoint says of itself: its format, the whole configuration, and its classes; ids are 1 to C if not
    given."""
    ids = range(1, len(classes) + 1) if category_ids is None else category_ids
    return {"format": FORMAT, "config": config.to_dict(), "classes": list(classes), "category_ids": list(ids)}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a checkpoint file, on the CPU, as they are; `normalise` makes sense of them.

    Only data is read: a file that asks for a function or class beyond tensors and plain containers is refused, but for
    the few that training frameworks store beside the weights, which become inert objects. Files of safetensors are read
    by that package.

    Raises:
        OSError: no such file, or it can't be read.
        ValueError: truncated, not a checkpoint, or one that would run code. Names the file.
        RuntimeError: a safetensors file where that package is not installed.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with path.open("rb"):
        pass  # An OSError for what is not there or not readable, before others read it.
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
            # Of an unpickler's text, nothing: it advises to load the file unsafely.
            text = "" if isinstance(error, pickle.UnpicklingError) else str(error).split("\n")[0].split(". ")[0]
            reason = text or "its bytes are not a pickle of tensors"
            raise ValueError(f"{path}: truncated, or not a checkpoint ({reason})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: not a checkpoint: it holds a {type(content).__name__}, not a dictionary")
    return dict(content)


class _Inert:
    """Stands for an object that is not wanted; takes whatever its pickle gives it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _inert(path: Path) -> list[Any]:
    """A class without behaviour for each name that the file asks for out of `INERT_PACKAGES`."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # Not a file of this kind: loading it says what it is.
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


class _Recorder:
    """A file that remembers why writing failed: torch tells of a position that it didn't expect instead."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that at every moment the file is the whole old one or the whole new one.

    It is written beside its place, brought to the disk, and then put there by one renaming.

    Raises:
        OSError: it can't be written, for want of space or otherwise; the file that was there is as it was.
    """
    path = Path(path)
    # Always the same name: what a killed process left is overwritten by the next.
    temporary = path.with_name(f".{path.name}.part")
    recorder = None
    try:
        with temporary.open("wb") as file:
            recorder = _Recorder(file)
            torch.save(dict(content), cast("BinaryIO", recorder))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = recorder.error if recorder is not None and recorder.error is not None else error
        if not isinstance(cause, OSError):
            raise  # Not the disk's fault.
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

    Args:
        model: any module; a `gfl.models.GFL` mostly.
        state_dict: weights by key. Types are converted. Counters of batch norms and the head's constant bins may be
            missing.
        allow_new_head: a last class layer of another number of classes is left as the model has it.

    Returns:
        What is worth saying of it, in lines.

    Raises:
        ValueError: keys that are missing, unexpected, or of another shape, every one named; the model is unchanged.
    """
    own = model.state_dict()
    differing = [k for k, v in state_dict.items() if k in own and _shape(v) != list(own[k].shape)]
    new_head = allow_new_head and any(key in differing for key in CLASS_KEYS)
    skipped = set(CLASS_KEYS) if new_head else set()
    problems = [f"missing: {k}" for k in own if k not in state_dict and not k.endswith(CONSTANT)]
    problems += [f"unexpected: {k}" for k in state_dict if k not in own]
    problems += [
        f"shape: {k} is {_shape(state_dict[k])} in the file, {list(own[k].shape)} in the model"
        for k in differing
        if k not in skipped
    ]
    if problems:
        if any(key in differing for key in CLASS_KEYS) and not new_head:
            problems.append("the numbers of classes differ; a training can start from it with a new last layer (init)")
        raise ValueError("the weights are not this model's:\n  " + "\n  ".join(problems))
    model.load_state_dict({k: v for k, v in state_dict.items() if k not in skipped}, strict=False)
    if not new_head:
        return []
    there, here = len(state_dict[CLASS_KEYS[0]]), len(own[CLASS_KEYS[0]])
    return [f"the weights are for {there} classes, the model has {here}: its last class layer stays as it was"]


def _shape(value: object) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def model_from(source: str | os.PathLike[str] | Mapping[str, Any]) -> Loaded:
    """The detector that a checkpoint holds.

    Args:
        source: a file, or its contents. One of our own says what model it is; of another system's (`normalise` lists
            them) that is read off its keys and shapes.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not a checkpoint, or not of a detector that there is here. Names the file.
        RuntimeError: it needs a package that is not installed.
    """
    if isinstance(source, Mapping):
        return _model_from(source)
    content = read(source)
    try:
        return _model_from(content)
    except ValueError as error:
        raise ValueError(f"{os.fspath(source)}: {error}") from None


def _model_from(content: Mapping[str, Any]) -> Loaded:
    weights = normalise(content)
    config = weights.config
    if config is None:
        config = Config(model=infer_model(weights))
    model = models.build(config.model, config.test)
    load_weights(model, weights.state_dict)
    return Loaded(model.eval(), config, weights.classes, weights.category_ids)
