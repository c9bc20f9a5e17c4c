# SPDX-License-Identifier: Apache-2.0
"""Images and annotations in COCO's format: reading, checking, resizing, batches."""
