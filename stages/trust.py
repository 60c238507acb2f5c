"""Whom a member of a plan believes: the certificates that the plan lists, and nobody else."""

import ssl
from collections.abc import Iterable

from stages.errors import PeerRefusedError
from stages.identity import Identity, Member, pin


class Trust:
    """The plan's members, and TLS contexts that believe nobody else."""

    def __init__(self, identity: Identity, members: Iterable[Member]) -> None:
        self._members = tuple(members)
        self._names = {member.pin: member.name for member in self._members}
        if len(self._names) < len(self._members):
            raise PeerRefusedError("the plan lists one certificate under two names")
        self.server = self._context(ssl.PROTOCOL_TLS_SERVER, identity)
        self.server.num_tickets = 0  # no resumption: every connection proves its key
        self.client = self._context(ssl.PROTOCOL_TLS_CLIENT, identity)

    def name_of(self, tls: ssl.SSLSocket) -> str:
        """The member whose certificate the peer proved; PeerRefusedError if it is nobody's."""
        certificate = tls.getpeercert(binary_form=True)
        name = self._names.get(pin(certificate)) if certificate else None
        if name is None:
            raise PeerRefusedError("the peer's certificate is in no place of the plan")
        return name

    def _context(self, protocol: int, identity: Identity) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
        context.check_hostname = False  # names are the plan's, and pins say who bears them
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(identity.certificate_path, identity.key_path)
        if self._members:
            context.load_verify_locations(
                cadata="\n".join(m.certificate_pem for m in self._members)
            )
        return context
