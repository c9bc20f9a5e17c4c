# SPDX-License-Identifier: Apache-2.0
"""The detector of Generalized Focal Loss, a thin layer over the operators of `gfl_ops`.

`create_model` and `Detector` are what most programs need; `Config` and `preset` describe a training, `train` and
`evaluate` run it. The command ``gfl`` does all of it from a shell.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from .config import PRESETS, Config, preset

if TYPE_CHECKING:
    from gfl_ops._version import __version__

    from .detector import Detector
    from .engine.evaluate import evaluate
    from .engine.train import train
    from .models import create_model
    from .result import Result

__all__ = ["PRESETS", "Config", "Detector", "Result", "__version__", "create_model", "evaluate", "preset", "train"]
# Imported when first used, so that `gfl --help` does not wait for torch.
_LAZY = {
    "__version__": "gfl_ops._version",
    "Detector": "gfl.detector",
    "Result": "gfl.result",
    "create_model": "gfl.models",
    "evaluate": "gfl.engine.evaluate",
    "train": "gfl.engine.train",
}

if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return getattr(importlib.import_module(_LAZY[name]), name)
        if importlib.util.find_spec(f"gfl.{name}") is None:
            raise AttributeError(f"module 'gfl' has no attribute {name!r}")
        return importlib.import_module(f"gfl.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
