"""Key services on this machine: stand-ins that speak each service's protocol, for the real client libraries.

Each has one key, keeps it to itself, and can be told to refuse, to be too busy or not to answer. Started in a thread on
a loopback port, and stopped by whoever started it.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import secrets
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

Answer = tuple[int, dict[str, Any]]


class Service:
    """What a server does: one answer per request, and the mood it is in."""

    def __init__(self) -> None:
        self.mood = "well"
        self.requests: list[tuple[str, dict[str, Any]]] = []

    def answer(self, method: str, path: str, headers: Any, body: dict[str, Any]) -> Answer:
        """Return status and JSON."""
        raise NotImplementedError

    def mooded(self) -> Answer | None:
        """Return what the mood answers instead."""
        if self.mood == "silent":
            time.sleep(3)
        status = {"busy": 429, "down": 503, "denied": 403, "gone": 404}.get(self.mood)
        # An echo of the worst kind: a server that repeats what it was told.
        return None if status is None else (status, self.error(status, "SECRET-IN-ANSWER"))

    def error(self, status: int, text: str) -> dict[str, Any]:
        """Return the service's form of an error."""
        raise NotImplementedError


class Transit(Service):
    """Vault's Transit engine, API v1: ``POST /v1/MOUNT/encrypt|decrypt/KEY``, of type aes256-gcm96.

    Source: developer.hashicorp.com/vault/api-docs/secret/transit
    """

    token = "hvs.stand-in-token"

    def __init__(self) -> None:
        super().__init__()
        self._key = AESGCM(secrets.token_bytes(32))

    def error(self, status: int, text: str) -> dict[str, Any]:
        return {"errors": [text]}

    def answer(self, method: str, path: str, headers: Any, body: dict[str, Any]) -> Answer:
        if headers.get("X-Vault-Token") != self.token:
            return 403, self.error(403, "permission denied")
        mount, operation, name = path.removeprefix("/v1/").rsplit("/", 2)
        if mount != "transit" or name != "models":
            return 400 if mount == "transit" else 404, self.error(404, "no handler for route")
        data = base64.b64decode(body.get("associated_data", ""))
        if operation == "encrypt":
            nonce = secrets.token_bytes(12)
            sealed = nonce + self._key.encrypt(nonce, base64.b64decode(body["plaintext"]), data)
            return 200, {"data": {"ciphertext": "vault:v1:" + base64.b64encode(sealed).decode(), "key_version": 1}}
        sealed = base64.b64decode(body["ciphertext"].removeprefix("vault:v1:"))
        try:
            plain = self._key.decrypt(sealed[:12], sealed[12:], data)
        except (InvalidTag, ValueError):
            return 400, self.error(400, "cipher: message authentication failed")
        return 200, {"data": {"plaintext": base64.b64encode(plain).decode()}}


class GoogleKms(Service):
    """Google Cloud KMS, REST v1: ``POST /v1/NAME:encrypt|decrypt``.

    Source: cloud.google.com/kms/docs/reference/rest/v1/projects.locations.keyRings.cryptoKeys
    """

    name = "projects/p/locations/l/keyRings/r/cryptoKeys/k"

    def __init__(self) -> None:
        super().__init__()
        self._key = AESGCM(secrets.token_bytes(32))

    def error(self, status: int, text: str) -> dict[str, Any]:
        return {"error": {"code": status, "message": text}}

    def answer(self, method: str, path: str, headers: Any, body: dict[str, Any]) -> Answer:
        name, _, operation = path.partition("?")[0].removeprefix("/v1/").rpartition(":")
        if name != self.name:
            return 404, self.error(404, "not found")
        data = base64.b64decode(body.get("additionalAuthenticatedData", ""))
        if operation == "encrypt":
            nonce = secrets.token_bytes(12)
            sealed = nonce + self._key.encrypt(nonce, base64.b64decode(body["plaintext"]), data)
            return 200, {"name": f"{name}/cryptoKeyVersions/1", "ciphertext": base64.b64encode(sealed).decode()}
        sealed = base64.b64decode(body["ciphertext"])
        try:
            plain = self._key.decrypt(sealed[:12], sealed[12:], data)
        except (InvalidTag, ValueError):
            return 400, self.error(400, "Decryption failed: verify that 'name' refers to the correct CryptoKey.")
        return 200, {"plaintext": base64.b64encode(plain).decode()}


class AzureVault(Service):
    """Azure Key Vault, keys API: get, ``unwrapkey``; the challenge of a request without a token included.

    Source: learn.microsoft.com/rest/api/keyvault/keys
    """

    version = "0123456789abcdef0123456789abcdef"

    def __init__(self) -> None:
        super().__init__()
        self._key = rsa.generate_private_key(65537, 2048)

    def error(self, status: int, text: str) -> dict[str, Any]:
        return {"error": {"code": "Forbidden", "message": text}}

    def answer(self, method: str, path: str, headers: Any, body: dict[str, Any]) -> Answer:
        if not headers.get("Authorization", "").startswith("Bearer "):
            return 401, {}
        path = path.partition("?")[0]
        parts = path.strip("/").split("/")
        if parts[:2] != ["keys", "models"] or parts[2:3] not in ([], [self.version]):
            return 404, self.error(404, "KeyNotFound")
        if method == "GET":
            numbers = self._key.public_key().public_numbers()
            modulus = base64.urlsafe_b64encode(numbers.n.to_bytes(256, "big")).rstrip(b"=").decode()
            host = headers["Host"]
            kid = f"https://{host}/keys/models/{self.version}"
            operations = ["wrapKey", "unwrapKey"]
            return 200, {
                "key": {"kid": kid, "kty": "RSA", "key_ops": operations, "n": modulus, "e": "AQAB"},
                "attributes": {"enabled": True},
            }
        value = base64.urlsafe_b64decode(body["value"] + "==")
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
        try:
            plain = self._key.decrypt(value, oaep)
        except ValueError:
            return 400, self.error(400, "BadParameter")
        return 200, {"kid": path, "value": base64.urlsafe_b64encode(plain).rstrip(b"=").decode()}


class AwsErrors(Service):
    """AWS KMS when it says no, in the JSON 1.1 protocol: what moto's server never does."""

    def mooded(self) -> Answer | None:
        if self.mood == "silent":
            time.sleep(3)
        return 400, {"__type": self.mood, "message": "SECRET-IN-ANSWER"}


class _Handler(BaseHTTPRequestHandler):
    service: ClassVar[Service]
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        self.service.requests.append((self.path, body))
        mooded = self.service.mooded()
        status, value = mooded or self.service.answer(self.command, self.path, self.headers, body)
        data = json.dumps(value).encode()
        try:
            self.send_response(status)
            if status == 401:
                where = f'authorization="https://{self.headers["Host"]}/tenant"'
                self.send_header("WWW-Authenticate", f'Bearer {where}, resource="https://vault.azure.net"')
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            # Whoever asked a silent server has gone.
            self.close_connection = True

    do_GET = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(service: Service, certificate: Path | None = None) -> Iterator[int]:
    """Serve on a loopback port, which is yielded, until the block ends.

    Args:
        service: What answers.
        certificate: PEM with key and certificate, for HTTPS.
    """
    handler = type("Handler", (_Handler,), {"service": service})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write_certificate(path: Path) -> Path:
    """Write a key and a self-signed certificate for 127.0.0.1 (PEM)."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path
