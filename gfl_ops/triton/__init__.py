# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file an operator; imported at the first call of one of them. A leading underscore: shared parts.

Each operator's file has ``forward(*arguments of the schema)`` and, if differentiable, ``backward(*gradients,
*arguments, needs)``, which return what the operator's fake kernel says."""
