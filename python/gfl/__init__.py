# SPDX-License-Identifier: Apache-2.0
"""The detector of Generalized Focal Loss, a thin layer over the operators of `gfl_ops`."""
