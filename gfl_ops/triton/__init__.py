# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file an operator, imported at the first call."""
