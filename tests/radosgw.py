"""A Ceph object store on the loopback interface: S3 that enforces bucket policies by who asks.

One monitor, one OSD in memory, one gateway, with cephx. Needs Debian's ceph-mon, ceph-osd, ceph-base and radosgw.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import boto3
from botocore.config import Config
from key_servers import write_certificate

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool", "ceph-authtool")
_START_S = 90


def missing_programs() -> list[str]:
    """Return what is not installed of what this needs."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """A running gateway."""

    folder: Path
    http: str
    https: str
    certificate: Path

    def user(self, name: str) -> tuple[str, str]:
        """Make a user; return their access key and secret."""
        made = _run(self.folder, "radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}")
        key = json.loads(made)["keys"][0]
        return key["access_key"], key["secret_key"]

    def client(self, keys: tuple[str, str] | None, *, url: str | None = None) -> Any:
        """Return a client of boto3 that asks as somebody, over TLS unless told otherwise."""
        from botocore import UNSIGNED

        config = Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1, "mode": "standard"},
            # This version knows neither of what boto3 sends by default.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            **({} if keys else {"signature_version": UNSIGNED}),
        )
        who = {"aws_access_key_id": keys[0], "aws_secret_access_key": keys[1]} if keys else {}
        return boto3.session.Session().client(
            "s3",
            region_name="us-east-1",
            endpoint_url=url or self.https,
            verify=str(self.certificate),
            config=config,
            **who,
        )


@contextmanager
def gateway(folder: Path) -> Iterator[Gateway]:
    """Serve until the block ends."""
    certificate = write_certificate(folder / "server.pem")
    mon, http, https = _free_ports(3)
    _write_config(folder, mon)
    with ExitStack() as stack:
        _start_monitor(folder, mon, stack)
        _start_osd(folder, stack)
        _run(
            folder, "ceph", "auth", "get-or-create", "client.rgw.a", "mon", "allow rw", "osd", "allow rwx",
            "-o", folder / "rgw.keyring",
        )  # fmt: skip
        front = (
            f"beast endpoint=127.0.0.1:{http} ssl_endpoint=127.0.0.1:{https} "
            f"ssl_certificate={certificate} ssl_private_key={certificate}"
        )
        process = _start(
            folder, stack, "radosgw", "-n", "client.rgw.a", "-f", "--keyring", folder / "rgw.keyring",
            f"--rgw_frontends={front}",
        )  # fmt: skip
        _wait_for_http(process, f"http://127.0.0.1:{http}/")
        yield Gateway(
            folder=folder,
            http=f"http://127.0.0.1:{http}",
            https=f"https://127.0.0.1:{https}",
            certificate=certificate,
        )


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def _write_config(folder: Path, mon: int) -> None:
    (folder / "ceph.conf").write_text(
        f"""[global]
fsid = {uuid.uuid4()}
mon_host = [v2:127.0.0.1:{mon}/0]
public_addr = 127.0.0.1
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = {folder}/$name.keyring
run_dir = {folder}
admin_socket =
pid_file =
log_file = {folder}/$name.log
mon_cluster_log_file = {folder}/cluster.log
mon_data = {folder}/mon
osd_data = {folder}/osd
osd_objectstore = memstore
memstore_device_bytes = 2147483648
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 0
mon_data_avail_warn = 0
rgw_data = {folder}/rgw
rgw_dns_name =
rgw_enable_usage_log = false
"""
    )


def _start_monitor(folder: Path, port: int, stack: ExitStack) -> None:
    everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
    admin, mon, monmap = folder / "client.admin.keyring", folder / "mon.keyring", folder / "monmap"
    _run(folder, "ceph-authtool", "--create-keyring", mon, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    _run(folder, "ceph-authtool", "--create-keyring", admin, "--gen-key", "-n", "client.admin", *everything)
    _run(folder, "ceph-authtool", mon, "--import-keyring", admin)
    fsid = (folder / "ceph.conf").read_text().split("fsid = ")[1].split()[0]
    _run(folder, "monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{port}]", "--fsid", fsid, monmap)
    (folder / "mon").mkdir()
    _run(folder, "ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", mon)
    _start(folder, stack, "ceph-mon", "-i", "a", "-f")
    _run(folder, "ceph", "--connect-timeout", str(_START_S), "mon", "stat")


def _start_osd(folder: Path, stack: ExitStack) -> None:
    own = str(uuid.uuid4())
    (folder / "osd").mkdir()
    _run(folder, "ceph", "osd", "new", own)
    _run(
        folder, "ceph", "auth", "get-or-create", "osd.0", "mon", "allow profile osd", "osd", "allow *",
        "-o", folder / "osd" / "keyring",
    )  # fmt: skip
    keyring = ("--keyring", folder / "osd" / "keyring")
    _run(folder, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", own, *keyring)
    _start(folder, stack, "ceph-osd", "-i", "0", "-f", *keyring)
    deadline = time.monotonic() + _START_S
    while json.loads(_run(folder, "ceph", "osd", "stat", "-f", "json"))["num_up_osds"] < 1:
        if time.monotonic() > deadline:
            raise TimeoutError("the OSD did not start")
        time.sleep(0.5)


def _run(folder: Path, program: str, *arguments: object) -> str:
    command = [program, "-c", str(folder / "ceph.conf"), *map(str, arguments)]
    if program in ("ceph-authtool", "monmaptool"):
        command = [program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_START_S + 30, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed: {done.stderr[-2000:]}")
    return done.stdout


def _start(folder: Path, stack: ExitStack, program: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [program, "-c", str(folder / "ceph.conf"), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(_stop, process)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for_http(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            with urlopen(url):  # noqa: S310
                return
        except (URLError, ConnectionError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError("the gateway did not start") from error
            time.sleep(0.2)
