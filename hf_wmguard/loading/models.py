"""Hand the lazy tensors of a protected folder to transformers' own loader."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric import ec
from transformers import GenerationConfig

from hf_wmguard.container.files import is_protected
from hf_wmguard.container.recipients import Identity, load_identity
from hf_wmguard.errors import ConfigError, UnsupportedError, WmguardError
from hf_wmguard.evidence.manifest import ENVELOPE_NAME, MANIFEST_NAME, RECIPIENTS_NAME, check_files
from hf_wmguard.evidence.signing import load_signer
from hf_wmguard.loading.lazy import LazyTensor, lazy_state_dict, reraising
from hf_wmguard.loading.places import Place
from hf_wmguard.suspects.protected import OpenFolder, is_diverted, open_folder

IDENTITY_VARIABLE = "WMGUARD_IDENTITY"
SIGNER_VARIABLE = "WMGUARD_SIGNER"
GENERATION_CONFIG = "generation_config.json"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who loads, and whom they trust.

    Args:
        identity: What opens the folder.
        signer: Reference to the public key that must have signed it, if any.
        pinned: That key.
        check_digests: Whether to check the signed digest of every file.
    """

    identity: Identity
    signer: str | None = None
    pinned: ec.EllipticCurvePublicKey | None = None
    check_digests: bool = False

    @classmethod
    def of(cls, identity: str | Identity | None, signer: str | None, *, check_digests: bool = False) -> Self:
        """Return what is given, and from the environment what is not.

        Raises:
            ConfigError: No identity, or something that is no reference.
            KeyFormatError, KeyPermissionError, NotFoundError: A key that cannot be read.
        """
        reference = identity or os.environ.get(IDENTITY_VARIABLE)
        if not reference:
            raise ConfigError(
                "no identity to decrypt with", hint=f"pass identity='file:...' or set {IDENTITY_VARIABLE}"
            )
        signer = signer or os.environ.get(SIGNER_VARIABLE) or None
        return cls(
            identity=load_identity(reference) if isinstance(reference, str) else reference,
            signer=signer,
            pinned=load_signer(signer) if signer else None,
            check_digests=check_digests,
        )


def looks_protected(folder: Path) -> bool:
    """Return whether a folder is, was or pretends to be protected: it is then opened as such, or not at all."""
    if any((folder / name).exists() for name in (MANIFEST_NAME, ENVELOPE_NAME, RECIPIENTS_NAME)):
        return True
    return any(path.is_file() and is_protected(path) for path in folder.glob("*.safetensors"))


@contextmanager
def opened(place: Place, access: Access) -> Iterator[OpenFolder]:
    """Open a protected folder as somebody asked; errors as `open_folder`.

    Raises:
        UnsupportedError: The digests of files that are not on this machine are to be checked.
    """
    if access.check_digests and place.remote:
        raise UnsupportedError(
            f"check_digests reads all of {place.name} before anything is decrypted",
            hint="wmguard pull it first: that checks them, and keeps what it has checked",
        )
    with open_folder(place.path, (access.identity,), signer=access.pinned, remote=place.remote) as one:
        if access.check_digests:
            check_files(place.path, one.manifest)
        yield one


def load_model(place: Place, access: Access, load: Callable[..., Any], **kwargs: Any) -> Any:
    """Return what a ``from_pretrained`` makes of a protected folder.

    Args:
        place: The protected folder.
        access: Who loads.
        load: The ``from_pretrained`` of a model class, without a path: it is called with ``state_dict``, ``config``
            and the other arguments.
        kwargs: What the user passed to ``from_pretrained``.
    Raises:
        UnsupportedError: Disk offload, which would write plaintext.
        NotFoundError, ManifestError, AuthenticationError, FormatError: As `open_folder`.
    """
    refuse_offload(kwargs)
    failed: list[WmguardError] = []
    with opened(place, access) as one, reraising(failed), _refusing_full_memory():
        tensors: dict[str, LazyTensor] = lazy_state_dict(one.files, failed)
        kwargs["config"] = kwargs.get("config") or str(place.path)
        loaded = load(state_dict=tensors, **kwargs)
    # With output_loading_info it is a pair.
    signed = {entry.name for entry in one.manifest.files}
    _finish(loaded[0] if isinstance(loaded, tuple) else loaded, place, signed, kwargs)
    return loaded


def _finish(model: Any, place: Place, signed: set[str], kwargs: dict[str, Any]) -> None:
    """Do what ``from_pretrained`` does with the folder's name, which it was not given."""
    if is_diverted(getattr(model.config, "transformers_weights", None)):
        del model.config.transformers_weights
    model.name_or_path = model.config.name_or_path = place.name
    if kwargs.get("generation_config") is not None or not model.can_generate():
        return
    if GENERATION_CONFIG in signed:
        model.generation_config = GenerationConfig.from_pretrained(place.path)
    elif (place.path / GENERATION_CONFIG).is_file():
        _logger.warning("%s in %s is not used: the manifest does not list it", GENERATION_CONFIG, place.name)


def refuse_offload(kwargs: dict[str, Any]) -> None:
    """Refuse what would write decrypted weights to disk.

    Raises:
        UnsupportedError: An offload folder, or a device map with ``disk`` in it.
    """
    device_map = kwargs.get("device_map")
    to_disk = isinstance(device_map, dict) and "disk" in device_map.values()
    if to_disk or kwargs.get("offload_folder") is not None:
        raise _no_offload()


@contextmanager
def _refusing_full_memory() -> Iterator[None]:
    # device_map="auto" says "disk" where devices and memory are too small. Without an offload folder transformers
    # then stops before it loads anything, and asks for the folder that must not be.
    try:
        yield
    except ValueError as error:
        if "offload" in str(error):
            raise _no_offload() from None
        raise


def _no_offload() -> UnsupportedError:
    return UnsupportedError(
        "disk offload would write the decrypted weights to disk",
        hint="use a device_map without disk; with device_map='auto', allow more in max_memory or load another dtype",
    )
