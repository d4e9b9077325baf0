"""Storage class and encryption at the server: which objects get them, what is refused, and that a server takes them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from snapchain.errors import InvalidInput, Unavailable
from snapchain.objects import open_store
from snapchain.objects.s3 import S3Store
from snapchain.objects.s3_settings import KMS_KEY, LOCK_DAYS, LOCK_MODE, SSE, STORAGE_CLASS, S3Settings, settings_of
from snapchain.objects.store import Refused
from tests.objects.scripted import Reply, error, scripted_server, stored
from tests.objects.test_s3_faults import shared_client
from tests.servers import S3Server, admin_client

NOW = datetime(2026, 11, 30, tzinfo=UTC)
PACK, RECORD = f"packs/aa/{'a' * 32}", f"layers/{'b' * 32}"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3Server("", "none", None).environment.items():  # type: ignore[arg-type]
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda _: None))


def test_only_packs_have_a_storage_class_and_everything_is_encrypted() -> None:
    settings = settings_of({STORAGE_CLASS: "GLACIER_IR", SSE: "aws:kms", KMS_KEY: "alias/vault"})
    encrypted = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "alias/vault"}
    assert settings.of(PACK, NOW) == {"StorageClass": "GLACIER_IR", **encrypted}
    assert settings.of(RECORD, NOW) == encrypted
    assert settings_of({STORAGE_CLASS: "", SSE: ""}).of(PACK, NOW) == {}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({STORAGE_CLASS: "DEEP_ARCHIVE"}, "packs in DEEP_ARCHIVE cannot be read at once"),
        ({STORAGE_CLASS: "GLACIER"}, "packs in GLACIER cannot be read at once"),
        ({SSE: "aws:KMS"}, "unknown encryption 'aws:KMS'"),
        ({KMS_KEY: "alias/vault"}, "names no encryption with such a key"),
        ({SSE: "AES256", KMS_KEY: "alias/vault"}, "names no encryption with such a key"),
        ({LOCK_MODE: "governance", LOCK_DAYS: "30"}, "unknown mode 'governance'"),
        ({LOCK_DAYS: "30"}, f"{LOCK_DAYS} is set, and {LOCK_MODE} is not"),
        ({LOCK_MODE: "COMPLIANCE"}, f"{LOCK_MODE} is set, and {LOCK_DAYS} is not"),
        ({LOCK_MODE: "COMPLIANCE", LOCK_DAYS: "0"}, "'0' is no number of days"),
        ({LOCK_MODE: "COMPLIANCE", LOCK_DAYS: "1.5"}, "'1.5' is no number of days"),
    ],
)
def test_what_cannot_be_meant_is_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        settings_of(variables)


def test_only_what_a_restore_needs_and_is_written_once_is_locked() -> None:
    settings = settings_of({LOCK_MODE: "GOVERNANCE", LOCK_DAYS: "30"})
    locked = {"ObjectLockMode": "GOVERNANCE", "ObjectLockRetainUntilDate": NOW + timedelta(days=30)}
    generation = f"disks/{'d' * 32}/{7:020d}"
    for name in (PACK, RECORD, generation):
        assert settings.of(name, NOW) == locked, name
    for name in (
        f"leases/v-{'1' * 32}",
        f"{generation}.claim.{'0' * 16}",
        f"index/condemned-{'2' * 32}",
        f"index/00000001-{'3' * 32}",
        f"verified/{'4' * 32}",
        f"probe/{'5' * 16}/body",
        "keys/1",
    ):
        assert settings.of(name, NOW) == {}, name


def test_the_headers_go_with_each_put() -> None:
    with scripted_server() as script:
        settings = S3Settings("STANDARD_IA", "AES256")
        store = S3Store("bucket", client=shared_client(script.endpoint), settings=settings)
        script.replies += [stored(b"pack"), stored(b"record")]
        store.put(PACK, b"pack")
        store.put(RECORD, b"record")
        sent = [
            {name.lower(): value for name, value in request.headers.items() if name.lower().startswith("x-amz-s")}
            for request in script.requests
        ]
    assert sent == [
        {"x-amz-storage-class": "STANDARD_IA", "x-amz-server-side-encryption": "AES256"},
        {"x-amz-server-side-encryption": "AES256"},
    ]


def test_a_class_that_the_server_does_not_have_is_named() -> None:
    with scripted_server() as script:
        store = S3Store("bucket", client=shared_client(script.endpoint), settings=S3Settings("COLD"))
        script.replies.append(error(400, "InvalidStorageClass"))
        with pytest.raises(InvalidInput, match="the server has no such storage class") as caught:
            store.put(PACK, b"pack")
    assert caught.value.hint == STORAGE_CLASS


def test_an_archived_object_is_no_damage() -> None:
    with scripted_server() as script:
        store = S3Store("bucket", client=shared_client(script.endpoint))
        script.replies.append(error(403, "InvalidObjectState"))
        with pytest.raises(Refused, match="the object is in an archive tier"):
            store.get(PACK)


def test_a_server_keeps_it_so(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORAGE_CLASS, "STANDARD_IA")
    monkeypatch.setenv(SSE, "AES256")
    bucket = moto.new_bucket()
    store = open_store(f"s3://{bucket}/place")
    assert store.create(PACK, b"pack")
    store.put(RECORD, b"record")
    assert store.get(PACK) == b"pack"
    heads = {
        name: admin_client(moto.endpoint).head_object(Bucket=bucket, Key=f"place/{name}") for name in (PACK, RECORD)
    }
    assert [head.get("StorageClass") for head in heads.values()] == ["STANDARD_IA", None]
    assert [head.get("ServerSideEncryption") for head in heads.values()] == ["AES256"] * 2


def test_where_the_server_does_not_tell_what_we_lock_counts_as_locked() -> None:
    written = datetime.now(UTC) - timedelta(days=10)
    head = Reply(200, b"", {"Last-Modified": written.strftime("%a, %d %b %Y %H:%M:%S GMT"), "ETag": '"x"'})
    denied = error(403, "AccessDenied")
    with scripted_server() as script:

        def asked(days: int, *replies: Reply) -> datetime | None:
            lock = S3Settings(lock_mode="GOVERNANCE", lock_days=days) if days else S3Settings()
            script.says(*replies)
            return S3Store("bucket", client=shared_client(script.endpoint), settings=lock).locked_until(PACK)

        until = asked(30, denied, head)
        assert until is not None
        assert abs(until - written - timedelta(days=30)) < timedelta(seconds=2)
        assert asked(5, denied, head) is None, "the lock has ended"
        assert asked(0, denied, head) is None, "nobody locks anything"
        assert asked(30, error(404, "ObjectLockConfigurationNotFoundError"), head) is None
        assert script.methods == ["GET"]
        with pytest.raises(Unavailable, match="overloaded or has a fault"):
            asked(0, error(500, "InternalError"))


@pytest.mark.parametrize(
    "words", ["Bucket is missing Object Lock Configuration", "Bucket is missing ObjectLockConfiguration"]
)
def test_a_bucket_that_cannot_lock_is_named(words: str) -> None:
    with scripted_server() as script:
        lock = S3Settings(lock_mode="GOVERNANCE", lock_days=30)
        store = S3Store("bucket", client=shared_client(script.endpoint), settings=lock)
        script.says(error(400, "InvalidRequest", words))
        with pytest.raises(InvalidInput, match="the bucket has no Object Lock") as caught:
            store.put(PACK, b"pack")
    assert caught.value.hint is not None
    assert "SNAPCHAIN_S3_LOCK_MODE" in caught.value.hint
