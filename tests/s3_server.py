"""moto's S3, IAM and STS over TLS on the loopback interface, and users there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from key_servers import write_certificate

ACCOUNT = "123456789012"


@dataclass(frozen=True, kw_only=True)
class MotoServer:
    """A running server, and who is asking."""

    url: str
    patch: pytest.MonkeyPatch

    def client(self, service: str = "s3") -> Any:
        """Return a client with the credentials of the environment."""
        return boto3.session.Session().client(service)

    def become(self, name: str) -> str:
        """Make an IAM user, take its credentials, and return its ARN."""
        client = self.client("iam")
        try:
            arn = client.create_user(UserName=name)["User"]["Arn"]
        except client.exceptions.EntityAlreadyExistsException:
            arn = client.get_user(UserName=name)["User"]["Arn"]
        self._take(client.create_access_key(UserName=name)["AccessKey"])
        client.close()
        return str(arn)

    def assume(self, name: str) -> str:
        """Make a role, take the credentials of a session of it, and return the role's ARN."""
        iam, sts = self.client("iam"), self.client("sts")
        trust = {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Principal": "*", "Action": "sts:AssumeRole"}],
        }
        role = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
        self._take(sts.assume_role(RoleArn=role, RoleSessionName="me")["Credentials"])
        iam.close()
        sts.close()
        return str(role)

    def _take(self, key: dict[str, str]) -> None:
        self.patch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        self.patch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        if "SessionToken" in key:
            self.patch.setenv("AWS_SESSION_TOKEN", key["SessionToken"])


@contextmanager
def moto_server(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[MotoServer]:
    """Serve until the block ends; the environment's credentials, region and endpoint are this server's."""
    from moto.moto_api._internal import mock_random
    from moto.moto_api._internal.models import moto_api_backend
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    certificate = write_certificate(folder / "server.pem")
    application = DomainDispatcherApplication(create_backend_app)
    context = (str(certificate), str(certificate))
    server = make_server("127.0.0.1", 0, application, threaded=True, ssl_context=context)  # type: ignore[arg-type]
    # What moto keeps is kept per process, not per server.
    moto_api_backend.reset()
    mock_random.seed(0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    url = f"https://127.0.0.1:{server.server_port}"
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        patch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CA_BUNDLE": str(certificate),
        "AWS_ENDPOINT_URL": url,
        "AWS_CONFIG_FILE": str(folder / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
    }.items():
        patch.setenv(name, value)
    try:
        yield MotoServer(url=url, patch=patch)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
