# SPDX-License-Identifier: Apache-2.0
"""Other systems' dialects of these losses, one module a system; nothing of a system is imported before it is asked for.

The modules `mmdet`, `torchvision` and `ultralytics` also have ``patch()``, which lets the installed package call ours,
and ``unpatch()``.
"""
