# SPDX-License-Identifier: Apache-2.0
"""The detector of Generalized Focal Loss, a thin layer over the operators of `gfl_ops`.

`create_model` and `Detector` are what most programs need; `Config` and `preset` say what is trained, `train` and
`evaluate` do it. The command ``gfl`` does all of it from a shell.
"""

from gfl_ops._version import __version__

from .config import PRESETS, Config, preset
from .detector import Detector, Result
from .engine.evaluate import evaluate
from .engine.train import train
from .models import create_model

__all__ = ["PRESETS", "Config", "Detector", "Result", "__version__", "create_model", "evaluate", "preset", "train"]
