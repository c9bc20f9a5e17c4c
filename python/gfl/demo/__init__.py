# SPDX-License-Identifier: Apache-2.0
"""A data set drawn from nothing, and the training on it: what `gfl demo` shows."""
