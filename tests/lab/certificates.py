# SPDX-License-Identifier: GPL-2.0-or-later
"""Certificates for tests, made by the openssl command: a CA, and what it signs."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

from .process import run

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


class Certificate(NamedTuple):
    """Files in PEM."""

    path: Path
    key: Path


class Authority:
    """A CA that nobody knows."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._ca = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
        run(["openssl", "req", "-x509", *_NEW_KEY, "-keyout", self._ca.key, "-out", self._ca.path,
             "-days", "30", "-subj", f"/CN=test {name}"])  # fmt: skip

    @property
    def ca_file(self) -> Path:
        return self._ca.path

    def sign(self, name: str, *, alternatives: str = "DNS:localhost,IP:127.0.0.1", days: int = 30) -> Certificate:
        """A certificate for these subjectAltNames; a negative number of days: it has expired."""
        made = Certificate(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        request = self._folder / f"{name}.csr"
        run(["openssl", "req", *_NEW_KEY, "-keyout", made.key, "-out", request, "-subj", f"/CN={name}",
             "-addext", f"subjectAltName={alternatives}"])  # fmt: skip
        run(["openssl", "x509", "-req", "-in", request, "-CA", self._ca.path, "-CAkey", self._ca.key,
             "-CAcreateserial", "-days", str(days), "-copy_extensions", "copyall", "-out", made.path])  # fmt: skip
        return made


def server_context(certificate: Certificate, *, client_ca: Path | None = None) -> ssl.SSLContext:
    """For a Collector; `client_ca`: who must have signed the exporter's certificate, which it then asks for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.path, certificate.key)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    return context
