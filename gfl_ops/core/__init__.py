# SPDX-License-Identifier: Apache-2.0
"""What every operator needs and no operator is in: registry, backends, autograd, checks."""
