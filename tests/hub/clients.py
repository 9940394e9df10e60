"""Pointing real clients to a server: those in this process, and those in processes it starts."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _cache_manager, _http, _xet

from .server import Hub


def environment(hub: Hub, home: Path, *, token: str | None = "hf_owner", xet: bool = False) -> dict[str, str]:
    """Return the variables a client reads: ``os.environ`` is to be updated with them.

    Args:
        hub: The server.
        home: Where the client keeps its cache.
        token: None is nobody's.
        xet: Whether it may use Xet.
    """
    values = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "localhost,127.0.0.1",
    }
    return values if token is None else {**values, "HF_TOKEN": token}


def point_clients(
    patch: pytest.MonkeyPatch, hub: Hub, home: Path, *, token: str | None = "hf_owner", xet: bool = False
) -> None:
    """Point the clients of this process, and of those it starts, to a server.

    huggingface_hub reads its variables once, when it is imported, and keeps the endpoint in objects that are shared:
    the variables are set for processes to come, and their copies in this one are replaced. What was imported from
    `huggingface_hub` before (``from huggingface_hub import HfApi``) follows; an `HfApi` object that was made before
    does not.

    Args:
        patch: Undoes it. Call `forget_connections` after that.
        hub: The server.
        home: Where the clients keep their cache.
        token: None is nobody's.
        xet: Whether they may use Xet.
    """
    values = environment(hub, home, token=token, xet=xet)
    patch.delenv("HF_TOKEN", raising=False)
    for name, value in values.items():
        patch.setenv(name, value)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, copied in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_URL_HOSTS": constants.HF_URL_HOSTS | {"localhost"},
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": not xet,
    }.items():
        patch.setattr(constants, name, copied)
    patch.setattr(_cache_manager, "HF_HUB_CACHE", str(home / "hub"))
    origin = urlsplit(hub.endpoint)
    patch.setattr(_http, "_HUB_ORIGINS", _http._HUB_ORIGINS | {(origin.scheme, origin.hostname, origin.port)})
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    if (shared := sys.modules.get("transformers.utils.hub")) is not None:
        patch.setattr(shared, "_hf_api", None)
    forget_connections()


def forget_connections() -> None:
    """Close what clients of this process keep open, and forget what they know about a server."""
    huggingface_hub.close_session()
    _xet.XET_CONNECTION_INFO_CACHE.clear()
    _xet._GLOBAL_XET_HOLDER.__init__()  # type: ignore[misc]
    if (files := sys.modules.get("huggingface_hub.hf_file_system")) is not None:
        files.HfFileSystem.clear_instance_cache()
