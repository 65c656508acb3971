"""Certificates for both sides of CRIU's TLS: files, and the options that name them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """One authority and one certificate, which both sides show.

    Attributes:
        folder: Where the files are.
    """

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Certificates:
        """Make them, in a new folder."""
        folder.mkdir()
        authority = trustme.CA()
        # CRIU compares the name with its own --address
        issued = authority.issue_cert("127.0.0.1", "localhost", common_name="localhost")
        authority.cert_pem.write_to_path(folder / "ca.pem")
        issued.private_key_pem.write_to_path(folder / "key.pem")
        for blob in issued.cert_chain_pems:
            blob.write_to_path(folder / "cert.pem", append=True)
        return cls(folder)

    @property
    def options(self) -> tuple[object, ...]:
        """What to give to either side, of CRIU's or ours."""
        names = (("--tls-cacert", "ca.pem"), ("--tls-cert", "cert.pem"), ("--tls-key", "key.pem"))
        return ("--tls", *(word for option, file in names for word in (option, self.folder / file)))
