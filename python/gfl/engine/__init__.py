# SPDX-License-Identifier: Apache-2.0
"""Training and evaluating a detector."""
