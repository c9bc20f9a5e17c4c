# SPDX-License-Identifier: Apache-2.0
"""One file an operator: reference, fake kernel, samples, public function and spec."""
