"""A stand-in for Google Cloud Storage: what gcsfs, google-cloud-storage and tensorstore use of its
JSON API (https://cloud.google.com/storage/docs/json_api/v1), in memory. Every bucket exists."""

import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

_OBJECT = "(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)"


class _Refused(Exception):
    """With an HTTP status and a message."""


class FakeGcs(ThreadingHTTPServer):
    """`with FakeGcs() as gcs:` serves on 127.0.0.1 until the block ends."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.RLock()
        self.objects: dict[str, tuple[int, bytes]] = {}
        """BUCKET/NAME: generation and content."""
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.count = 0
        self.refuse: str | None = None
        """Writes of objects whose name matches this regular expression are forbidden."""
        self.forbidden = ""
        """This bucket may not be listed."""
        self.stall: str | None = None
        """Those that match this one get no answer; `stalled` tells that one came."""
        self.stalled = threading.Event()

    def __enter__(self) -> "FakeGcs":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What sends gcsfs, google-cloud-storage and tensorstore here, without credentials."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC for the kind of bucket
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "EPATH_USE_TF": "false",
        }

    def handle_error(self, *args: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients get killed here
            super().handle_error(*args)

    def get(self, name: str, query: dict[str, str]) -> tuple[int, bytes]:
        self.check(name, query)
        if name not in self.objects:
            raise _Refused(404, f"No such object: {name}")
        return self.objects[name]

    def put(self, name: str, content: bytes, query: dict[str, str]) -> dict[str, Any]:
        self.check(name, query)
        if self.refuse and re.search(self.refuse, name):
            raise _Refused(403, f"no permission to write {name}")
        if self.stall and re.search(self.stall, name):
            self.stalled.set()
            raise ConnectionError
        self.count += 1
        self.objects[name] = self.count, content
        return _resource(name, self.count, content)

    def check(self, name: str, query: dict[str, str]) -> None:
        generation = str(self.objects.get(name, (0,))[0])
        if query.get("ifGenerationMatch", generation) != generation:
            raise _Refused(412, "a precondition does not hold")
        if query.get("ifGenerationNotMatch") == generation:
            raise _Refused(304, "")

    def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        start, items, folders = f"{bucket}/{query.get('prefix', '')}", [], {}
        for name, held in sorted(self.objects.items()):
            key = name.split("/", 1)[1]
            within = query.get("startOffset", "") <= key < query.get("endOffset", key + "\0")
            if name.startswith(start) and within:
                inner, slash, _ = name[len(start) :].partition(query.get("delimiter") or "\0")
                if slash:
                    folders[(start + inner + slash).split("/", 1)[1]] = None
                else:
                    items.append(_resource(name, *held))
        return {"kind": "storage#objects", "items": items, "prefixes": [*folders]}

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> tuple[int, Any, dict]:
        """Status, content (bytes or JSON) and headers."""
        url = urlsplit(target)
        path, query = url.path, dict(parse_qsl(url.query))
        if match := re.fullmatch("/storage/v1/b/([^/]+)(/o)?", path):
            if match[1] == self.forbidden:
                raise _Refused(403, "forbidden")
            return 200, self.list(match[1], query) if match[2] else {"name": match[1]}, {}
        if match := re.fullmatch(f"{_OBJECT}/(rewriteTo|moveTo)(?:/b/([^/]+))?/o/([^/]+)", path):
            bucket, name, verb, other, new = (unquote(group or "") for group in match.groups())
            made = self.put(f"{other or bucket}/{new}", self.get(f"{bucket}/{name}", {})[1], query)
            if verb == "moveTo":
                del self.objects[f"{bucket}/{name}"]
            return 200, made | {"done": True, "resource": made}, {}
        if match := re.fullmatch(_OBJECT, path):
            name = "/".join(map(unquote, match.groups()))
            generation, content = self.get(name, query)
            if method == "DELETE":
                del self.objects[name]
                return 204, b"", {}
            if query.get("alt") != "media":
                return 200, _resource(name, generation, content), {}
            known = {"X-Goog-Generation": str(generation)}
            if not (span := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))):
                return 200, content, known
            start, stop = int(span[1]), min(int(span[2] or sys.maxsize) + 1, len(content))
            if start >= len(content):
                raise _Refused(416, "Requested range not satisfiable")
            where = f"bytes {start}-{stop - 1}/{len(content)}"
            return 206, content[start:stop], known | {"Content-Range": where}
        if match := re.fullmatch("/upload/storage/v1/b/([^/]+)/o", path):
            return self.upload(match[1], query, headers, body)
        raise _Refused(501, f"the fake does not know {method} {target}")

    def upload(self, bucket: str, query: dict[str, str], headers: Any, body: bytes):
        if upload := query.get("upload_id"):
            name, so_far = self.uploads[upload]
            so_far += body
            if headers["Content-Range"].endswith("/*"):
                return 308, b"", {"Range": f"bytes=0-{len(so_far) - 1}"}
            return 200, self.put(name, bytes(so_far), query), {}
        if query["uploadType"] == "resumable":
            upload = str(len(self.uploads))
            self.uploads[upload] = f"{bucket}/{query['name']}", bytearray()
            where = f"http://{headers['Host']}/upload/storage/v1/b/{bucket}/o?upload_id={upload}"
            return 200, b"", {"Location": where}
        return 200, self.put(f"{bucket}/{query['name']}", body, query), {}


def _resource(path: str, generation: int, content: bytes) -> dict[str, Any]:
    bucket, name = path.split("/", 1)
    md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
    about = {"kind": "storage#object", "bucket": bucket, "name": name, "md5Hash": md5}
    return about | {"size": str(len(content)), "generation": str(generation)}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    server: FakeGcs

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            try:
                status, said, headers = self.server.answer(
                    self.command, self.path, self.headers, body
                )
            except _Refused as error:
                status, message = error.args
                said = {"error": {"code": status, "message": message}} if message else b""
                headers = {}
        content = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        if content is not said:
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def log_message(self, *_: Any) -> None:
        pass
