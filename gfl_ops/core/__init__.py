# SPDX-License-Identifier: Apache-2.0
"""What all operators share: registry, backends, the autograd node, checks, reduction, dtypes."""
