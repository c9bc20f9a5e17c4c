# SPDX-License-Identifier: Apache-2.0
"""``gfl serve``: a detector as a web service with a page."""

from __future__ import annotations

import argparse

from ..files import say
from . import DTYPES, add_config, check_kernels, given_config

HELP = "serve a detector to programs, and as a page to drop photos on"
EPILOG = """\
  gfl serve gfl_r50_1x
  curl -F image=@photo.jpg http://127.0.0.1:8000/detect
  curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg \\
    'http://127.0.0.1:8000/detect?classes=person,dog&score_threshold=0.5'"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "gfl serve MODEL [option …]"
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("checkpoint", metavar="MODEL", help="published model (`gfl models`), or a checkpoint")
    add_config(parser)
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0: for the whole network too [%(default)s]")
    add("--port", type=int, default=8000, metavar="N", help="[%(default)s]")
    add("--score", type=float, default=0.3, metavar="X", help="min score where a request says none [%(default)s]")
    add("--max-mb", type=float, default=16, metavar="X", help="largest request, MiB [%(default)s]")
    add("--timeout", type=float, default=30, metavar="X", help="seconds that a request may take [%(default)s]")
    add("--device", help="cpu, cuda, cuda:1, … [a GPU if there is one]")
    add("--dtype", choices=DTYPES, default="fp32", help="precision of the network [%(default)s]")
    add("--optimize", action="store_true", help="fold batch norms into convolutions: faster")


def run(options: argparse.Namespace) -> int:
    import torch

    from ..detector import Detector
    from ..serve import Limits, create_app

    try:
        import uvicorn
    except ImportError as error:
        raise RuntimeError(f"gfl serve needs uvicorn: pip install 'gfl-ops[serve]' ({error})") from error
    for option in ("max_mb", "timeout"):
        if not getattr(options, option) > 0:
            raise ValueError(f"`--{option.replace('_', '-')}` must be positive, got {getattr(options, option)}")
    check_kernels(options.device)
    detector = Detector(
        options.checkpoint,
        options.device,
        getattr(torch, DTYPES[options.dtype]),
        score_threshold=options.score,
        optimize=options.optimize,
        config=given_config(options),
    )
    app = create_app(detector, Limits(bytes=int(options.max_mb * 2**20), seconds=options.timeout))
    say(f"{detector} on http://{options.host}:{options.port}")
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")
    return 0
