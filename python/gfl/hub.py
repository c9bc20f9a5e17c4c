# SPDX-License-Identifier: Apache-2.0
"""Detectors on the Hugging Face Hub: a folder with model.safetensors, config.json and a card."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from torch import nn

from .detector import Detector

try:
    hub: Any = importlib.import_module("huggingface_hub")
except ImportError as error:
    raise RuntimeError("the Hugging Face Hub needs huggingface_hub: pip install 'gfl-ops[hub]'") from error

Mixin: Any = hub.PyTorchModelHubMixin
WEIGHTS, CONFIG = "model.safetensors", "config.json"
TAGS = ["object-detection", "generalized-focal-loss"]


class HubDetector(nn.Module, Mixin, library_name="gfl-ops", tags=TAGS, pipeline_tag=TAGS[0]):  # type: ignore[call-arg]
    """A `gfl.Detector` with the mixin's `save_pretrained`, `push_to_hub` and `from_pretrained`.

    The weights' file says configuration and classes itself; config.json repeats the configuration for people.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def _save_pretrained(self, save_directory: Path) -> None:
        self.detector.save(save_directory / WEIGHTS)
        config = self.detector.config
        config.model, config.test = self.detector.model.config, self.detector.model.test
        config.save(save_directory / CONFIG)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **options: Any,
    ) -> HubDetector:
        folder, known = Path(model_id), inspect.signature(Detector).parameters
        path = folder / WEIGHTS
        if not folder.is_dir():
            how: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download}
            path = Path(hub.hf_hub_download(model_id, WEIGHTS, token=token, local_files_only=local_files_only, **how))
        return cls(Detector(path, **{name: value for name, value in options.items() if name in known}))
