# SPDX-License-Identifier: Apache-2.0
"""The version, in the one place that setup, CMake and the package read."""

__version__ = "0.2.0"
