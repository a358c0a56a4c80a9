"""A certificate authority for tests, and the certificates that it signs."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


class Authority:
    """An authority that only these tests trust. Its files are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self._folder = folder
        self._count = 0
        self.certificate = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.certificate)

    def issue(self, *names: str, is_expired: bool = False) -> tuple[Path, Path]:
        """Files with a certificate for these hosts, and with its key."""
        until = datetime.now(UTC) - timedelta(days=1) if is_expired else None
        issued = self._authority.issue_cert(*names, not_after=until, key_type=trustme.KeyType.ECDSA)
        self._count += 1
        certificate = self._folder / f"{self._count}.pem"
        key = self._folder / f"{self._count}.key"
        for number, blob in enumerate(issued.cert_chain_pems):
            blob.write_to_path(certificate, append=number > 0)
        issued.private_key_pem.write_to_path(key)
        return certificate, key

    def server_context(
        self, *names: str, is_expired: bool = False, asks_for_certificate: bool = False
    ) -> ssl.SSLContext:
        """What a server with a certificate for these hosts uses."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(*names, is_expired=is_expired))
        if asks_for_certificate:
            context.load_verify_locations(self.certificate)
            context.verify_mode = ssl.CERT_REQUIRED
        return context
