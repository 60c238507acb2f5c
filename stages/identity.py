"""
A node's key pair, its self-signed certificate, and the pins by which a plan names its members.

There is no authority: a plan lists each member's certificate, and a peer is who it says only if it
proves the key of the certificate that the plan lists under that very name.
"""

import hashlib
import os
import re
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stages.errors import PeerRefusedError

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"  # fits a file name and a certificate's name
VALIDITY = timedelta(days=365)
CLOCK_SLACK = timedelta(days=1)  # nodes' clocks differ; a certificate is valid on all of them


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is: its name, and where its certificate and private key lie."""

    name: str
    certificate_path: Path
    key_path: Path

    @property
    def certificate_pem(self) -> str:
        """The certificate as text, to be handed to whoever writes the plan."""
        return self.certificate_path.read_text(encoding="ascii")


@dataclass(frozen=True, slots=True)
class Member:
    """One name of a plan and the certificate that belongs to it."""

    name: str
    certificate_pem: str

    @property
    def pin(self) -> str:
        """The certificate's sha256 as hex; PeerRefusedError if the text is no certificate."""
        try:
            return pin(ssl.PEM_cert_to_DER_cert(self.certificate_pem))
        except ValueError as error:
            raise PeerRefusedError(
                f"the plan's certificate of {self.name} is unreadable"
            ) from error


def make_identity(name: str, folder: Path, validity: timedelta = VALIDITY) -> Identity:
    """
    Write a new P-256 key (mode 0600) and its certificate into the folder.

    Raises ValueError for a name that is no node's, FileExistsError where it has a key already.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"{name!r} cannot name a node: use letters, digits, '.', '_' and '-'")
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    identity = _identity(name, folder)
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_new(identity.key_path, secret, 0o600)
    _write_new(
        identity.certificate_path, _certificate(name, key, validity).public_bytes(pem), 0o644
    )
    return identity


def load_identity(name: str, folder: Path) -> Identity:
    """The identity that `make_identity` wrote; FileNotFoundError names the missing file."""
    identity = _identity(name, folder)
    for path in (identity.key_path, identity.certificate_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: node {name} has no key pair here; make one first")
    return identity


def pin(certificate_der: bytes) -> str:
    """The sha256 of a certificate as hex."""
    return hashlib.sha256(certificate_der).hexdigest()


def _identity(name: str, folder: Path) -> Identity:
    return Identity(name, folder / f"{name}.crt", folder / f"{name}.key")


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, validity: timedelta
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + validity) - CLOCK_SLACK)
        .not_valid_after(now + validity)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Create the file with that mode from its first byte on; an existing one is never replaced."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
