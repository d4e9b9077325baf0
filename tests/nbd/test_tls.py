"""TLS: libnbd as the client, certificates of an authority made for the test, and clients that lack one."""

from __future__ import annotations

import socket
import ssl
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from snapchain.errors import InvalidInput, NotFound
from snapchain.nbd.exports import Export, Exports
from snapchain.nbd.listening import tcp_listener, tls_context
from snapchain.nbd.server import Server
from tests.nbd.serving import Loaders, MadeDisk, reading_of
from tests.waiting import HANG, wait_until


class Authority:
    """Signs certificates. folder: gets those of a server and of a client, as QEMU and libnbd name them"""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        self.folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the test's authority")])
        own = self._built(self._name, self._key.public_key(), x509.BasicConstraints(ca=True, path_length=0))
        self._write("ca-cert.pem", own.public_bytes(serialization.Encoding.PEM))
        for kind in ("server", "client"):
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, kind)])
            made = self._built(subject, key.public_key(), x509.BasicConstraints(ca=False, path_length=None))
            self._write(f"{kind}-cert.pem", made.public_bytes(serialization.Encoding.PEM))
            plain = serialization.NoEncryption()
            form = serialization.PrivateFormat.PKCS8
            self._write(f"{kind}-key.pem", key.private_bytes(serialization.Encoding.PEM, form, plain))

    def _built(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, kind: x509.BasicConstraints
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
        built = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key)
        built = built.serial_number(x509.random_serial_number()).add_extension(kind, critical=True)
        built = built.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        return built.add_extension(names, critical=False).sign(self._key, hashes.SHA256())

    def _write(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)
        (self.folder / name).chmod(0o600)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "ours")


@contextmanager
def serving(disk: MadeDisk, loaders: Loaders, folder: Path) -> Iterator[tuple[Server, int]]:
    reading = reading_of(disk, loaders(disk))
    export = Export("disk", disk.size, "made", lambda: nullcontext(reading))
    with (
        Exports([export]) as exports,
        tcp_listener("127.0.0.1", 0, has_tls=True) as listening,
        Server(
            exports, [listening], on_fault=lambda *_: None, on_note=lambda _: None, tls=tls_context(folder)
        ) as server,
    ):
        yield server, listening.getsockname()[1]


@pytest.fixture
def port(authority: Authority, loaders: Loaders) -> Iterator[int]:
    with serving(MadeDisk(40), loaders, authority.folder) as (server, number):
        yield number
        wait_until(lambda: not server.connected)


def test_a_client_with_a_certificate_reads_by_several_connections(
    authority: Authority, port: int, tmp_path: Path
) -> None:
    uri = f"nbds://localhost:{port}/disk?tls-certificates={authority.folder}"
    subprocess.run(["nbdcopy", uri, tmp_path / "copy"], check=True)
    assert (tmp_path / "copy").read_bytes() == MadeDisk(40).content


def test_qemu_reads_with_its_own_tls(authority: Authority, port: int) -> None:
    words = [
        "qemu-io", "--object", f"tls-creds-x509,id=t,endpoint=client,dir={authority.folder}", "--image-opts",
        f"driver=nbd,host=127.0.0.1,port={port},export=disk,tls-creds=t,tls-hostname=localhost", "-r",
        "-c", "read -P 40 2555904 64k", "-c", "aio_read -P 1 0 64k", "-c", "aio_flush",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "failed" not in done.stdout, done.stdout


def test_who_has_no_certificate_or_wants_no_tls_learns_nothing(authority: Authority, port: int, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    for name, place in (("ca-cert.pem", authority), ("client-cert.pem", other), ("client-key.pem", other)):
        (stranger / name).write_bytes((place.folder / name).read_bytes())
    nobody = tmp_path / "nobody"
    nobody.mkdir()
    (nobody / "ca-cert.pem").write_bytes((authority.folder / "ca-cert.pem").read_bytes())
    for uri in (
        f"nbd://localhost:{port}/disk",
        f"nbds://localhost:{port}/disk?tls-certificates={stranger}",
        f"nbds://localhost:{port}/disk?tls-certificates={nobody}",
    ):
        done = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
    done = subprocess.run(["nbdinfo", "--list", f"nbd://localhost:{port}"], capture_output=True, text=True, check=False)
    assert "disk" not in done.stdout


def test_what_follows_starttls_in_the_clear_is_not_taken_for_secured(port: int) -> None:
    """Injected by somebody between client and server, it would be an option of the client's."""
    with socket.create_connection(("127.0.0.1", port), timeout=HANG) as client:
        assert client.recv(18, socket.MSG_WAITALL) == b"NBDMAGICIHAVEOPT\0\3"
        start_tls = b"IHAVEOPT" + struct.pack(">II", 5, 0)
        client.sendall(b"\0\0\0\3" + start_tls + b"IHAVEOPT" + struct.pack(">II", 3, 0))
        reply = client.recv(20, socket.MSG_WAITALL)
        assert reply[12:16] == b"\0\0\0\1"
        rest = b""
        while more := client.recv(4096):
            rest += more
    assert b"disk" not in rest


def test_no_old_version_of_tls(authority: Authority, port: int) -> None:
    context = ssl.create_default_context(cafile=str(authority.folder / "ca-cert.pem"))
    context.load_cert_chain(str(authority.folder / "client-cert.pem"), str(authority.folder / "client-key.pem"))
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSVersion"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", port), timeout=HANG) as client:
        client.recv(18, socket.MSG_WAITALL)
        client.sendall(b"\0\0\0\3IHAVEOPT" + struct.pack(">II", 5, 0))
        client.recv(20, socket.MSG_WAITALL)
        with (
            pytest.raises(ssl.SSLError, match=r"(?i)version"),
            context.wrap_socket(client, server_hostname="localhost"),
        ):
            pass


def test_certificates_that_do_not_do(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir(mode=0o700)
    with pytest.raises(NotFound, match="ca-cert"):
        tls_context(folder)
    for each in authority.folder.iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
        (folder / each.name).chmod(0o600)
    tls_context(folder)
    (folder / "server-key.pem").chmod(0o644)
    with pytest.raises(InvalidInput, match="other users may read the key"):
        tls_context(folder)
    (folder / "server-key.pem").chmod(0o600)
    (folder / "ca-cert.pem").chmod(0o666)
    with pytest.raises(InvalidInput, match="ca-cert"):
        tls_context(folder)
    (folder / "ca-cert.pem").chmod(0o600)
    (folder / "server-key.pem").write_bytes((authority.folder / "client-key.pem").read_bytes())
    with pytest.raises(InvalidInput, match="not the certificates"):
        tls_context(folder)
    (folder / "server-key.pem").write_bytes((authority.folder / "server-key.pem").read_bytes())
    (folder / "ca-crl.pem").write_text("no list")
    with pytest.raises(InvalidInput, match="not the certificates"):
        tls_context(folder)
