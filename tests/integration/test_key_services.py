"""Key services through their real client libraries, against servers on this machine."""

from __future__ import annotations

import base64
import logging
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from key_servers import AwsErrors, AzureVault, GoogleKms, Service, Transit, serving, write_certificate

from hf_wmguard.container.owner import load_owner, write_sealed
from hf_wmguard.container.providers.awskms import AwsKms
from hf_wmguard.container.providers.azurekv import AzureKeyVault
from hf_wmguard.container.providers.gcpkms import GcpKms
from hf_wmguard.container.providers.pkcs11 import Pkcs11
from hf_wmguard.container.providers.vault import Vault
from hf_wmguard.container.recipients import WrapContext, load_recipient, open_recipients, seal_recipients
from hf_wmguard.container.services import ServiceKey, WrappingService
from hf_wmguard.errors import AuthenticationError, ConfigError, KeyServiceError, NotFoundError, WmguardError
from hf_wmguard.keys import OwnerKey

DEK = bytes(range(32))
SAVE = {"set_id": "5e7", "model_id": "acme/triage"}
CONTEXT = WrapContext(**SAVE)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A running service with one key, and a client for it."""

    make: Callable[[], WrappingService]
    other: Callable[[], WrappingService]
    server: Service | None
    binds: bool = True


@contextmanager
def _vault(stack: ExitStack, patch: pytest.MonkeyPatch, _: Path) -> Iterator[Kept]:
    server = Transit()
    port = stack.enter_context(serving(server))
    patch.setenv("VAULT_ADDR", f"http://127.0.0.1:{port}")
    patch.setenv("VAULT_TOKEN", server.token)
    yield Kept(make=lambda: Vault("transit/models"), other=lambda: Vault("elsewhere/models"), server=server)


@contextmanager
def _gcpkms(stack: ExitStack, patch: pytest.MonkeyPatch, _: Path) -> Iterator[Kept]:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import kms
    from google.cloud.kms_v1.services.key_management_service.transports import KeyManagementServiceRestTransport

    server = GoogleKms()
    port = stack.enter_context(serving(server))
    transport = KeyManagementServiceRestTransport(
        host=f"127.0.0.1:{port}", credentials=AnonymousCredentials(), url_scheme="http"
    )
    client = kms.KeyManagementServiceClient(transport=transport)
    stack.callback(transport.close)
    other = f"{server.name}-other"
    yield Kept(make=lambda: GcpKms(server.name, client), other=lambda: GcpKms(other, client), server=server)


class _Token:
    """A credential that is always valid."""

    def get_token(self, *scopes: str, **options: Any) -> Any:
        from azure.core.credentials import AccessToken

        return AccessToken("stand-in-token", int(time.time()) + 3600)


@contextmanager
def _azurekv(stack: ExitStack, patch: pytest.MonkeyPatch, path: Path) -> Iterator[Kept]:
    server, certificate = AzureVault(), write_certificate(path / "server.pem")
    port = stack.enter_context(serving(server, certificate))
    options = {"connection_verify": str(certificate), "verify_challenge_resource": False}

    def make(name: str) -> WrappingService:
        return AzureKeyVault(f"https://127.0.0.1:{port}/keys/{name}", _Token(), **options)

    yield Kept(make=lambda: make("models"), other=lambda: make("other"), server=server, binds=False)


@contextmanager
def _awskms(stack: ExitStack, patch: pytest.MonkeyPatch, _: Path) -> Iterator[Kept]:
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    stack.callback(server.stop)
    host, port = server.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL_KMS", f"http://{host}:{port}")
    # What moto keeps is kept per process, not per server.
    with urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")) as answer:
        assert answer.status == 200
    client = boto3.client("kms")
    arn = client.create_key()["KeyMetadata"]["Arn"]
    client.create_alias(AliasName="alias/models", TargetKeyId=arn)
    yield Kept(make=lambda: AwsKms("alias/models"), other=lambda: AwsKms("alias/other"), server=None)


_SOFTHSM = next((one for one in ("/usr/lib/softhsm/libsofthsm2.so",) if Path(one).exists()), None)


@contextmanager
def _pkcs11(stack: ExitStack, patch: pytest.MonkeyPatch, path: Path) -> Iterator[Kept]:
    import pkcs11

    (path / "tokens").mkdir()
    (path / "softhsm2.conf").write_text(f"directories.tokendir = {path}/tokens\nlog.level = ERROR\n")
    patch.setenv("SOFTHSM2_CONF", str(path / "softhsm2.conf"))
    patch.setenv("WMGUARD_TEST_PIN", "135246")
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", "wmguard", "--pin", "135246", "--so-pin", "642531"],
        check=True,
        capture_output=True,
    )
    library = pkcs11.lib(_SOFTHSM)
    library.reinitialize()
    with library.get_token(token_label="wmguard").open(user_pin="135246", rw=True) as session:
        key = session.generate_key(pkcs11.KeyType.AES, 256, label="models", store=True)
        assert not key[pkcs11.Attribute.EXTRACTABLE]
    where = f"pin-source=env:WMGUARD_TEST_PIN&module-path={_SOFTHSM}"
    yield Kept(
        make=lambda: Pkcs11(f"token=wmguard;object=models?{where}"),
        other=lambda: Pkcs11(f"token=wmguard;object=other?{where}"),
        server=None,
    )


STARTED = {"vault": _vault, "gcpkms": _gcpkms, "azurekv": _azurekv, "awskms": _awskms, "pkcs11": _pkcs11}
_hsm = [
    pytest.mark.pkcs11,
    pytest.mark.skipif(
        _SOFTHSM is None or shutil.which("softhsm2-util") is None, reason="SoftHSM 2 is missing: apt install softhsm2"
    ),
]
every = pytest.mark.parametrize(
    "kept", [*(name for name in STARTED if name != "pkcs11"), pytest.param("pkcs11", marks=_hsm)], indirect=True
)
served = pytest.mark.parametrize("kept", ["azurekv", "gcpkms", "vault"], indirect=True)


@pytest.fixture
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kept]:
    """A service by its scheme."""
    monkeypatch.setenv("WMGUARD_SERVICE_TIMEOUT_S", "1")
    with ExitStack() as stack:
        yield stack.enter_context(STARTED[request.param](stack, monkeypatch, tmp_path))


@every
def test_wraps_and_unwraps(kept: Kept) -> None:
    data = seal_recipients(DEK, [ServiceKey(kept.make())], **SAVE)
    assert open_recipients(data, [ServiceKey(kept.make())], **SAVE) == DEK
    assert kept.make().name.encode() not in data
    with pytest.raises(AuthenticationError, match="none of 1"):
        open_recipients(data, [ServiceKey(kept.other())], **SAVE)


@every
def test_is_bound_to_its_save(kept: Kept) -> None:
    key = ServiceKey(kept.make())
    stanza = key.wrap(DEK, CONTEXT)
    for other in ({"set_id": "other"}, {"model_id": "acme/other"}):
        with pytest.raises(AuthenticationError):
            key.unwrap(stanza, WrapContext(**SAVE | other))
    if kept.binds:
        wrapped = kept.make().wrap(DEK, {"model": "one"})
        with pytest.raises(AuthenticationError, match="refuses to unwrap"):
            kept.make().unwrap(wrapped, {"model": "another"})


@every
def test_what_was_changed_is_refused(kept: Kept) -> None:
    service = kept.make()
    wrapped = bytearray(service.wrap(DEK, {"model": "one"}))
    for position in (0, len(wrapped) // 2, len(wrapped) - 3):
        wrapped[position] ^= 1
        with pytest.raises((AuthenticationError, NotFoundError)) as caught:
            service.unwrap(bytes(wrapped), {"model": "one"})
        assert caught.value.__cause__ is None
        wrapped[position] ^= 1
    assert service.unwrap(bytes(wrapped), {"model": "one"}) == DEK


@every
def test_another_key_is_not_there(kept: Kept) -> None:
    with pytest.raises((NotFoundError, AuthenticationError)):
        kept.other().wrap(DEK, {"model": "one"})


@served
@pytest.mark.parametrize(
    ("mood", "kind", "code"),
    [
        ("denied", AuthenticationError, 3),
        ("gone", NotFoundError, 4),
        ("busy", KeyServiceError, 4),
        ("down", KeyServiceError, 4),
        ("silent", KeyServiceError, 4),
    ],
)
def test_a_service_in_a_bad_mood(kept: Kept, mood: str, kind: type[WmguardError], code: int) -> None:
    assert kept.server is not None
    service = kept.make()
    wrapped = service.wrap(DEK, {})
    kept.server.mood, before, asked = mood, time.monotonic(), len(kept.server.requests)
    with pytest.raises(kind) as caught:
        service.unwrap(wrapped, {})
    assert time.monotonic() - before < 20
    assert caught.value.exit_code == code
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None
    if mood == "busy":
        # It was asked again before we gave up.
        assert len(kept.server.requests) - asked > 2


@pytest.mark.parametrize(
    ("mood", "kind"),
    [
        ("AccessDeniedException", AuthenticationError),
        ("IncorrectKeyException", AuthenticationError),
        ("DisabledException", AuthenticationError),
        ("ExpiredTokenException", AuthenticationError),
        ("NotFoundException", NotFoundError),
        ("ThrottlingException", KeyServiceError),
        ("KMSInternalException", KeyServiceError),
        ("silent", KeyServiceError),
    ],
)
def test_aws_in_a_bad_mood(mood: str, kind: type[WmguardError], monkeypatch: pytest.MonkeyPatch) -> None:
    server = AwsErrors()
    server.mood = mood
    with serving(server) as port:
        monkeypatch.setenv("WMGUARD_SERVICE_TIMEOUT_S", "0.5")
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        before = time.monotonic()
        with pytest.raises(kind) as caught:
            AwsKms("arn:aws:kms:eu-west-1:123456789012:key/1234abcd").unwrap(b"x", {})
        assert time.monotonic() - before < 20
        assert "SECRET" not in str(caught.value)
        if mood == "ThrottlingException":
            assert len(server.requests) == 3


@every
def test_nothing_secret_is_logged(kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[bytes] = []
    service = kept.make()

    class Watching:
        kind, name = service.kind, service.name

        def wrap(self, key: bytes, context: Any) -> bytes:
            seen.append(key)
            return service.wrap(key, context)

        def unwrap(self, wrapped: bytes, context: Any) -> bytes:
            return service.unwrap(wrapped, context)

    key = ServiceKey(Watching())
    assert key.unwrap(key.wrap(DEK, CONTEXT), CONTEXT) == DEK

    secrets = [
        base64.b64encode(seen[0]).decode().rstrip("="),
        seen[0].hex(),
        repr(seen[0])[2:-1],
        "stand-in-token",
        "135246",
    ]
    text = "\n".join(record.getMessage() + repr(record.__dict__) for record in caplog.records)
    assert not any(secret in text for secret in secrets)
    assert logging.root.manager.disable < logging.DEBUG
    assert "stand-in" not in repr(key)


# A server that is not there, for each: no hang, and exit code 4.


@pytest.fixture
def nobody() -> int:
    """A port on which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_nobody_answers(nobody: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMGUARD_SERVICE_TIMEOUT_S", "0.5")
    monkeypatch.setenv("VAULT_ADDR", f"http://127.0.0.1:{nobody}")
    monkeypatch.setenv("VAULT_TOKEN", "hvs.secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"http://127.0.0.1:{nobody}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    azure = AzureKeyVault(f"https://127.0.0.1:{nobody}/keys/models", _Token())
    for service in (Vault("transit/models"), AwsKms("alias/models"), azure):
        before = time.monotonic()
        with pytest.raises(KeyServiceError, match="does not answer") as caught:
            service.wrap(DEK, {})
        assert time.monotonic() - before < 20
        assert "secret" not in str(caught.value)


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [one for one in os.environ if one.startswith(("AWS_", "VAULT_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("VAULT_ADDR", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="no region"):
        AwsKms("alias/models").wrap(DEK, {})
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for service in (AwsKms("alias/models"), Vault("transit/models")):
        with pytest.raises(KeyServiceError, match="no credentials"):
            service.wrap(DEK, {})


@pytest.mark.parametrize(
    "ref",
    [
        "awskms:alias/",
        "awskms:arn:aws:s3:::bucket",
        "awskms:a b",
        "vault:key",
        "vault:../sys/seal",
        "vault:transit/..",
        "vault:transit/a?b",
        "gcpkms:projects/p",
        "azurekv:http://v.vault.azure.net/keys/k",
        "azurekv:https://user@v.vault.azure.net/keys/k",
        "azurekv:https://v.vault.azure.net/keys/k/0123456789abcdef0123456789abcdef",
        "pkcs11:token=t",
        "pkcs11:object=o",
        "pkcs11:token=t;object=o;token=u",
        "pkcs11:token=t;object=o;colour=red",
        "pkcs11:token=t;object=o?pin-value=135246",
    ],
)
def test_malformed_references(ref: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipient(ref)
    assert "135246" not in str(caught.value)


@pytest.mark.parametrize("address", ["", "vault.example", "http://vault.example:8200", "ftp://x"])
def test_vault_addresses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAULT_ADDR", address)
    with pytest.raises(ConfigError, match="VAULT_ADDR"):
        Vault("transit/models").wrap(DEK, {})


def test_a_pkcs11_key_has_one_name() -> None:
    names = {
        Pkcs11("token=t;object=o?module-path=/a.so&pin-source=env:A").name,
        Pkcs11("object=o;token=t?module-path=/b.so").name,
    }
    assert names == {"object=o;token=t"}


@pytest.mark.parametrize("kept", ["awskms", "vault", pytest.param("pkcs11", marks=_hsm)], indirect=True)
def test_an_owner_key_sealed_by_a_service(kept: Kept, tmp_path: Path) -> None:
    service = kept.make()
    query = f"?pin-source=env:WMGUARD_TEST_PIN&module-path={_SOFTHSM}" if service.kind == "pkcs11" else ""
    ref = f"{service.kind}:{service.name}{query}"
    owner = OwnerKey.generate()
    write_sealed(owner, tmp_path / "owner.key", ref)
    assert load_owner(f"{ref}@file:{tmp_path}/owner.key").key_id() == owner.key_id()


@pytest.mark.pkcs11
@pytest.mark.skipif(_SOFTHSM is None, reason="SoftHSM 2 is missing: apt install softhsm2")
@pytest.mark.parametrize("kept", ["pkcs11"], indirect=True)
def test_a_wrong_pin(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WMGUARD_TEST_PIN", "999999")
    with pytest.raises(AuthenticationError) as caught:
        kept.make().wrap(DEK, {})
    assert "999999" not in str(caught.value)
    with pytest.raises(NotFoundError, match="no library"):
        Pkcs11("token=t;object=o?module-path=/none.so").wrap(DEK, {})
