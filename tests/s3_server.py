"""As much of S3 as an image needs, in this process or as a program: put, get, head.

    async with S3Server() as server:
        server.environment          what to set so that clients find it

    python -m tests.s3_server       prints the environment as shell lines, and runs until SIGTERM

Knows: path-style requests, ranges, conditions, objects put in parts, AWS signatures (version 4,
    in headers).
Must not know: aiouffd, obstore.

Signatures are really checked: a wrong secret is refused as S3 refuses it.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import shlex
import signal
import time
import urllib.request
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from types import TracebackType
from typing import Final, Self

from aiohttp import web

KEY: Final = "AKTEST"
SECRET: Final = "a secret that is none"
REGION: Final = "us-east-1"


class S3Server:
    """Keeps objects in memory.

    Attributes:
        objects: Data by ``bucket/key``; change it as somebody else would.
        buckets: Their names; putting into another fails.
        requests: Method and path of all requests so far.
        troubles: Statuses to answer the next requests with.
        port: Where it listens; 0 is chosen by the system when it begins.
        endpoint: Its URL, from ``async with`` on.
    """

    def __init__(self, *buckets: str, port: int = 0) -> None:
        self.port = port
        self.buckets = set(buckets or ("images",))
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.troubles: list[int] = []
        self.endpoint = ""
        self._parts: dict[str, dict[int, bytes]] = {}  # by upload, those that have come
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    @property
    def environment(self) -> dict[str, str]:
        """Give the variables under which S3 clients find it and may use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
        }

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        if self.troubles:
            return _refusal(self.troubles.pop(0), "SlowDown")
        refused = _check_signature(request)
        if refused:
            return _refusal(403, refused)
        name = request.match_info["path"]
        bucket, _, key = name.partition("/")
        if request.method == "PUT" and not key:
            self.buckets.add(bucket)
            return web.Response()
        if bucket not in self.buckets:
            return _refusal(404, "NoSuchBucket")
        if request.method == "PUT":
            data = await request.read()
            if "uploadId" in request.query:
                number = int(request.query["partNumber"])
                self._parts[request.query["uploadId"]][number] = data
            else:
                self.objects[name] = data
            return web.Response(headers={"ETag": _etag(data)})
        if request.method == "POST" and key:
            return self._put_in_parts(request, name)
        if request.method not in ("GET", "HEAD") or not key:
            return _refusal(501, "NotImplemented")
        if name not in self.objects:
            return _refusal(404, "NoSuchKey")
        return self._give(request, self.objects[name])

    def _put_in_parts(self, request: web.Request, name: str) -> web.Response:
        """Begin an object that comes in parts, or end it."""
        bucket, _, key = name.partition("/")
        where = f"<Bucket>{bucket}</Bucket><Key>{key}</Key>"
        if "uploads" in request.query:
            upload = f"upload-{len(self.requests)}"
            self._parts[upload] = {}
            kind, text = "Initiate", f"{where}<UploadId>{upload}</UploadId>"
        else:
            parts = self._parts.pop(request.query["uploadId"])
            self.objects[name] = data = b"".join(parts[number] for number in sorted(parts))
            kind, text = "Complete", f"{where}<ETag>{_etag(data)}</ETag>"
        text = f"<{kind}MultipartUploadResult>{text}</{kind}MultipartUploadResult>"
        return web.Response(text=text, content_type="application/xml")

    def _give(self, request: web.Request, data: bytes) -> web.Response:
        headers = {
            "ETag": _etag(data),
            "Last-Modified": formatdate(1_800_000_000, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        if request.headers.get("If-Match", headers["ETag"]) != headers["ETag"]:
            return _refusal(412, "PreconditionFailed")
        status, span = 200, request.http_range
        if span.start is not None:
            if span.start >= len(data):
                return _refusal(416, "InvalidRange")
            end = min(len(data) if span.stop is None else span.stop, len(data))
            headers["Content-Range"] = f"bytes {span.start}-{end - 1}/{len(data)}"
            status, data = 206, data[span.start : end]
        if request.method == "HEAD":
            headers["Content-Length"] = str(len(data))
            return web.Response(status=status, headers=headers)
        return web.Response(status=status, headers=headers, body=data)


@functools.lru_cache(maxsize=8)
def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _refusal(status: int, code: str) -> web.Response:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")


def _check_signature(request: web.Request) -> str:
    """Give the code of the refusal, or "" if the request is signed as it should be."""
    algorithm, _, fields = request.headers.get("Authorization", "").partition(" ")
    if algorithm != "AWS4-HMAC-SHA256":
        return "AccessDenied"
    given = dict(field.strip().split("=", 1) for field in fields.split(","))
    key, *scope = given["Credential"].split("/")
    if key != KEY:
        return "InvalidAccessKeyId"
    names = given["SignedHeaders"].split(";")
    signed = {name: request.headers[name] for name in names}
    expected = signature(request.method, request.raw_path, signed, scope, SECRET)
    return "" if hmac.compare_digest(expected, given["Signature"]) else "SignatureDoesNotMatch"


def signature(
    method: str, path: str, headers: Mapping[str, str], scope: Sequence[str], secret: str
) -> str:
    """Sign a request as AWS does, version 4.

    Args:
        method: Such as PUT.
        path: With its query, as it is sent.
        headers: Those that are signed, by names in small letters; among them host, x-amz-date
            and x-amz-content-sha256.
        scope: Day, region, service, "aws4_request".
        secret: The secret access key.
    """
    path, _, query = path.partition("?")
    names = sorted(headers)
    canonical = (
        *(method, path, "&".join(sorted(query.split("&")))),
        *(f"{name}:{headers[name].strip()}" for name in names),
        *("", ";".join(names), headers["x-amz-content-sha256"]),
    )
    digest = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
    text = "\n".join(("AWS4-HMAC-SHA256", headers["x-amz-date"], "/".join(scope), digest))
    key = f"AWS4{secret}".encode()
    for part in scope:
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.digest(key, text.encode(), "sha256").hex()


def make_bucket(endpoint: str, bucket: str, key: str, secret: str) -> None:
    """Make a bucket in any S3: what obstore has no call for."""
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    headers = {
        "host": endpoint.partition("://")[2],
        "x-amz-content-sha256": hashlib.sha256(b"").hexdigest(),
        "x-amz-date": now,
    }
    scope = (now[:8], REGION, "s3", "aws4_request")
    signed = signature("PUT", f"/{bucket}", headers, scope, secret)
    fields = f"Credential={key}/{'/'.join(scope)}, SignedHeaders={';'.join(sorted(headers))}"
    headers["Authorization"] = f"AWS4-HMAC-SHA256 {fields}, Signature={signed}"
    request = urllib.request.Request(f"{endpoint}/{bucket}", headers=headers, method="PUT")
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()


async def _main() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with S3Server() as server:
        for name, value in server.environment.items():
            print(f"export {name}={shlex.quote(value)}")
        print(flush=True)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(_main())
