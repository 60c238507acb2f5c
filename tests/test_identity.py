"""Key pairs and pins."""

import hashlib
import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from stages.errors import PeerRefusedError
from stages.identity import Member, load_identity, make_identity


def test_the_key_is_readable_by_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        identity = make_identity("node-a", tmp_path)
    finally:
        os.umask(previous)
    assert identity.key_path.stat().st_mode & 0o777 == 0o600


def test_the_certificate_bears_the_name_and_a_p256_key(tmp_path: Path) -> None:
    identity = make_identity("node-a", tmp_path)
    certificate = x509.load_pem_x509_certificate(identity.certificate_path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node-a"]
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1"


def test_a_certificate_holds_for_a_clock_that_is_behind(tmp_path: Path) -> None:
    identity = make_identity("node-a", tmp_path, validity=timedelta(hours=2))
    certificate = x509.load_pem_x509_certificate(identity.certificate_path.read_bytes())
    now = datetime.now(UTC)
    assert certificate.not_valid_before_utc < now - timedelta(hours=1)
    assert timedelta(hours=1) < certificate.not_valid_after_utc - now <= timedelta(hours=2)


def test_a_pin_is_the_certificates_sha256(tmp_path: Path) -> None:
    identity = make_identity("node-a", tmp_path)
    der = ssl.PEM_cert_to_DER_cert(identity.certificate_pem)
    expected = hashlib.sha256(der).hexdigest()
    assert Member("node-a", identity.certificate_pem).pin == expected


def test_a_key_pair_is_never_overwritten(tmp_path: Path) -> None:
    identity = make_identity("node-a", tmp_path)
    before = identity.key_path.read_bytes()
    with pytest.raises(FileExistsError):
        make_identity("node-a", tmp_path)
    assert identity.key_path.read_bytes() == before
    assert load_identity("node-a", tmp_path) == identity


def test_a_missing_key_pair_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"node-a\.key"):
        load_identity("node-a", tmp_path)


@pytest.mark.parametrize("name", ["", "../a", "a b", "a/b", "-a", "ä", "a\n", "x" * 64])
def test_a_name_that_is_no_nodes_makes_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot name a node"):
        make_identity(name, tmp_path / "keys")
    assert not (tmp_path / "keys").exists()


def test_an_unreadable_certificate_names_its_member() -> None:
    with pytest.raises(PeerRefusedError, match="node-b"):
        _ = Member("node-b", "no certificate").pin
