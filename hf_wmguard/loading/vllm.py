"""A model loader for vLLM: ``vllm serve FOLDER --load-format wmguard``, decrypting tensor by tensor.

vLLM calls `register` in each of its processes, through the entry point ``vllm.general_plugins``. It imports nothing of
vLLM before that. Written against `BaseModelLoader` and `register_model_loader` of vLLM 0.9 and later.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_wmguard.errors import ConfigError, NotFoundError
from hf_wmguard.loading.models import Access, opened
from hf_wmguard.loading.places import Place
from hf_wmguard.suspects.tensors import read_tensor

LOAD_FORMAT = "wmguard"
_OPTIONS = frozenset({"identity", "signer", "check_digests"})


def register() -> None:
    """Make the load format known to vLLM."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(LOAD_FORMAT)
    class ProtectedModelLoader(BaseModelLoader):  # type: ignore[misc]
        """Loads a protected folder; ``model_loader_extra_config`` may name identity, signer and check_digests."""

        def __init__(self, load_config: Any) -> None:
            super().__init__(load_config)
            self._access = _access(getattr(load_config, "model_loader_extra_config", None) or {})

        def download_model(self, model_config: Any) -> None:
            """Check that the folder is there; nothing is downloaded."""
            _folder(model_config)

        def load_weights(self, model: Any, model_config: Any) -> None:
            """Hand vLLM one decrypted tensor after the other."""
            model.load_weights(protected_weights(_folder(model_config), self._access))


def protected_weights(folder: Path, access: Access) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of a protected folder, of which it holds one at a time.

    Raises:
        NotFoundError, ManifestError, AuthenticationError, FormatError: As `open_folder`.
    """
    with opened(Place(path=folder, name=str(folder)), access) as one:
        for file in one.files:
            for name in file.names():
                yield name, read_tensor(file, name)


def _access(options: dict[str, Any]) -> Access:
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise ConfigError(
            f"model_loader_extra_config has no option {unknown[0]!r}", hint=f"one of {', '.join(sorted(_OPTIONS))}"
        )
    return Access.of(
        options.get("identity"), options.get("signer"), check_digests=bool(options.get("check_digests", False))
    )


def _folder(model_config: Any) -> Path:
    folder = Path(model_config.model)
    if not folder.is_dir():
        raise NotFoundError(f"no protected folder at {folder}", hint="give vLLM a local folder as its model")
    return folder
