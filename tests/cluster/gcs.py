"""The emulator of Google Cloud Storage, with what TensorStore needs besides: an object's generation, and writes under
the condition that it is still the one that was read (https://cloud.google.com/storage/docs/request-preconditions).
Where BUSY is a number n, every n-th request is refused: with 429 or 503 by turns.

python tests/cluster/gcs.py start --host localhost --port 9023 --in-memory --default-bucket bucket
"""

import itertools
import os
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

download, insert = objects.download, objects.insert


def generation(storage, bucket: str, name: str) -> str | None:
    """None: there is no such object."""
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except objects.NotFound:
        return None


def download_with_generation(request, response, storage, *args, **kwargs):
    """The body, and in a header which generation of the object it is."""
    found = generation(storage, request.params["bucket_name"], request.params["object_id"])
    if found is not None:
        response["x-goog-generation"] = found
    return download(request, response, storage, *args, **kwargs)


def insert_if_unchanged(request, response, storage, *args, **kwargs):
    """Write, or answer 412: another generation is there, where 0 stands for none."""
    wanted = request.query.get("ifGenerationMatch")
    if wanted and (generation(storage, request.params["bucket_name"], request.query["name"][0]) or "0") != wanted[0]:
        response.status = HTTPStatus.PRECONDITION_FAILED
        return None
    return insert(request, response, storage, *args, **kwargs)


def handle_unless_busy(router, method: str) -> None:
    """Answer a request, or refuse it."""
    refusal, is_served = divmod(next(requests), int(os.environ["BUSY"]))
    if is_served:
        handle(router, method)
        return
    handler = router._request_handler
    handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    response = server.Response(handler)
    response.status = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)[refusal % 2]
    response.close()


objects.download, objects.insert = download_with_generation, insert_if_unchanged
handle, requests = server.Router.handle, itertools.count(1)
if "BUSY" in os.environ:
    server.Router.handle = handle_unless_busy

if __name__ == "__main__":
    from gcp_storage_emulator.__main__ import main  # its table of handlers is made on import

    main()
