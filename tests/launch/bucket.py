# SPDX-License-Identifier: Apache-2.0
"""A bucket on loopback: PyPI's gcp-storage-emulator, taught what Cloud Storage does and it does not:
``ifGenerationMatch`` (an object is created by one of several, or changed only as it was read), the generation of what
is read, and ``moveTo``.

    python bucket.py PORT FOLDER
"""

import re
import sys
import threading
import time
from http import HTTPStatus
from urllib.parse import parse_qs, urlparse

from gcp_storage_emulator import server, settings
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.storage import Storage

BUCKET = "lab-test"
_asked = threading.local()  # the generation that the request in hand wants an object to have; 0: not to be there
_uploads: dict[str, int | None] = {}


class PreconditionFailed(Exception):
    """An object is not of the generation that was asked for."""


def checked(name: str) -> None:
    """Makes one of the storage's own methods look at the generation first."""
    plain = getattr(Storage, name)

    def method(self, bucket, key, *rest, **more):
        wanted = getattr(_asked, "generation", None)
        found = self.objects.get(bucket, {}).get(key)
        if wanted is not None and wanted != (int(found["generation"]) if found else 0):
            raise PreconditionFailed(key)
        result = plain(self, bucket, key, *rest, **more)
        if name == "create_resumable_upload":
            _uploads[result] = wanted
        return result

    setattr(Storage, name, method)


class Router(server.Router):
    def handle(self, method):
        request = self._request_handler
        query = parse_qs(urlparse(request.path).query)
        given = query.get("ifGenerationMatch", [request.headers.get("x-goog-if-generation-match")])[0]
        upload = _uploads.get(query.get("upload_id", [""])[0])
        _asked.generation = int(given) if given is not None and method != "GET" else upload
        try:
            super().handle(method)
        except PreconditionFailed:
            body = b'{"error": {"code": 412, "message": "A precondition did not hold.", "errors": []}}'
            request.send_response(412)
            request.send_header("Content-Type", "application/json")
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)


def move(request, response, storage, *rest, **more):
    bucket, source, target = (request.params[name] for name in ("bucket_name", "object_id", "target"))
    try:
        response.json(objects._copy(request.base_url, storage, bucket, source, bucket, target))
        _asked.generation = None
        storage.delete_file(bucket, source)
    except objects.NotFound:
        response.status = HTTPStatus.NOT_FOUND


def download(request, response, storage, *rest, **more):
    bucket, name = request.params["bucket_name"], request.params["object_id"]
    found = storage.objects.get(bucket, {}).get(name)
    if found is not None:
        response["x-goog-generation"] = found["generation"]
    _download(request, response, storage, *rest, **more)


def start(port: int, folder: str | None = None):
    """A running server of one bucket; it keeps its objects in a folder, or in memory."""
    made = server.create_server("127.0.0.1", port, in_memory=folder is None, default_bucket=BUCKET, data_dir=folder)
    made.start()
    return made


for _name in ("create_file", "delete_file", "create_resumable_upload"):
    checked(_name)
server.Router = Router
_download, objects.download = objects.download, download
_path = r"/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<target>.*[^/]+)$"
_moves = tuple((rf"^{re.escape(at)}{_path}", {"POST": move}) for at in (settings.API_ENDPOINT, ""))
server.HANDLERS = _moves + tuple(
    (path, {method: download if function is _download else function for method, function in methods.items()})
    for path, methods in server.HANDLERS
)

if __name__ == "__main__":
    import logging

    logging.disable(logging.CRITICAL)
    start(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
    while True:
        time.sleep(1)
