# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: read without running code, written without losing the last one, loaded with every difference named."""

from __future__ import annotations

import errno
import hashlib
import importlib
import io
import json
import os
import pickle
import pickletools
import re
import threading
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from . import files, models, zoo
from .config import Config
from .foreign import CLASS_KEYS, FORMAT, check_start, configuration, normalise
from .foreign import Weights as Weights
from .foreign import infer_model as infer_model
from .models.auxiliary import without_auxiliary

# Objects that training frameworks store beside the weights, such as log histories: they become inert and are never
# imported. A file that asks for anything else is refused.
INERT_PACKAGES = {
    *("mmengine", "mmcv", "mmdet", "numpy", "_codecs", "argparse", "pathlib", "datetime", "omegaconf", "addict"),
    *("yacs", "easydict", "ml_collections", "pytorch_lightning", "lightning", "lightning_fabric"),
}
INERT_NAMES = {
    "builtins.getattr",  # how mmengine's log histories name their methods
    *("types.SimpleNamespace", "collections.defaultdict", "collections.deque", "torch.torch_version.TorchVersion"),
}
# torch has one list of the classes that may be read, for all threads.
_READING = threading.Lock()
# Buffers that a file need not have, since they hold no weights.
CONSTANT = ("num_batches_tracked", "bbox_head.integral.project")
# The end of a zip archive without a comment; `write` adds the digest of all before as its comment.
ARCHIVE_END, END_SIZE = b"PK\5\6", 22
SEAL = b"sha256:"
SEAL_SIZE = 2 + len(SEAL) + 64
# The key of a safetensors file's metadata that holds `meta`.
SAFETENSORS_KEY = "gfl_ops"


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

    `path` may be the name of published weights (`gfl.zoo`), which are downloaded the first time.

    Only data is read: a file that asks for a function or class beyond tensors and plain containers is refused, except
    for the few that training frameworks store beside the weights, which become inert objects. What a file says of
    itself is checked: the digest that `write` adds, and the checksums of an archive. Threads may read at once.

    Raises:
        OSError: no such file, or it can't be read or downloaded.
        ValueError: truncated, damaged, not a checkpoint, or one that would run code. Names the file.
        RuntimeError: a safetensors file where that package is not installed.
    """
    path = zoo.locate(path)
    files.open_regular(path).close()  # raises the OSError of a file that is not there or not readable
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        _verify(path)
        inert = _inert(path)
        with _READING if inert else nullcontext(), torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except _Damaged as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    except Exception as error:
        # Of a place in the file that its damaged directory names; others are the disk's.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        asked = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if asked is not None:
            raise ValueError(
                f"{path}: refused, since it asks for {asked[1]}, which is not data: to load it would run code; of a "
                "model, save its `state_dict()`"
            ) from None
        # An unpickler's text is left out: it advises to load the file unsafely.
        text = "" if isinstance(error, pickle.UnpicklingError) else str(error).split("\n")[0].split(". ")[0]
        reason = text or "its bytes are not a pickle of tensors"
        raise ValueError(f"{path}: truncated, or not a checkpoint ({reason})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: not a checkpoint: it holds a {type(content).__name__}, not a dictionary")
    return content if isinstance(content, dict) else dict(content)


class _Damaged(ValueError):
    """A file that is not what was written."""


def _verify(path: Path) -> None:
    """Compares a file with its own digest or checksums; `_Damaged` where they differ, nothing where it has none."""
    with files.open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        tail_start = file.seek(max(0, size - SEAL_SIZE - END_SIZE))
        tail = file.read()
        end = tail.rfind(ARCHIVE_END)
        # A plain archive ends with a comment of no length; any other is `write`'s, or what is left of it.
        if end >= 0 and (comment := tail[end + END_SIZE - 2 :]) != bytes(2):
            if comment != _seal(file, tail_start + end + END_SIZE - 2):
                raise _Damaged("its bytes are not those that were written")
            return
        if not zipfile.is_zipfile(file):  # torch's older format has no checksums
            return
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            claimed = sum(record.file_size for record in records)
            if claimed > size:
                raise _Damaged(f"its records claim {claimed} bytes, the file has {size}")
            wrong = [record.filename for record in records if not _intact(archive, record)]
            # torch can be told to write no checksums: then all are wrong.
            if wrong and len(wrong) < len(records):
                raise _Damaged(f"the checksum of its record {wrong[0]} is wrong")


def _intact(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(record) as content:
            while content.read(1 << 22):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def _seal(file: BinaryIO, size: int) -> bytes:
    """The end of an archive of `size` bytes before it: the length of its comment, which is their digest."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(size, 1 << 22))):
        digest.update(block)
        size -= len(block)
    comment = SEAL + digest.hexdigest().encode()
    return len(comment).to_bytes(2, "little") + comment


class _Inert:
    """Stands for an object that is not needed; accepts whatever its pickle passes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _inert(path: Path) -> list[Any]:
    """A class without behaviour for each object of `INERT_PACKAGES` that the file asks for."""
    try:
        names = _globals(path)
    except Exception:  # not a pickle: `torch.load` says what is wrong
        return []
    inert = sorted(name for name in names if name.split(".")[0] in INERT_PACKAGES or name in INERT_NAMES)
    return [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in inert]


def _globals(path: Path) -> set[str]:
    """The functions and classes that a checkpoint asks for, in both of torch's formats; nothing is loaded."""
    with files.open_regular(path) as file:
        pickles: list[BinaryIO] = [file] * 4  # of the older format: magic number, version, system, content
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                pickles = [io.BytesIO(archive.read(name))]
        pickles[0].seek(0)
        operations = (found for one in pickles for found in pickletools.genops(one))
        asked = (str(argument).split(" ") for code, argument, _ in operations if code.name == "GLOBAL")
        # torch writes Python 2's names of modules, such as `__builtin__`.
        return {f"{IMPORT_MAPPING.get(module, module)}.{name}" for module, name in asked}


def _read_safetensors(path: Path) -> dict[str, Any]:
    package = _safetensors(path)
    try:
        with package.safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get(SAFETENSORS_KEY)
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
        return weights if stated is None else {"meta": json.loads(stated), "state_dict": weights}
    except (package.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from None


def _safetensors(path: Path) -> Any:
    try:
        importlib.import_module("safetensors.torch")
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise RuntimeError(f"{path}: safetensors files need that package: pip install safetensors") from error


def write(path: str | os.PathLike[str], content: Mapping[str, Any], keep: str | os.PathLike[str] | None = None) -> None:
    """Write a checkpoint so that at every moment the file is the whole old one or the whole new one.

    It is written to a file beside it, flushed to the disk and renamed; the old one is kept under the name `keep`. A
    .safetensors file gets the weights and `meta`.

    Raises:
        OSError: it can't be written, for want of space or otherwise; the previous file is unchanged.
        RuntimeError: a safetensors file where that package is not installed.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            metadata = {"format": "pt", SAFETENSORS_KEY: json.dumps(content["meta"])}
            weights = {key: value.contiguous() for key, value in content["state_dict"].items()}
            files.write(path, _safetensors(path).torch.save(weights, metadata))
            return
        with files.replacing(path, keep) as part, part.open("w+b") as file:
            torch.save(dict(content), file)
            end = file.seek(0, os.SEEK_END) - 2
            seal = _seal(file, end)
            file.seek(end)
            file.write(seal)
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        # After a failed write torch raises another error, of a position that it didn't expect.
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        kept = "; the one written before it is kept" if path.exists() else ""
        raise OSError(cause.errno, f"checkpoint not written ({cause.strerror}){kept}", str(path)) from None


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], *, allow_new_head: bool = False) -> list[str]:
    """Copy weights into a model, all of them or none.

    Counters of batch norms and the head's constant bins may be missing. With `allow_new_head` the model keeps its class
    outputs where the number of classes differs. Returns notes for the log, in lines.

    Raises:
        ValueError: keys that are missing, unexpected, or of another shape, every one named; the model is unchanged.
    """
    fresh = _compare(model, state_dict, allow_new_head)
    if not fresh:
        model.load_state_dict(state_dict, strict=False)
        return []
    own = model.state_dict()
    here = int(getattr(model, "config").num_classes)  # noqa: B009  # of an `nn.Module`
    # After the classes a layer may have other outputs, whose number is the same for any classes.
    merged = {k: torch.cat([own[k][:here], state_dict[k][len(state_dict[k]) - len(own[k]) + here :]]) for k in fresh}
    there = here + len(state_dict[fresh[0]]) - len(own[fresh[0]])
    model.load_state_dict({**state_dict, **merged}, strict=False)
    layers = ", ".join(dict.fromkeys(key.rpartition(".")[0] for key in fresh))
    counts = f"the weights are for {there} classes, the model has {here}"
    return [f"{counts}: new are the class outputs of {layers}, all else is taken over"]


def _compare(model: nn.Module, state_dict: Mapping[str, Tensor], allow_new_head: bool = False) -> list[str]:
    """The keys whose class outputs a model keeps as they are; ValueError if the weights are not this model's."""
    own = model.state_dict()
    differing = [k for k, v in state_dict.items() if k in own and _shape(v) != list(own[k].shape)]
    other_classes = any(map(CLASS_KEYS.fullmatch, differing))
    classes = list(filter(CLASS_KEYS.fullmatch, own)) if allow_new_head and other_classes else []
    fresh = [k for k in classes if k in state_dict and _of_other_classes(state_dict[k], own[k], model)]
    problems = [f"missing: {k}" for k in own if k not in state_dict and not k.endswith(CONSTANT)]
    problems += [f"unexpected: {k}" for k in state_dict if k not in own]
    for k in (k for k in differing if k not in fresh):
        problems.append(f"shape: {k} is {_shape(state_dict[k])} in the file, {list(own[k].shape)} in the model")
    if problems:
        if other_classes and not allow_new_head:
            problems.append("the numbers of classes differ; a training can start from it with new class outputs (init)")
        raise ValueError("the weights are not this model's:\n  " + "\n  ".join(problems))
    return fresh


def _of_other_classes(value: object, own: Tensor, model: nn.Module) -> bool:
    """Whether a class layer's weight in a file differs from the model's in the number of classes alone."""
    others = len(own) - int(getattr(model, "config").num_classes)  # noqa: B009  # of an `nn.Module`
    return isinstance(value, Tensor) and value.shape[1:] == own.shape[1:] and value.ndim > 0 and len(value) > others


def _shape(value: object) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def model_from(
    source: str | os.PathLike[str] | Mapping[str, Any], config: Config | None = None, *, strict: bool = False
) -> Loaded:
    """The detector that a checkpoint holds.

    `source` is a file, the name of published weights, or a file's contents. This package's files say their
    configuration, and so does a state dict that one of its models gave. Of others (`normalise` lists them) the network
    is read off keys and shapes, and what these can't tell, such as the groups of the head's norms, off `config`.
    Without it the defaults are taken with a warning that names them, or with `strict` it is an error.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not a checkpoint, or not of a detector of this package; `config` is needed, or given for a
            file that has its own. Names the file.
        RuntimeError: it needs a package that is not installed.
    """
    published = zoo.find(source)
    if published is not None:
        if config is not None:
            raise ValueError(f"{published.preset} is published with its configuration: leave `config` out")
        config = published.config
    content, place = (source, "") if isinstance(source, Mapping) else (read(source), f"{os.fspath(source)}: ")
    try:
        weights = normalise(content)
        found, assumed = configuration(weights, config)
        if assumed and strict:
            raise ValueError(f"{assumed}; `config` must be given, a preset or a file (--config NAME|FILE)")
        if assumed:
            warnings.warn(f"{place}{assumed}: the defaults are taken; give `config`", stacklevel=2)
        if weights.classes is not None and weights.config and len(weights.classes) != found.model.num_classes:
            raise ValueError(f"it names {len(weights.classes)} classes, its network has {found.model.num_classes}")
        # Before memory is taken for what a file claims; some of timm's networks can't be built without.
        with suppress(RuntimeError), torch.device("meta"):
            _compare(models.build(found.model), weights.state_dict)
        model = models.build(found.model, found.test)
        load_weights(model, weights.state_dict)
    except ValueError as error:
        raise ValueError(f"{place}{error}") from None
    classes, ids = weights.classes, weights.category_ids
    if published is not None:
        classes = published.classes if classes is None else classes
        ids = published.category_ids if classes == published.classes else ids
    return Loaded(model.eval(), found, classes, ids)


def start(model: models.GFL, source: str | os.PathLike[str]) -> list[str]:
    """Gives a model the weights of a file or name; for other classes its class outputs stay. Returns notes in lines.

    An auxiliary head starts from the file's, if it has one. The errors are those of `model_from`, and a ValueError if
    the file says that it is of another network.
    """
    weights = normalise(read(source))
    own = model.state_dict()
    auxiliary = {key: own[key] for key in own.keys() - without_auxiliary(own).keys()}
    notes = []
    if auxiliary and auxiliary.keys() <= weights.auxiliary.keys():
        auxiliary = {key: weights.auxiliary[key] for key in auxiliary}
    elif auxiliary:
        notes.append("the weights have no auxiliary head: the model's is new")
    try:
        check_start(weights, model.config)
        return load_weights(model, {**weights.state_dict, **auxiliary}, allow_new_head=True) + notes
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
