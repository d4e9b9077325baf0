"""Objects in an S3 bucket, below a prefix.

One PutObject per object, never a multipart upload: so a retry is the same request again, the ETag is the MD5, and no
parts of dead uploads are billed.  `create` is PutObject with `If-None-Match: *`.  Its one trap: when a reply is lost
and botocore repeats the request, the server says 412 about our own write.  Then the object is read and compared.
Source: Amazon S3 User Guide, "How to prevent object overwrites with conditional writes".
"""

from __future__ import annotations

import hashlib
import io
import random
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.objects.meter import Meter
from snapchain.objects.pace import Pace
from snapchain.objects.s3_client import (
    ANSWER_WITHIN,
    CONNECTIONS,
    Patience,
    Watch,
    WatchedBody,
    canonical,
    expect_no_continue,
    is_amazon,
    new_client,
    warnings_about,
)
from snapchain.objects.s3_errors import (
    from_s3_error,
    malformed,
    note_retries,
    page_error,
    refuses_pace,
    s3_errors,
    status_of,
    was_retried,
)
from snapchain.objects.s3_listing import Listing
from snapchain.objects.s3_settings import AS_THE_BUCKET, S3Settings
from snapchain.objects.store import (
    LARGEST_LISTED_SIZE,
    Data,
    NoConditions,
    ObjectInfo,
    Properties,
    check_size,
    directory_prefix,
    joined,
    most_listed,
    valid_name,
    valid_prefix,
    valid_range,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import (
        GetObjectOutputTypeDef,
        HeadObjectOutputTypeDef,
        ListObjectsV2OutputTypeDef,
        PutObjectOutputTypeDef,
    )

READ_ATTEMPTS = 5
"""botocore repeats a request until it is answered, but not when the answer's body breaks off."""
MOST_TIMEOUTS = 2
"""Of a body that stops coming: each takes READ_TIMEOUT seconds."""
CONFLICT_ATTEMPTS = 8
"""Of a create that the server answers with 409: another conditional request for the name was under way."""
PAGE = 1000
"""Names a listing's page, S3's own limit."""
IDLE_PAGES = 200
IDLE_SECONDS = 600.0
"""Consecutive pages without a new name, and their time, after which the listing is given up."""
_LONGEST_TOKEN = 4096
"""Bytes of a continuation token; those of AWS have some 100."""
_PART = 64 * 1024
"""Bytes of a body that are progress."""
_NONSENSE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)

Result = TypeVar("Result")


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
        profile: str | None = None,
        client: S3Client | None = None,
        sleep: Callable[[float], None] = time.sleep,
        answer_within: float = ANSWER_WITHIN,
        settings: S3Settings = AS_THE_BUCKET,
    ) -> None:
        """Sends nothing.

        client: as new_client gives it; answer_within: seconds without progress after which a request is given up.
        settings: how the server is to keep what is put there.
        Raises InvalidInput for an unusable configuration.
        """
        if not bucket:
            raise InvalidInput("no bucket is named", hint="s3://bucket/prefix")
        self._client = client if client is not None else new_client(endpoint, profile=profile)
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._settings = settings
        self._sleep = sleep
        self._page = PAGE
        self._bucket_seen = False
        self._expects = True
        self._knows_conditions = True
        self._has_lock: bool | None = None
        self._etags_are_md5 = False
        """Whether this server has ever given the MD5 of a whole object as its ETag."""
        self.endpoint = self._client.meta.endpoint_url
        self.meter = Meter()
        self._patience = Patience(urlsplit(self.endpoint).netloc, limit=answer_within, meter=self.meter)
        self._pace = Pace(CONNECTIONS, sleep=sleep)
        self.url = f"s3://{bucket}/{self._prefix}".rstrip("/")
        self.place = f"bucket {bucket} at {canonical(self.endpoint)}"
        self.properties = Properties(
            conditional_put=None, description=f"bucket {bucket} at {self.endpoint}", is_remote=True
        )
        self.warnings = warnings_about(self.endpoint)

    def put(self, name: str, data: Data) -> None:
        valid_name(name)
        body = joined(data)
        with s3_errors(self._subject(name), sent=len(body)):
            self._send(name, body, create=False)

    def create(self, name: str, data: Data) -> bool:
        """As ObjectStore.create.  Unavailable means that it is not known whether the object was made.

        Raises NoConditions where `properties.conditional_put` is true and the server does none.
        """
        valid_name(name)
        body = joined(data)
        if self.properties.conditional_put is not True and self.size(name) is not None:
            return False
        from botocore.exceptions import BotoCoreError, ClientError

        for attempt in range(CONFLICT_ATTEMPTS):
            conditional = self._knows_conditions
            try:
                self._send(name, body, create=conditional)
            except ClientError as error:
                status = status_of(error)
                if status == 501 and conditional:  # OpenStack Swift, where other servers ignore the condition
                    if self.properties.conditional_put is True:
                        raise NoConditions(
                            "the server does no conditional writes (If-None-Match)", subject=self._subject(name)
                        ) from error
                    self._knows_conditions = False
                    continue
                if status == 409:
                    self._sleep(random.uniform(0, 0.05 * 2**attempt))  # noqa: S311
                    continue
                if status == 412 and not was_retried(error):
                    return False
                meant = from_s3_error(error, self._subject(name), sent=len(body))
                if status == 412 or status >= 500:
                    return self._settled(name, body, meant)
                raise meant from error
            except BotoCoreError as error:
                meant = from_s3_error(error, self._subject(name), sent=len(body))
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
        timeouts = 0
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                with s3_errors(self._subject(name)):
                    body, etag = self._received(name, offset, length)
            except Unavailable as error:
                timeouts += _is_timeout(error)
                if timeouts == MOST_TIMEOUTS:
                    self._patience.give_up()
                is_last = attempt == READ_ATTEMPTS or refuses_pace(error.__cause__)
                if is_last or type(error) is not Unavailable or self._patience.is_closed:
                    raise
            else:
                # When both come the same again, then this server's ETag is no MD5; unless it has been one before:
                # an object that is replaced again and again by the same ones can be torn in the same way twice.
                # (An empty one contradicts nothing: a server that stores no MD5s has no other for its objects.)
                if etag is None or ((body, etag) == doubtful and not (etag and self._etags_are_md5)):
                    return body
                doubtful = body, etag
            self._sleep(random.uniform(0, 0.2 * attempt))  # noqa: S311
        is_torn = doubtful is not None and doubtful[1] == ""
        words = "it is replaced while it is read" if is_torn else "what is read differs from its ETag"
        raise Corrupt(f"{words}, {READ_ATTEMPTS} times", subject=self._subject(name))

    def size(self, name: str) -> int | None:
        valid_name(name)
        from botocore.exceptions import ClientError

        with s3_errors(self._subject(name)):
            try:
                answer = self._ask(name, lambda _: self._client.head_object(Bucket=self._bucket, Key=self._key(name)))
            except ClientError as error:
                # No body comes with the answer to a HEAD, and so no reason: not that the whole bucket is missing,
                # nor that a key has expired. Asked with a GET, the server gives it.
                if status_of(error) != 404:
                    self._raise_reason(name)
                    raise
                if not self._bucket_seen:
                    self._raise_reason(name)
                return None
        _check_page(answer, self._subject(name))
        length: int | None = answer.get("ContentLength")
        if length is None or not 0 <= length <= LARGEST_LISTED_SIZE:
            raise malformed(self._subject(name), f"the length of the object is {length}")
        return length

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As ObjectStore.list. The whole listing is fetched first: not every server sorts its pages."""
        return iter(self._listed(valid_prefix(prefix)))

    def list_dirs(self, prefix: str) -> Iterator[str]:
        return iter(sorted(self._listed(directory_prefix(prefix), delimiter="/").folders))

    def list_in_pages(self, prefix: str, page: int) -> Sequence[str]:
        """The names that `list` gives, asked for in pages of so many; for the probe."""
        return [info.name for info in self._listed(valid_prefix(prefix), page=page)]

    def list_dirs_in_pages(self, prefix: str, page: int) -> Sequence[str]:
        """The names that `list_dirs` gives, asked for in pages of so many; for the probe."""
        return sorted(self._listed(directory_prefix(prefix), delimiter="/", page=page).folders)

    def top_names(self) -> Sequence[str]:
        """First segments of keys below the prefix, ours or not, from one page."""
        page = next(self._pages(self._prefix, delimiter="/", page=PAGE))
        keys = [each.get("Key", "") for each in page.get("Contents", [])]
        folders = [each.get("Prefix", "").rstrip("/") for each in page.get("CommonPrefixes", [])]
        names = (key.removeprefix(self._prefix) for key in [*keys, *folders])
        return [name for name in names if name]  # without: a folder that a console has made

    def delete(self, name: str) -> None:
        valid_name(name)
        try:
            with s3_errors(self._subject(name)):
                self._ask(name, lambda _: self._client.delete_object(Bucket=self._bucket, Key=self._key(name)))
        except NotFound as error:
            if "bucket" in error.message:
                raise

    def locked_until(self, name: str) -> datetime | None:
        """As objects/store.py `Locks`. A bucket without Object Lock is asked once."""
        from botocore.exceptions import ClientError

        valid_name(name)
        if not self._can_lock():
            return None
        with s3_errors(self._subject(name)):
            try:
                head = self._ask(name, lambda _: self._client.head_object(Bucket=self._bucket, Key=self._key(name)))
            except ClientError as error:
                if status_of(error) == 404:
                    return None
                raise
        if head.get("ObjectLockLegalHoldStatus") == "ON":
            return datetime.max.replace(tzinfo=UTC)
        until: datetime | None = head.get("ObjectLockRetainUntilDate")
        if until is None and "ObjectLockRetainUntilDate" in self._settings.of(name, datetime.now(UTC)):
            # Without s3:GetObjectRetention S3 does not tell: then what was written with our settings counts as locked.
            until = head["LastModified"] + timedelta(days=self._settings.lock_days)
        return until if until is not None and until > datetime.now(UTC) else None

    def _can_lock(self) -> bool:
        """Whether the bucket has Object Lock; where that is not told, whether we are to lock."""
        from botocore.exceptions import ClientError

        if self._has_lock is None:
            with s3_errors(self.url):
                try:
                    answer = self._ask("", lambda _: self._client.get_object_lock_configuration(Bucket=self._bucket))
                except ClientError as error:
                    if status_of(error) >= 500 and status_of(error) != 501:
                        raise
                    code = str(error.response.get("Error", {}).get("Code", ""))
                    has_none = code == "ObjectLockConfigurationNotFoundError"
                    self._has_lock = not has_none and self._settings.lock_mode is not None
                else:
                    found = answer.get("ObjectLockConfiguration", {})
                    self._has_lock = found.get("ObjectLockEnabled") == "Enabled"
        return self._has_lock

    def close(self) -> None:
        self._client.close()

    def refuses_damage(self, name: str) -> bool:
        """Whether a PUT whose Content-MD5 is of other bytes is refused; when not, the object is there afterwards."""
        from botocore.exceptions import ClientError

        wrong = b64encode(hashlib.md5(b"other bytes", usedforsecurity=False).digest()).decode()
        with s3_errors(self._subject(valid_name(name))):
            try:
                self._put(name, b"bytes", {"ContentMD5": wrong})
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

    def _ask(self, name: str, request: Callable[[Watch], Result]) -> Result:
        """What the request returns, made at the store's pace.

        Raises botocore's errors, Silent when no answer comes, Unsupported for nonsense.
        """
        tries = 0

        def parsed(watch: Watch) -> Result:
            try:
                return request(watch)
            except SnapchainError:
                raise
            except _NONSENSE as error:  # botocore's parser, about a number, a time or a tag that is none
                raise malformed(self._subject(name), f"{type(error).__name__}: {error}") from error

        def tried() -> Result:
            nonlocal tries
            tries += 1
            if tries > 1:
                self.meter.repeated()
            return self._patience.within(parsed, subject=self._subject(name))

        def is_refusal(error: Exception) -> bool:
            if not refuses_pace(error):
                return False
            self.meter.refused()
            return True

        try:
            answer = self._pace.ask(tried, is_refusal=is_refusal)
        except Exception as error:
            note_retries(error, tries - 1)
            raise
        self._bucket_seen = True
        return answer

    def _send(self, name: str, body: bytes, *, create: bool) -> None:
        """PutObject.  Raises botocore's errors, and Corrupt when the ETag says that other bytes were stored."""
        md5 = hashlib.md5(body, usedforsecurity=False)
        more: dict[str, Any] = {"ContentMD5": b64encode(md5.digest()).decode()}
        if create:
            more["IfNoneMatch"] = "*"
        if is_amazon(self.endpoint):  # elsewhere accepted even when it is wrong
            more["ChecksumSHA256"] = b64encode(hashlib.sha256(body).digest()).decode()
        answer = self._put(name, body, more)
        if not answer.get("ETag"):
            _check_page(answer, self._subject(name))
        etag = _md5_of(answer)
        if etag is not None and etag != md5.hexdigest():
            raise Corrupt("the server says that it stored other bytes than were sent", subject=self._subject(name))
        self._etags_are_md5 |= etag is not None

    def _put(self, name: str, body: bytes, more: dict[str, Any]) -> PutObjectOutputTypeDef:
        """PutObject; again without `Expect: 100-continue`, and then never with it, where a proxy answers 417."""
        from botocore.exceptions import ClientError

        def request(watch: Watch) -> PutObjectOutputTypeDef:
            sent = WatchedBody(body, watch)
            kept: dict[str, Any] = {**more, **self._settings.of(name, datetime.now(UTC))}
            return self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=sent, **kept)

        expected = self._expects
        try:
            return self._ask(name, request)
        except ClientError as error:
            if status_of(error) != 417 or not expected:
                raise
        if self._expects:
            self._expects = False
            expect_no_continue(self._client)
        return self._ask(name, request)

    def _raise_reason(self, name: str) -> None:
        """Read one byte of an object, to raise the server's error with its code. No error when it is only missing."""
        from botocore.exceptions import ClientError

        try:
            self._read(name, {"Range": "bytes=0-0"})
        except ClientError as error:
            reason = from_s3_error(error, self._subject(name))
            if isinstance(reason, NotFound) and "bucket" not in reason.message:
                self._bucket_seen = True
            elif status_of(error) != 416:
                raise

    def _settled(self, name: str, body: bytes, doubt: SnapchainError) -> bool:
        """Whether the object that is there now is the one that we sent; raises `doubt` when none is."""
        try:
            return self.get(name) == body
        except NotFound:
            raise doubt from None

    def _read(
        self, name: str, more: dict[str, Any], *, offset: int = 0, length: int | None = None
    ) -> tuple[bytes, GetObjectOutputTypeDef]:
        """Body and head of one GetObject, of which no more is read than was asked for, or than the object may have.

        offset, length: as of `get`; a server may ignore the range and send the whole object
        """
        subject = self._subject(name)

        def request(watch: Watch) -> tuple[bytes, GetObjectOutputTypeDef]:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(name), **more)
            watch.progress()
            stream = answer["Body"]
            try:
                _check_length(name, answer, subject)
                # Not by the status: rclone sends a range with 200.
                begin = offset if more and not answer.get("ContentRange") else 0
                stop = None if length is None else begin + length
                body = io.BytesIO()  # whose value is not copied
                seen = 0
                for part in stream.iter_chunks(_PART):
                    self.meter.received(len(part))
                    body.write(part[max(0, begin - seen) : None if stop is None else max(0, stop - seen)])
                    seen += len(part)
                    check_size(name, seen if begin else body.tell(), subject=subject)
                    watch.progress()
                    if stop is not None and seen >= stop:
                        break
            finally:
                stream.close()
            return body.getvalue(), answer

        body, answer = self._ask(name, request)
        _check_page(answer, subject)
        return body, answer

    def _received(self, name: str, offset: int, length: int | None) -> tuple[bytes, str | None]:
        """(body, ETag that it contradicts) of one GetObject, checked against what was asked for.

        A contradiction is damage on the way, or a server that lets a replacement get between an object's head and
        its body (rclone does). It then may send no ETag at all (rclone: one that is empty): where MD5s are usual,
        that is doubtful, too, and given as an empty string.
        """
        from botocore.exceptions import ClientError

        subject = self._subject(name)
        check_size(name, length or 0, subject=subject)
        whole = offset == 0 and length is None
        asked: dict[str, Any] = (
            {} if whole else {"Range": f"bytes={offset}-{'' if length is None else offset + length - 1}"}
        )
        try:
            body, answer = self._read(name, asked, offset=offset, length=length)
        except ClientError as error:
            if status_of(error) == 416 and length is None:
                return self._nothing_at(name, offset), None
            raise
        sent = answer.get("ContentRange", "")
        if sent and not sent.startswith(f"bytes {offset}-"):
            raise Unsupported(f"the server sends {sent[:100]}, not bytes from {offset} on", subject=subject)
        if length is not None and len(body) != length:
            raise Corrupt(f"object ends {length - len(body)} bytes before {offset + length}", subject=subject)
        if whole and self._etags_are_md5 and not answer.get("ETag", "").strip('"'):
            return body, ""
        etag = _md5_of(answer) if whole else None
        if etag is None:
            return body, None
        same = etag == hashlib.md5(body, usedforsecurity=False).hexdigest()
        self._etags_are_md5 |= same
        return body, None if same else etag

    def _nothing_at(self, name: str, offset: int) -> bytes:
        """No bytes, of an object that exists and is at least `offset` long."""
        size = self.size(name)
        if size is None:
            raise NotFound("no such object", subject=self._subject(name))
        if offset > size:
            raise Corrupt(f"object has {size} bytes, none at {offset}", subject=self._subject(name))
        return b""

    # ---- listings

    def _listed(self, prefix: str, *, delimiter: str | None = None, page: int | None = None) -> Listing:
        """Our objects below the prefix; with a delimiter only the next segments.

        Nothing is taken for granted: pages may come in any order, be empty, repeat keys, and hold keys of others.
        Raises Unsupported for a listing that does not end.
        """
        start = self._prefix + prefix
        found = Listing()
        most = most_listed(prefix)
        idle, moved = 0, time.monotonic()
        for answer in self._pages(start, delimiter=delimiter, page=page or self._page):
            before = len(found)
            for entry in answer.get("Contents", []):
                key = entry.get("Key", "")
                name = key.removeprefix(self._prefix)
                # Another program may keep objects of its own below our prefix.
                if not key.startswith(start) or not _is_ours(name):
                    continue
                segment, more, _ = key.removeprefix(start).partition("/")
                if delimiter is not None and more:  # a server without delimiters
                    found.folders.add(segment)
                elif delimiter is None:
                    found.add(name, entry.get("Size"), entry.get("LastModified"), subject=self._subject(name))
            for common in answer.get("CommonPrefixes", []):
                folder = common.get("Prefix", "")
                if folder.startswith(start) and _is_ours(folder.removeprefix(self._prefix).rstrip("/")):
                    found.folders.add(folder.removeprefix(start).rstrip("/"))
            if len(found) > before:
                idle, moved = 0, time.monotonic()
            else:
                idle += 1
            if idle > IDLE_PAGES or (idle > 1 and time.monotonic() - moved > IDLE_SECONDS):
                raise Unsupported("the server's listing does not end, and brings no new names", subject=self.url)
            if len(found) > most:
                raise Unsupported(
                    f"the server lists more than {most} objects under {prefix}",
                    subject=self.url,
                    hint="check that it is the right server. A repository with so many packs needs larger ones: "
                    "--pack-size 128M",
                )
        return found

    def _pages(self, start: str, *, delimiter: str | None, page: int) -> Iterator[ListObjectsV2OutputTypeDef]:
        more: dict[str, Any] = {} if delimiter is None else {"Delimiter": delimiter}
        tokens: set[str] = set()

        def request(_: Watch) -> ListObjectsV2OutputTypeDef:
            return self._client.list_objects_v2(Bucket=self._bucket, Prefix=start, MaxKeys=page, **more)

        name = start.removeprefix(self._prefix)
        while True:
            with s3_errors(self._subject(name)):
                answer = self._ask(name, request)
            if "IsTruncated" not in answer:  # a page that happens to be XML would pass for an empty listing
                raise page_error(self._subject(name))
            yield answer
            if not answer["IsTruncated"]:
                return
            following = answer.get("NextContinuationToken")
            if not following:
                raise Unsupported(
                    "the server truncated its listing, and returned no continuation token",
                    subject=self.url,
                    hint="it must support ListObjectsV2",
                )
            if len(following) > _LONGEST_TOKEN:
                raise malformed(self.url, f"a continuation token of {len(following)} characters")
            if following in tokens:
                raise Unsupported("the server returned the same continuation token twice", subject=self.url)
            tokens.add(following)
            more["ContinuationToken"] = following


def _check_length(name: str, answer: GetObjectOutputTypeDef, subject: str) -> None:
    """Raises Corrupt for an object that is too large, Unsupported for one of which the end could not be told."""
    length: int | None = answer.get("ContentLength")
    if length is not None:
        check_size(name, length, subject=subject)
    if length is None and answer["ResponseMetadata"]["HTTPHeaders"].get("transfer-encoding", "").lower() != "chunked":
        raise malformed(subject, "the length of the object is missing")


def _check_page(
    answer: PutObjectOutputTypeDef | GetObjectOutputTypeDef | HeadObjectOutputTypeDef, subject: str
) -> None:
    """Raises Unsupported for a web page, which a portal or a proxy sends with status 200 whatever it is asked."""
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    of_s3 = _md5_of(answer) is not None or any(name.startswith("x-amz-") for name in headers)
    if headers.get("content-type", "").startswith("text/html") and not of_s3:
        raise page_error(subject)


def _is_timeout(error: Unavailable) -> bool:
    """Whether the server was silent for READ_TIMEOUT in the middle of its answer."""
    from botocore.exceptions import ReadTimeoutError

    return isinstance(error.__cause__, ReadTimeoutError)


def _md5_of(answer: PutObjectOutputTypeDef | GetObjectOutputTypeDef | HeadObjectOutputTypeDef) -> str | None:
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
