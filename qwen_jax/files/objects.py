"""Objects of buckets over obstore: one place for its stores, its errors and its retries.

obstore was chosen because one wheel without dependencies speaks to S3 and Google Cloud Storage, with conditional
writes, ranged reads, multipart uploads and retries, outside Python's interpreter lock. Credentials and endpoints come
from the environment variables of the vendors' own tools, which docs/how_to/buckets.md lists.

obstore's threads do not survive a fork: a process that has used a bucket starts others by spawn.
"""

import concurrent.futures
import datetime
import functools
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SCHEMES = {"gs": ("gcs", "Google Cloud Storage"), "s3": ("s3", "S3")}  # scheme: extra of pyproject.toml, store
# Requests are repeated for this long after a transient fault, by obstore and, around it, here.
RETRY_SECONDS = "QWEN_JAX_STORE_RETRY_SECONDS"
_DEFAULT_RETRY_SECONDS = 180.0
_REQUEST_SECONDS = 60
# Bytes of one request of a large object, and requests at a time.
PART = 16 << 20
WORKERS = 8
_MOST_PARTS = 9_000  # S3 takes 10,000
_LARGEST_COPY = 5 << 30  # of one request to S3
_EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "RequestTimeTooSkewed", "401 Unauthorized")
# The answer to HEAD has no body, so an expired token and another region are this alone.
_BARE_REFUSAL = re.compile(r"performing HEAD .*non-2xx status code: 400 Bad Request:$")
_OTHER_REGION = ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraint", "301 Moved")
_CONNECTION = ("error sending request", "error decoding response body", "timed out", "connection", "HTTP error", "50")


class ObjectChangedError(OSError):
    """An object is not, or no longer, the one that a conditional read or write expected."""


def retry_seconds() -> float:
    """Limit of the retries of one request, from QWEN_JAX_STORE_RETRY_SECONDS."""
    given = os.environ.get(RETRY_SECONDS, "")
    try:
        return float(given or _DEFAULT_RETRY_SECONDS)
    except ValueError:
        raise ValueError(f"{RETRY_SECONDS}: expected a number of seconds, found {given!r}") from None


@functools.lru_cache(maxsize=64)
def _store(scheme: str, bucket: str, _generation: int) -> Any:
    try:
        from obstore import store as stores
    except ModuleNotFoundError as error:
        extra, name = SCHEMES[scheme]
        raise ValueError(
            f"{scheme}://{bucket}: obstore, which reads and writes {name}, is not installed: in the repository, "
            f"`pip install -c requirements.txt -e '.[{extra}]'` brings it"
        ) from error
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if scheme == "gs":
        endpoint = os.environ.get("GOOGLE_BASE_URL") or os.environ.get("STORAGE_EMULATOR_HOST") or ""
    limit = retry_seconds()
    options: dict[str, Any] = {
        "client_options": {
            "allow_http": endpoint.startswith("http://"),
            "timeout": datetime.timedelta(seconds=min(_REQUEST_SECONDS, max(limit, 1))),
            "connect_timeout": datetime.timedelta(seconds=10),
        },
        "retry_config": {"max_retries": 20, "retry_timeout": datetime.timedelta(seconds=limit)},
    }
    if endpoint:
        options["config"] = {"base_url" if scheme == "gs" else "endpoint": endpoint}
    if scheme == "gs":
        return stores.GCSStore(bucket, **options)
    if provider := _aws_profile():
        options["credential_provider"] = provider
    return stores.S3Store(bucket, **options)


def _aws_profile() -> Any:
    """Credentials of ~/.aws, which obstore does not read by itself; None where the environment has them."""
    chosen = os.environ.get("AWS_PROFILE") or Path("~/.aws/credentials").expanduser().exists()
    if os.environ.get("AWS_ACCESS_KEY_ID") or not chosen:
        return None
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ModuleNotFoundError as error:
        raise ValueError(
            "boto3, which reads profiles of ~/.aws, is not installed: in the repository, "
            "`pip install -c requirements.txt -e '.[s3]'` brings it"
        ) from error
    return Boto3CredentialProvider(boto3.session.Session())


_renewals = 0


def forget_stores() -> None:
    """Makes later requests read endpoints and credentials from the environment anew."""
    _store.cache_clear()


def call(where: Any, operation: Callable[[Any], Any]) -> Any:
    """The result of `operation(store)` on the bucket of a `RemotePath`, repeated after transient faults.

    Raises:
      FileNotFoundError, FileExistsError, PermissionError, ObjectChangedError, OSError: one line with the URL.
    """
    global _renewals
    deadline, tries = time.monotonic() + retry_seconds(), 0
    while True:
        try:
            return operation(_store(where.scheme, where.bucket, _renewals))
        except (ValueError, TypeError):
            raise
        except Exception as error:
            text = _short(error)
            if _BARE_REFUSAL.search(text):
                text = _reason(where) or text
            expired = any(sign in text for sign in _EXPIRED) or _BARE_REFUSAL.search(text) is not None
            if not (expired or _is_transient(error, text)):
                raise _explained(error, text, where) from error
            tries += 1
            pause = min(0.1 * 2**tries, 15.0) * random.uniform(0.5, 1.0)
            if time.monotonic() + pause > deadline:
                limit = f"repeated {tries} times within {retry_seconds():g} s ({RETRY_SECONDS})"
                raise _explained(error, f"{text} ({limit})", where) from error
            if expired:
                _renewals += 1  # a new store reads the credentials anew
            time.sleep(pause)


def _short(error: BaseException) -> str:
    text = re.split(r"\s*Debug source", str(error))[0]
    text = re.sub(r"<RequestI[dD]>.*?</RequestI[dD]>|<HostId>.*?</HostId>|<\?xml.*?\?>", "", text)
    text = " ".join(text.split()).removeprefix("Generic S3 error: ").removeprefix("Generic GCS error: ")
    return text if len(text) <= 400 else text[:400] + "…"


def _reason(where: Any) -> str | None:
    """Why HEAD was refused, from the body of the answer to a GET; None where that is not refused."""
    try:
        _obstore().get(_store(where.scheme, where.bucket, _renewals), where.key, options={"range": (0, 1)})
    except Exception as error:
        return _short(error)
    return None


def _is_transient(error: BaseException, text: str) -> bool:
    from obstore import exceptions

    if isinstance(error, OSError) or type(error) is not exceptions.GenericError:
        return False
    status = re.search(r"non-2xx status code: (\d+)", text)
    return int(status[1]) in (408, 429) if status else any(sign in text for sign in _CONNECTION)


def _explained(error: BaseException, text: str, where: Any) -> OSError:
    from obstore import exceptions

    bucket = f"{where.scheme}://{where.bucket}"
    if "NoSuchBucket" in text or "bucket does not exist" in text:
        return FileNotFoundError(f"{where}: there is no bucket {bucket}: create it, or correct the path")
    if any(sign in text for sign in _OTHER_REGION):
        return OSError(f"{where}: the bucket is in another region: set AWS_REGION to the region of {bucket} ({text})")
    if any(sign in text for sign in _EXPIRED) or _BARE_REFUSAL.search(text):
        return PermissionError(f"{where}: the credentials have expired: {text}")
    # A refused listing is a GenericError.
    refused = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
    if isinstance(error, refused) or "status code: 403" in text:
        return PermissionError(f"{where}: no permission: {text}")
    if isinstance(error, exceptions.AlreadyExistsError):
        return FileExistsError(f"{where}: the object exists already")
    if isinstance(error, exceptions.PreconditionError | exceptions.NotModifiedError):
        return ObjectChangedError(f"{where}: another process has written this object in the meantime")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{where}: no such object")
    if isinstance(error, OSError):
        return error
    return OSError(f"{where}: {text}")


def head(where: Any) -> dict:
    """Metadata of an object: `size` in bytes, `last_modified`, `e_tag`, `version`."""
    import_obstore(where)
    return call(where, lambda store: _obstore().head(store, where.key))


def import_obstore(where: Any) -> None:
    """Raises the ValueError of a missing extra, if it is missing."""
    _store(where.scheme, where.bucket, _renewals)


def _obstore() -> Any:
    import obstore

    return obstore


def get(where: Any, span: tuple[int, int] | None = None, e_tag: str | None = None) -> bytes:
    """The bytes of an object, or of [start, stop) of it.

    Args:
      e_tag: what the object has to be, from `head`; None: whatever it is.

    Raises:
      ObjectChangedError: it is another one by now.
      OSError: it ends before `stop`.
    """
    import_obstore(where)
    if span is not None and span[0] >= span[1]:
        return b""
    options: dict[str, Any] = {} if e_tag is None else {"if_match": e_tag}
    if span is not None:
        options["range"] = span
    data = call(where, lambda store: bytes(_obstore().get(store, where.key, options=options).bytes()))
    if span is not None and len(data) != span[1] - span[0]:
        raise OSError(f"{where}: expected bytes {span[0]:,} to {span[1]:,}, the object gave {len(data):,} of them")
    return data


def open_object(where: Any, size: int) -> tuple[dict, Callable[[], bytes]]:
    """Metadata of an object (as `head`), and a function that gives its first bytes, once: one request for both.

    Args:
      size: how many bytes; fewer where the object ends before.

    Raises:
      FileNotFoundError: there is none.
    """
    import_obstore(where)

    def begin(store):
        try:
            return _obstore().get(store, where.key, options={"range": (0, size)})
        except Exception as error:
            if "status code: 416" not in str(error):
                raise
        return None  # the object is empty, and has no first byte

    found = call(where, begin)
    if found is None:
        return head(where), bytes
    return dict(found.meta), lambda: bytes(found.bytes())


def get_many(where: Any, spans: list[tuple[int, int]]) -> list[bytes]:
    """The bytes of several spans [start, stop) of one object, requested together; near ones share a request."""
    import_obstore(where)
    wanted = [span for span in spans if span[0] < span[1]]
    if not wanted:
        return [b""] * len(spans)
    starts, stops = zip(*wanted, strict=True)
    found = iter(call(where, lambda store: _obstore().get_ranges(store, where.key, starts=starts, ends=stops)))
    return [bytes(next(found)) if start < stop else b"" for start, stop in spans]


def put(where: Any, data: bytes | Path, mode: Any = "overwrite") -> dict:
    """Writes an object whole from bytes or from a local file, and returns its `e_tag` and `version`.

    Args:
      mode: "overwrite", "create", or the `e_tag` and `version` that the object must have until now.

    Raises:
      FileExistsError: mode "create", and there is one.
      ObjectChangedError: the object is another one.
    """
    import_obstore(where)
    if isinstance(mode, dict):
        mode = {name: mode[name] for name in ("e_tag", "version") if mode.get(name) is not None}
    size = len(data) if isinstance(data, bytes) else data.stat().st_size
    part = max(PART, -(-size // _MOST_PARTS))
    return call(
        where,
        lambda store: _obstore().put(
            store, where.key, data, mode=mode, chunk_size=part, max_concurrency=WORKERS, use_multipart=size > part
        ),
    )


class Upload:
    """An object that is uploaded in parts while it is written; it is there after `finish` alone."""

    def __init__(self, where: Any):
        """Raises the errors of `call`, of the first parts at the latest."""
        import_obstore(where)
        self._where = where
        self._file = call(
            where,
            lambda store: _obstore().open_writer(store, where.key, buffer_size=PART, max_concurrency=WORKERS),
        )

    def write(self, data: Any) -> int:
        """Hands on bytes; returns their number."""
        view = memoryview(data).cast("B")
        # By parts: each is copied on its way.
        for start in range(0, len(view), PART):
            self._do(lambda part=view[start : start + PART]: self._file.write(part))
        return len(view)

    def finish(self) -> None:
        """Makes the object, and returns when it is there."""
        self._do(self._file.close)

    def _do(self, operation: Callable[[], Any]) -> None:
        # obstore repeats the requests of each part; the upload as a whole cannot be repeated.
        try:
            operation()
        except (ValueError, TypeError):
            raise
        except Exception as error:
            raise _explained(error, _short(error), self._where) from error


def delete(where: Any, keys: list[str]) -> None:
    """Deletes objects of the bucket of `where`; missing ones are none to delete."""
    import_obstore(where)

    def delete_all(some: list[str]) -> None:
        try:
            call(where, lambda store: _obstore().delete(store, some))
        except FileNotFoundError:
            # Cloud Storage says so of one that is missing, and obstore leaves those after it.
            if len(some) > 1:
                in_parallel(lambda key: delete_all([key]), some)

    for start in range(0, len(keys), 1000):
        delete_all(keys[start : start + 1000])


def copy_within(source: Any, final: Any) -> bool:
    """Copies an object on the server; False where the server cannot, and nothing was done."""
    same = (source.scheme, source.bucket) == (final.scheme, final.bucket)
    if not same or head(source)["size"] > _LARGEST_COPY:
        return False
    call(source, lambda store: _obstore().copy(store, source.key, final.key))
    return True


def list_objects(where: Any) -> Iterator[dict]:
    """Metadata (`path`, the whole key, and as `head`) of the objects below a folder, in the order of their keys."""
    import_obstore(where)
    prefix = where.key or None
    found = call(where, lambda store: [one for some in _obstore().list(store, prefix) for one in some])
    yield from sorted(found, key=lambda one: one["path"])


def list_folder(where: Any) -> tuple[list[str], dict[str, int]]:
    """(names of folders, names of objects with their sizes in bytes) directly in a folder, sorted."""
    import_obstore(where)
    found = call(where, lambda store: _obstore().list_with_delimiter(store, where.key or None))
    folders = sorted({one.rstrip("/").rpartition("/")[2] for one in found["common_prefixes"]})
    objects = sorted((one["path"], one["size"]) for one in found["objects"] if one["path"] != where.key)
    return folders, {path.rpartition("/")[2]: size for path, size in objects}


def any_below(where: Any) -> bool:
    """Whether there is an object below a folder; reads one page of the listing at most."""
    import_obstore(where)

    def look(store):
        return any(len(some) for some in _obstore().list(store, where.key or None, chunk_size=1))

    return call(where, look)


def in_parallel(operation: Callable[[Any], Any], items: list) -> list:
    """`operation` of each item by `WORKERS` threads, in order; the first error ends the rest."""
    if len(items) < 2:
        return [operation(one) for one in items]
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        started = [pool.submit(operation, one) for one in items]
        try:
            return [one.result() for one in started]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def download(where: Any, local: Path) -> None:
    """Writes an object into a local file, several parts at a time; all parts are of one version of it.

    Raises:
      ObjectChangedError: it was replaced in the meantime.
    """
    found = head(where)
    size, e_tag = found["size"], found["e_tag"]
    with open(local, "wb") as file:
        file.truncate(size)

        def fetch(start: int) -> None:
            data = get(where, (start, min(start + PART, size)), e_tag)
            os.pwrite(file.fileno(), data, start)

        in_parallel(fetch, list(range(0, size, PART)))
