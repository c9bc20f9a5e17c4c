# SPDX-License-Identifier: Apache-2.0
"""A detector as a web service, an ASGI application: ``/detect`` for programs, and a page to drop a photo on."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any

from PIL import Image

from ..detector import Detector
from ..result import Result

try:
    from starlette.applications import Starlette
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise RuntimeError(f"gfl serve needs Starlette: pip install 'gfl-ops[serve]' ({error})") from error

FORM_FIELDS = 8
PAGE = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript")}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; style-src 'self' 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    bytes: int = 16 << 20  # of its body
    pixels: int = 50_000_000  # of its image
    seconds: float = 30.0  # to send it, and again to detect
    waiting: int = 16  # requests at a time; others are sent away


def create_app(detector: Detector, limits: Limits | None = None) -> Starlette:
    """The application of a detector, for any ASGI server.

    ``POST /detect`` takes an image as the field `image` of a multipart form, as the body itself with a Content-Type of
    image/…, or as JSON, in base64 under the key `image`. Further fields, or parameters of the URL: `score_threshold`,
    `classes` (names or numbers; a list, or separated by commas), `max_detections`, `edges` (distributions too). The
    answer is that of `gfl.Result.to_dict`; of an error it is ``{"error": …}``. URLs of images are not taken: a service
    that fetches them reaches its own network.
    """
    limits = Limits() if limits is None else limits
    pool = ThreadPoolExecutor(1)  # A detector's batches take turns anyway.
    waiting = 0

    async def detect(request: Request) -> Response:
        nonlocal waiting
        if waiting >= limits.waiting:
            raise HTTPException(503, "busy: try again later")
        waiting += 1
        future = None
        try:
            content, fields = await asyncio.wait_for(_read(request, limits.bytes), limits.seconds)
            work = _work(detector, content, fields, limits)
            future = pool.submit(work)
            found = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), limits.seconds)
            return JSONResponse(found.to_dict())
        except asyncio.TimeoutError:
            raise HTTPException(504, f"not done within {limits.seconds:g} s") from None
        except ClientDisconnect:
            return Response(status_code=400)
        finally:
            if future is None or future.done() or future.cancel():
                waiting -= 1
            else:  # It runs on, and counts until it ends.
                loop = asyncio.get_running_loop()
                future.add_done_callback(lambda _: loop.call_soon_threadsafe(_done))

    def _done() -> None:
        nonlocal waiting
        waiting -= 1

    def page(request: Request) -> Response:
        name, kind = PAGE[request.url.path]
        return Response(resources.files(__name__).joinpath(name).read_bytes(), media_type=kind, headers=HEADERS)

    def failed(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 400
        text = error.detail if isinstance(error, HTTPException) else str(error)
        return JSONResponse({"error": text}, status)

    routes = [Route("/detect", detect, methods=["POST"]), *(Route(path, page) for path in PAGE)]
    handlers: dict[Any, Any] = {HTTPException: failed, ValueError: failed}
    return Starlette(routes=routes, exception_handlers=handlers)


async def _body(request: Request, limit: int) -> bytes:
    too_large = HTTPException(
        413, f"larger than {limit >> 20} MiB" if limit >= 1 << 20 else f"larger than {limit} bytes"
    )
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal() or int(stated) > limit:
        raise too_large
    content = bytearray()
    async for block in request.stream():  # Whatever was stated.
        content += block
        if len(content) > limit:
            raise too_large
    return bytes(content)


async def _read(request: Request, limit: int) -> tuple[bytes, Mapping[str, Any]]:
    """The bytes of an image, and the other fields."""
    body = await _body(request, limit)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    fields: dict[str, Any] = dict(request.query_params)
    if kind.startswith("image/"):
        return body, fields
    if kind == "application/json":
        try:
            content = json.loads(body)
            fields |= content
            return base64.b64decode(content["image"], validate=True), fields
        except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
            raise HTTPException(400, "the JSON must have an image's bytes in base64 under the key `image`") from None
    if kind != "multipart/form-data":
        raise HTTPException(415, "send an image as multipart/form-data, application/json or image/…")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async with Request(request.scope, receive).form(max_files=1, max_fields=FORM_FIELDS) as form:
        file = form.get("image")
        if not isinstance(file, UploadFile):
            raise HTTPException(400, "the form must have a file under the name `image`")
        fields |= {name: value for name, value in form.items() if name != "image"}
        return await file.read(), fields


def _work(detector: Detector, content: bytes, fields: Mapping[str, Any], limits: Limits) -> Callable[[], Result]:
    how: dict[str, Any] = {"edges": str(fields.get("edges", "")).lower() in ("1", "true", "on")}
    for name, convert, most in (("score_threshold", float, 1), ("max_detections", int, 10_000)):
        if (value := fields.get(name)) not in (None, ""):
            try:
                how[name] = convert(value)
            except (TypeError, ValueError, OverflowError):
                how[name] = -1
            if not 0 <= how[name] <= most:
                raise HTTPException(400, f"`{name}` must be a number from 0 to {most}, got {str(value)[:40]!r}")
    if classes := fields.get("classes"):
        parts = classes if isinstance(classes, list) else str(classes).split(",")
        names = [str(part).strip() for part in parts]
        how["classes"] = [int(one) if one.isdecimal() and one not in detector.classes else one for one in names]

    def work() -> Result:
        try:
            with Image.open(io.BytesIO(content)) as image:  # The head alone: a small file may be a huge image.
                width, height = image.size
        except Image.DecompressionBombError:
            raise HTTPException(413, f"more than {limits.pixels} pixels") from None
        except Exception as error:  # Pillow's readers raise many types.
            raise HTTPException(400, f"the image can't be decoded: {type(error).__name__}") from None
        if width * height > limits.pixels:
            raise HTTPException(413, f"more than {limits.pixels} pixels: {width}×{height}")
        found = detector(content, **how)
        assert isinstance(found, Result)
        return found

    return work
