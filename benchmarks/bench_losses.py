# SPDX-License-Identifier: Apache-2.0
"""Every operator against what people use today: ``bench.py losses``, by the name that is typed most."""

from __future__ import annotations

import sys

import bench

if __name__ == "__main__":
    sys.exit(bench.main(["losses", *sys.argv[1:]]))
