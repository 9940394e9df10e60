"""Bring a protected folder into memory: decrypted there, and nowhere else."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from cryptography.hazmat.primitives.asymmetric import ec
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hf_wmguard.container.files import ProtectedFile
from hf_wmguard.container.recipients import Identity
from hf_wmguard.errors import ConfigError, FormatError, NotFoundError, UnsupportedError, UsageError
from hf_wmguard.evidence.manifest import MANIFEST_NAME
from hf_wmguard.loading.adapters import load_adapter
from hf_wmguard.loading.models import Access, load_model, looks_protected, refuse_offload
from hf_wmguard.loading.places import Place, open_place
from hf_wmguard.stores.location import is_location
from hf_wmguard.suspects.adapter import CONFIG_NAME as ADAPTER_CONFIG
from hf_wmguard.suspects.protected import open_folder
from hf_wmguard.suspects.tensors import read_tensor

# What transformers lets through when a folder that somebody else made is damaged or hostile.
_NOT_LOADABLE = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
Progress = Callable[[str, int], None]


def read_state_dict(
    folder: Path,
    identities: tuple[Identity, ...],
    *,
    signer: ec.EllipticCurvePublicKey | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return all tensors of a protected folder, by name.

    Args:
        folder: The protected folder.
        identities: What may open it, tried in order.
        signer: The public key that must have signed it.
        progress: Called with a tensor's name and its bytes.
    Raises:
        NotFoundError, ManifestError, AuthenticationError, FormatError: As `open_folder`.
    """
    with open_folder(folder, identities, signer=signer) as opened:
        return {name: _read(file, name, progress) for file in opened.files for name in file.names()}


def _read(file: ProtectedFile, name: str, progress: Progress | None) -> Tensor:
    tensor = read_tensor(file, name)
    if progress is not None:
        progress(name, file.info(name).size_bytes)
    return tensor


def load_protected(
    path: str | Path,
    *,
    identity: str | Identity | None = None,
    auto_class: Any,
    base: Any = None,
    signer: str | None = None,
    check_digests: bool = False,
    **from_pretrained_kwargs: Any,
) -> Any:
    """Return the model of a protected folder, decrypted in memory tensor by tensor.

    Args:
        path: The protected folder; ``org/name`` or ``hub://org/name@revision`` on the Hub, or ``s3://bucket/prefix``.
            What is kept elsewhere is fetched and decrypted tensor by tensor: no weight is written to disk, not even as
            ciphertext.
        identity: Reference to the recipient's private key, or the key itself; by default the one in
            ``WMGUARD_IDENTITY``.
        auto_class: An auto class (``AutoModelForCausalLM``) or a model class.
        base: For an adapter: the model it belongs on, or where that is (a folder, protected or not, or a Hub name).
        signer: Reference to the owner's public key (``file:owner.key.pub``), by default the one in
            ``WMGUARD_SIGNER``. Without it the manifest is checked against the key that it names itself, which shows
            that it is whole, not whose it is.
        check_digests: Check the signed SHA-256 of every file first. Without it each tensor is authenticated as it
            is decrypted, which somebody who holds the data key, a recipient, could get around.
        from_pretrained_kwargs: Passed on to ``from_pretrained``, of the base where there is one; ``revision`` says
            which of the repo's.
    Raises:
        ConfigError: No identity, or an auto class that has no such model.
        UnsupportedError: An adapter without its base; disk offload, which would write plaintext.
        NotFoundError, ManifestError, AuthenticationError, FormatError: As `open_folder`.
        StoreError: The store refuses, or does not answer.
    """
    access = Access.of(identity, signer, check_digests=check_digests)
    with open_place(path, revision=from_pretrained_kwargs.pop("revision", None)) as place:
        if (place.path / ADAPTER_CONFIG).is_file():
            return _load_on_base(place, access, base, auto_class, from_pretrained_kwargs)
        if base is not None:
            raise UsageError(f"{place.name} holds a whole model, which needs no base", hint="leave base out")

        def load(**kwargs: Any) -> Any:
            # Read only now, when it has been checked.
            if not isinstance(kwargs["config"], PreTrainedConfig):
                kwargs["config"] = AutoConfig.from_pretrained(place.path)
            return _model_class(auto_class, kwargs["config"]).from_pretrained(None, **kwargs)

        return load_model(place, access, load, **from_pretrained_kwargs)


def _load_on_base(place: Place, access: Access, base: Any, auto_class: Any, kwargs: dict[str, Any]) -> Any:
    if base is None:
        raise UnsupportedError(
            f"{place.name} holds an adapter, not a whole model",
            hint="pass base=..., the model it was trained on or where that is",
        )
    refuse_offload(kwargs)
    if isinstance(base, str | Path):
        base = (
            load_protected(base, identity=access.identity, auto_class=auto_class, signer=access.signer, **kwargs)
            if is_location(base) or looks_protected(Path(base))
            else auto_class.from_pretrained(base, **kwargs)
        )
    elif kwargs:
        raise UsageError(f"{', '.join(kwargs)}: base is loaded already", hint="pass these when you load the base")
    return load_adapter(place, access, base)


def _model_class(auto_class: Any, config: Any) -> type[PreTrainedModel]:
    mapping = getattr(auto_class, "_model_mapping", None)
    if mapping is None:
        return auto_class  # type: ignore[no-any-return]
    if type(config) not in mapping:
        raise ConfigError(
            f"{auto_class.__name__} has no model for {type(config).__name__}",
            hint="choose the auto class of this model's task",
        )
    found = mapping[type(config)]
    classes = found if isinstance(found, list | tuple) else (found,)
    named = [one for one in classes if one.__name__ in (config.architectures or ())]
    chosen: type[PreTrainedModel] = (named or list(classes))[0]
    return chosen


def load_suspect(path: Path, *, identity: str | Identity | None = None) -> tuple[Any, Any]:
    """Return the model and the tokenizer of a local folder, plain or protected, without running code from it.

    Args:
        path: A folder with ``config.json``; its first architecture says which class is made.
        identity: As for `load_protected`.
    Raises:
        NotFoundError, FormatError, UnsupportedError: Not a folder of a model that transformers knows.
    """
    if (path / ADAPTER_CONFIG).is_file():
        raise UnsupportedError(
            f"{path} holds an adapter, which answers nothing without its base",
            hint="merge it into its base (merge_and_unload), save that with its tokenizer, and probe it",
        )
    if not (path / "config.json").is_file():
        raise NotFoundError(f"{path} has no config.json", hint="give the folder of a model")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except _NOT_LOADABLE as error:
        raise FormatError(
            f"{path} cannot be loaded: {_reason(error)}", hint="give the folder of a whole model with its tokenizer"
        ) from None
    names = config.architectures or [""]
    model_class = getattr(transformers, names[0], None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise UnsupportedError(
            f"{path}: architecture {names[0]!r} is not one of transformers'",
            hint="code from a suspect is not run",
        )
    if (path / MANIFEST_NAME).is_file():
        return load_protected(path, identity=identity, auto_class=model_class, config=config), tokenizer
    try:
        return model_class.from_pretrained(path), tokenizer
    except _NOT_LOADABLE as error:
        raise FormatError(
            f"{path} cannot be loaded: {_reason(error)}", hint="the folder's weights do not fit its config"
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        # torch's own words advise loading the suspect with its code.
        return "its weights are a damaged pickle, or one that would run code"
    # One line and not a page.
    return " ".join(str(error).split())[:150] or type(error).__name__
