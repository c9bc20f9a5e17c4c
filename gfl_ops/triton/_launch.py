# SPDX-License-Identifier: Apache-2.0
"""The former name of `launch`, for the modules that still import it."""

from .launch import *  # noqa: F403
