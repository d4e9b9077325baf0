"""Objects in an S3 bucket, below a prefix.

One PutObject per object, never a multipart upload: so a retry is the same request again, the ETag is the MD5, and no
parts of dead uploads are billed.  `create` is PutObject with `If-None-Match: *`.  Its one trap: when a reply is lost
and botocore repeats the request, the server says 412 about our own write.  Then the object is read and compared.
Source: Amazon S3 User Guide, "How to prevent object overwrites with conditional writes".
"""

from __future__ import annotations

import hashlib
import random
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.objects.s3_client import is_amazon, new_client, warnings_about
from snapchain.objects.s3_errors import from_s3_error, s3_errors, status_of, was_retried
from snapchain.objects.store import (
    Data,
    ObjectInfo,
    Properties,
    directory_prefix,
    joined,
    valid_name,
    valid_prefix,
    valid_range,
    valid_size,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef, ListObjectsV2OutputTypeDef, PutObjectOutputTypeDef

READ_ATTEMPTS = 5
"""botocore repeats a request until it is answered, but not when the answer's body breaks off."""
CONFLICT_ATTEMPTS = 8
"""Of a create that the server answers with 409: another conditional request for the name was under way."""
PAGE = 1000
"""Names a listing's page, S3's own limit."""


class S3Store:
    """An ObjectStore in a bucket that exists.

    `properties.conditional_put` is None until the opener sets it to what a probe found; until it is true, `create`
    first looks whether the object is there, which is no protection from others but never replaces an old object.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        client: S3Client | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`client` as new_client gives it.  Sends nothing.  Raises InvalidInput for an unusable configuration."""
        if not bucket:
            raise InvalidInput("no bucket is named", hint="s3://bucket/prefix")
        self._client = client if client is not None else new_client(endpoint)
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._sleep = sleep
        self._page = PAGE
        self.endpoint = self._client.meta.endpoint_url
        self.url = f"s3://{bucket}/{self._prefix}".rstrip("/")
        self.properties = Properties(conditional_put=None, description=f"bucket {bucket} at {self.endpoint}")
        self.warnings = warnings_about(self.endpoint)

    def put(self, name: str, data: Data) -> None:
        valid_name(name)
        body = joined(data)
        with s3_errors(self._subject(name)):
            self._send(name, body, create=False)

    def create(self, name: str, data: Data) -> bool:
        """As ObjectStore.create.  Unavailable means that it is not known whether the object was made."""
        valid_name(name)
        body = joined(data)
        if self.properties.conditional_put is not True and self.size(name) is not None:
            return False
        from botocore.exceptions import BotoCoreError, ClientError

        for attempt in range(CONFLICT_ATTEMPTS):
            try:
                self._send(name, body, create=True)
            except ClientError as error:
                status = status_of(error)
                if status == 409:
                    self._sleep(random.uniform(0, 0.05 * 2**attempt))  # noqa: S311
                    continue
                if status == 412 and not was_retried(error):
                    return False
                if status == 412 or status >= 500:
                    return self._settled(name, body, from_s3_error(error, self._subject(name)))
                raise from_s3_error(error, self._subject(name)) from error
            except BotoCoreError as error:
                meant = from_s3_error(error, self._subject(name))
                if type(meant) is not Unavailable:  # nothing was sent: no credentials, no TLS, no such name
                    raise meant from error
                return self._settled(name, body, meant)
            else:
                return True
        raise Conflict(
            "others keep creating this object at the same time", subject=self._subject(name), hint="run it again later"
        )

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        valid_name(name)
        valid_range(name, offset, length)
        if length == 0:  # HTTP has no empty range
            return self._nothing_at(name, offset)
        doubtful: tuple[bytes, str] | None = None
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                with s3_errors(self._subject(name)):
                    body, etag = self._received(name, offset, length)
            except Unavailable as error:
                if attempt == READ_ATTEMPTS or type(error) is not Unavailable:
                    raise
            else:
                # When both come the same again, then this server's ETag is no MD5.
                if etag is None or (body, etag) == doubtful:
                    return body
                doubtful = body, etag
            self._sleep(random.uniform(0, 0.2 * attempt))  # noqa: S311
        raise Corrupt("what is read differs from its ETag, and from one read to the next", subject=self._subject(name))

    def size(self, name: str) -> int | None:
        valid_name(name)
        try:
            with s3_errors(self._subject(name)):
                return self._client.head_object(Bucket=self._bucket, Key=self._key(name))["ContentLength"]
        except NotFound:
            return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._listed(valid_prefix(prefix))

    def list_dirs(self, prefix: str) -> Iterator[str]:
        folder = directory_prefix(prefix)
        found = {
            common["Prefix"].removeprefix(self._prefix + folder).rstrip("/")
            for page in self._pages(folder, delimiter="/")
            for common in page.get("CommonPrefixes", [])
        }
        return iter(sorted(name for name in found if _is_ours(f"{folder}{name}")))

    def top_names(self) -> Sequence[str]:
        """First segments of keys below the prefix, ours or not; those of one page."""
        page = next(self._pages("", delimiter="/"))
        keys = [each["Key"] for each in page.get("Contents", [])]
        folders = [each["Prefix"].rstrip("/") for each in page.get("CommonPrefixes", [])]
        names = (key.removeprefix(self._prefix) for key in [*keys, *folders])
        return [name for name in names if name]  # without: a folder that a console has made

    def delete(self, name: str) -> None:
        valid_name(name)
        try:
            with s3_errors(self._subject(name)):
                self._client.delete_object(Bucket=self._bucket, Key=self._key(name))
        except NotFound as error:
            if "bucket" in error.message:
                raise

    def close(self) -> None:
        self._client.close()

    def refuses_damage(self, name: str) -> bool:
        """Whether a PUT whose Content-MD5 is of other bytes is refused; when not, the object is there afterwards."""
        from botocore.exceptions import ClientError

        wrong = b64encode(hashlib.md5(b"other bytes", usedforsecurity=False).digest()).decode()
        with s3_errors(self._subject(valid_name(name))):
            try:
                self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=b"bytes", ContentMD5=wrong)
            except ClientError as error:
                if 400 <= status_of(error) < 500 and status_of(error) not in {401, 403, 404}:
                    return True
                raise
        return False

    # ---- requests

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _subject(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _send(self, name: str, body: bytes, *, create: bool) -> None:
        """PutObject.  Raises botocore's errors, and Corrupt when the ETag says that other bytes were stored."""
        md5 = hashlib.md5(body, usedforsecurity=False)
        more: dict[str, Any] = {"IfNoneMatch": "*"} if create else {}
        if is_amazon(self.endpoint):  # elsewhere accepted even when it is wrong
            more["ChecksumSHA256"] = b64encode(hashlib.sha256(body).digest()).decode()
        answer = self._client.put_object(
            Bucket=self._bucket,
            Key=self._key(name),
            Body=body,
            ContentMD5=b64encode(md5.digest()).decode(),
            **more,
        )
        etag = _md5_of(answer)
        if etag is not None and etag != md5.hexdigest():
            raise Corrupt("the server says that it stored other bytes than were sent", subject=self._subject(name))

    def _settled(self, name: str, body: bytes, doubt: SnapchainError) -> bool:
        """Whether the object that is there now is the one that we sent; raises `doubt` when none is."""
        try:
            return self.get(name) == body
        except NotFound:
            raise doubt from None

    def _received(self, name: str, offset: int, length: int | None) -> tuple[bytes, str | None]:
        """(body, ETag that it contradicts) of one GetObject, checked against what was asked for.

        A contradiction is damage on the way, or a server that lets a replacement get between an object's head and
        its body (rclone does).
        """
        from botocore.exceptions import ClientError

        whole = offset == 0 and length is None
        asked: dict[str, Any] = (
            {} if whole else {"Range": f"bytes={offset}-{'' if length is None else offset + length - 1}"}
        )
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(name), **asked)
        except ClientError as error:
            if status_of(error) == 416 and length is None:
                return self._nothing_at(name, offset), None
            raise
        stream = answer["Body"]
        try:
            valid_size(self._subject(name), answer["ContentLength"])
            body = stream.read()
        finally:
            stream.close()
        # Not by the status: rclone sends a range with 200.  A server may also ignore the range and send the whole.
        sent = answer.get("ContentRange", "")
        if not sent:
            body = body[offset:] if length is None else body[offset : offset + length]
        elif not sent.startswith(f"bytes {offset}-"):
            raise Unsupported(f"the server sends {sent}, not bytes from {offset} on", subject=self._subject(name))
        if length is not None and len(body) != length:
            raise Corrupt(
                f"object ends {length - len(body)} bytes before {offset + length}", subject=self._subject(name)
            )
        etag = _md5_of(answer) if whole else None
        same = etag is None or etag == hashlib.md5(body, usedforsecurity=False).hexdigest()
        return body, None if same else etag

    def _nothing_at(self, name: str, offset: int) -> bytes:
        """No bytes, of an object that exists and is at least `offset` long."""
        size = self.size(name)
        if size is None:
            raise NotFound("no such object", subject=self._subject(name))
        if offset > size:
            raise Corrupt(f"object has {size} bytes, none at {offset}", subject=self._subject(name))
        return b""

    def _listed(self, prefix: str) -> Iterator[ObjectInfo]:
        last: str | None = None
        for page in self._pages(prefix):
            # Sorted again: rclone sorts before it sees that an upload got its final name.
            entries = sorted(page.get("Contents", []), key=lambda entry: entry["Key"])
            for entry in entries:
                name = entry["Key"].removeprefix(self._prefix)
                if last is not None and name <= last:
                    raise Unavailable(
                        "the server's listing is not in the order of names",
                        subject=self.url,
                        hint="run it again; a bucket that never sorts (S3 Express) cannot hold a repository",
                    )
                last = name
                if _is_ours(name):  # another program may keep objects of its own below our prefix
                    yield ObjectInfo(name, entry["Size"], entry["LastModified"].timestamp())

    def _pages(self, prefix: str, *, delimiter: str | None = None) -> Iterator[ListObjectsV2OutputTypeDef]:
        more: dict[str, Any] = {} if delimiter is None else {"Delimiter": delimiter}
        while True:
            with s3_errors(self._subject(prefix)):
                page = self._client.list_objects_v2(
                    Bucket=self._bucket,
                    Prefix=self._prefix + prefix,
                    MaxKeys=self._page,
                    **more,
                )
            yield page
            following = page.get("NextContinuationToken") if page.get("IsTruncated") else None
            if following is None:
                return
            if following == more.get("ContinuationToken"):
                raise Unsupported("the server's listing does not get on", subject=self.url)
            more["ContinuationToken"] = following


def _md5_of(answer: PutObjectOutputTypeDef | GetObjectOutputTypeDef) -> str | None:
    """The ETag when it is an MD5: 32 hex digits, and no key service in between (then it is 32 other digits)."""
    etag = answer.get("ETag", "").strip('"').lower()
    plain = answer.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in answer
    return etag if plain and len(etag) == 32 and set(etag) <= set("0123456789abcdef") else None


def _is_ours(name: str) -> bool:
    try:
        valid_name(name)
    except InvalidInput:
        return False
    return True
