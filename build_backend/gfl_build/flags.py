# SPDX-License-Identifier: Apache-2.0
"""The compiler flags of flags.json, the list that CMakeLists.txt reads too."""

import json
from pathlib import Path
from typing import Any

FLAGS: dict[str, Any] = json.loads(Path(__file__).with_name("flags.json").read_text(encoding="utf-8"))
