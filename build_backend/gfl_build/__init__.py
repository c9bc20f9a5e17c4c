# SPDX-License-Identifier: Apache-2.0
"""The in-tree build backend: setuptools', which also finds the torch that the extension is to be used with.

Build isolation hides the target environment's packages, and an extension built against another torch does not load.
pip runs the backend with the target's interpreter, so its site-packages can still be found; torch becomes a build
requirement only where it is not there. `torch_info.find_torch` says where it is looked for.
"""

from __future__ import annotations

from typing import Any

from setuptools import build_meta as _setuptools
from setuptools.build_meta import (  # noqa: F401  hooks that need nothing of torch
    build_sdist,
    get_requires_for_build_sdist,
)

from .plan import build_requirements

Config = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Config = None) -> list[str]:
    return [*_setuptools.get_requires_for_build_wheel(config_settings), *build_requirements()]


def get_requires_for_build_editable(config_settings: Config = None) -> list[str]:
    return [*_setuptools.get_requires_for_build_editable(config_settings), *build_requirements()]


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Config = None) -> str:
    return _setuptools.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Config = None) -> str:
    return _setuptools.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Config = None, metadata_directory: str | None = None) -> str:
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)
