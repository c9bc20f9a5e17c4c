# SPDX-License-Identifier: Apache-2.0
"""A data set drawn from scratch, and a training on it: what `gfl demo` shows."""
