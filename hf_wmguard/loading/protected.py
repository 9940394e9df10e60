"""Bring a protected folder into memory: decrypted there, and nowhere else."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from cryptography.hazmat.primitives.asymmetric import ec
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel

from hf_wmguard.container.files import ProtectedFile
from hf_wmguard.container.recipients import Identity, load_identity
from hf_wmguard.errors import ConfigError, FormatError, NotFoundError, UnsupportedError, UsageError
from hf_wmguard.evidence.manifest import ENVELOPE_NAME, MANIFEST_NAME, RECIPIENTS_NAME
from hf_wmguard.evidence.signing import load_signer
from hf_wmguard.suspects.adapter import CONFIG_NAME as ADAPTER_CONFIG
from hf_wmguard.suspects.protected import open_folder
from hf_wmguard.suspects.tensors import decode

IDENTITY_VARIABLE = "WMGUARD_IDENTITY"
_OURS = (MANIFEST_NAME, ENVELOPE_NAME, RECIPIENTS_NAME)
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
    info = file.info(name)
    tensor = decode(info.dtype, info.shape, file.read(name))
    if progress is not None:
        progress(name, info.size_bytes)
    return tensor


def load_protected(
    path: str | Path,
    *,
    identity: str | Identity | None = None,
    auto_class: Any,
    signer: str | None = None,
    **from_pretrained_kwargs: Any,
) -> Any:
    """Return the model of a protected folder, decrypted in memory.

    Args:
        path: The protected folder.
        identity: Reference to the recipient's private key, or the key itself; by default the one in
            ``WMGUARD_IDENTITY``.
        auto_class: An auto class (``AutoModelForCausalLM``) or a model class.
        signer: Reference to the owner's public key (``file:owner.key.pub``). Without it the manifest is checked
            against the key that it names itself, which shows that it is whole, not whose it is.
        from_pretrained_kwargs: Passed on to ``from_pretrained``.
    Raises:
        ConfigError: No identity.
        UnsupportedError: An adapter, which is no model; disk offload, which would write plaintext.
        NotFoundError, ManifestError, AuthenticationError, FormatError: As `open_folder`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotFoundError(f"no protected folder at {folder}", hint="give a local folder")
    if (folder / ADAPTER_CONFIG).is_file():
        raise UnsupportedError(
            f"{folder} holds an adapter, not a whole model",
            hint="decrypt the folder, then PeftModel.from_pretrained(base, decrypted_folder)",
        )
    _refuse_offload(from_pretrained_kwargs)
    reference = identity or os.environ.get(IDENTITY_VARIABLE)
    if not reference:
        raise ConfigError("no identity to decrypt with", hint=f"pass identity='file:...' or set {IDENTITY_VARIABLE}")
    pinned = load_signer(signer) if signer else None
    opener = load_identity(reference) if isinstance(reference, str) else reference
    tensors = read_state_dict(folder, (opener,), signer=pinned)
    config = from_pretrained_kwargs.pop("config", None) or AutoConfig.from_pretrained(folder)
    model = _model_class(auto_class, config).from_pretrained(
        None, config=config, state_dict=tensors, **from_pretrained_kwargs
    )
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _refuse_offload(kwargs: dict[str, Any]) -> None:
    device_map = kwargs.get("device_map")
    to_disk = isinstance(device_map, dict) and "disk" in device_map.values()
    if to_disk or kwargs.get("offload_folder") is not None:
        raise UnsupportedError(
            "disk offload would write the decrypted weights to disk", hint="use a device_map without disk"
        )


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


def decrypt_folder(
    path: Path, out: Path, *, identity: str, signer: str | None = None, progress: Progress | None = None
) -> tuple[Path, ...]:
    """Write a protected folder's plaintext into a new folder, because somebody asked for exactly that.

    Args:
        path: The protected folder.
        out: A folder that does not exist yet, or is empty.
        identity: Reference to a private key that opens it.
        signer: As for `load_protected`.
        progress: Called with a tensor's name and its bytes.
    Returns:
        The plaintext weight files.
    Raises:
        UsageError: The output folder holds something, or is the input.
        NotFoundError, ManifestError, AuthenticationError, FormatError: As `open_folder`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty and is not overwritten", hint="choose a new folder")
    if out.resolve().is_relative_to(path.resolve()):
        raise UsageError(
            f"{out} lies inside {path}",
            hint="plaintext does not belong beside its ciphertext; choose another folder",
        )
    if not out.absolute().parent.is_dir():
        raise NotFoundError(f"no folder {out.absolute().parent}", hint="create it first")
    pinned = load_signer(signer) if signer else None
    with open_folder(path, (load_identity(identity),), signer=pinned) as opened:
        # Mode 0700 until it is complete: nobody else reads over our shoulder.
        staging = Path(tempfile.mkdtemp(prefix=".wmguard-decrypt-", dir=out.absolute().parent))
        try:
            for file in opened.files:
                tensors = {name: _read(file, name, progress) for name in file.names()}
                save_file(tensors, staging / file.path.name, metadata=dict(file.metadata) or {"format": "pt"})
            weights = {file.path.name for file in opened.files}
            for other in sorted(path.iterdir()):
                if other.is_file() and other.name not in (*_OURS, *weights):
                    shutil.copy2(other, staging / other.name)
            if out.is_dir():
                out.rmdir()
            staging.rename(out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return tuple(sorted(out / name for name in weights))


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
