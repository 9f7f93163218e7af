"""A folder as S3's buckets, to read from: `python -m tests.e2e.folder_s3 FOLDER PORT`.

What boto3 needs to list and download objects without credentials, at an address that AWS_ENDPOINT_URL names.
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Buckets(BaseHTTPRequestHandler):
    """Answers GET and HEAD of objects, and ListObjectsV2."""

    folder = Path()

    def do_GET(self) -> None:
        found = urlsplit(self.path)
        query = parse_qs(found.query)
        path = self.folder / unquote(found.path).strip("/")
        if "list-type" in query:
            self._answer(200, list_objects(path, query.get("prefix", [""])[0]).encode())
        elif path.is_file():
            self._answer(200, path.read_bytes())
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def list_objects(bucket: Path, prefix: str) -> str:
    """Return the objects of a bucket whose keys begin with ``prefix``, as S3 lists them."""
    keys = sorted(str(path.relative_to(bucket)) for path in bucket.rglob("*") if path.is_file())
    contents = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{(bucket / key).stat().st_size}</Size></Contents>"
        for key in keys
        if key.startswith(prefix)
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"


if __name__ == "__main__":
    Buckets.folder = Path(sys.argv[1])
    ThreadingHTTPServer(("0.0.0.0", int(sys.argv[2])), Buckets).serve_forever()
