# SPDX-License-Identifier: Apache-2.0
"""For a config of mmdet: ``custom_imports = dict(imports=["gfl_ops.compat.mmdet_patch"])`` patches it at import."""

from .mmdet import patch

patch()
