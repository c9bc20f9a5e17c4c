# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``bench.py``: each module has a docstring for the help, `configure` and `run`."""
