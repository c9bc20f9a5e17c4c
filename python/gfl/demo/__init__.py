# SPDX-License-Identifier: Apache-2.0
"""A data set drawn from nothing, and the training on it: what `gfl demo` shows."""

# Training steps, for AP above 0.5 in under six minutes on two cores that multiply fp32 only.
ITERATIONS = 2500
