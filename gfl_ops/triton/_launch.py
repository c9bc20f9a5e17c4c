# SPDX-License-Identifier: Apache-2.0
"""The former name of `launch`, for the modules that still import it."""

import sys

from . import launch

sys.modules[__name__] = launch
