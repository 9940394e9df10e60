"""Let ``from_pretrained`` of transformers and peft open protected folders, once this package is imported.

Two functions are wrapped, for good: `PreTrainedModel.from_pretrained`, through which auto classes and pipelines load,
and the one function through which peft reads an adapter's file. Both act on local folders that look protected, the
first also on Hub repos whose config says so, and pass everything else on untouched. Nothing is added to ``config.json``
for this: it also serves folders whose weights are quantized on load, merged into fused experts, or tied, because
transformers' own loader does all of that afterwards.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft.utils.save_and_load
from torch import Tensor
from transformers import PreTrainedModel

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.loading.models import Access, load_model, looks_protected, opened
from hf_wmguard.loading.places import Place, location_of, open_place
from hf_wmguard.stores.location import Location
from hf_wmguard.suspects.adapter import CONFIG_NAME as ADAPTER_CONFIG
from hf_wmguard.suspects.protected import is_diverted
from hf_wmguard.suspects.tensors import read_tensor

_MARK = "_opens_protected_folders"
_PEFT_READER = "safe_load_file"
# What of a load is about reaching the Hub, and is not passed on once it is reached.
_OF_THE_HUB = frozenset(
    ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only", "proxies")
)


def install() -> None:
    """Wrap the two functions; once, however often it is called."""
    _wrap_transformers()
    _wrap_peft()


def _wrap_transformers() -> None:
    plain = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    if hasattr(plain, _MARK):
        return

    @functools.wraps(plain)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        name, load = pretrained_model_name_or_path, functools.partial(plain, cls, None, *args)
        folder = _protected_folder(name, kwargs.get("subfolder"))
        if folder is not None:
            kwargs.pop("subfolder", None)
            return _load(Place(path=folder, name=str(folder)), load, kwargs)
        location = _diverted_location(name, kwargs)
        if location is None:
            return plain(cls, name, *args, **kwargs)
        with open_place(str(location)) as place:
            return _load(place, load, {key: value for key, value in kwargs.items() if key not in _OF_THE_HUB})

    setattr(from_pretrained, _MARK, True)
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]


def _load(place: Place, load: Any, kwargs: dict[str, Any]) -> Any:
    if (place.path / ADAPTER_CONFIG).is_file():
        raise UnsupportedError(
            f"{place.name} holds an adapter, not a whole model",
            hint="load the base first, then PeftModel.from_pretrained(base, folder)",
        )
    return load_model(place, Access.of(None, None), load, **kwargs)


def _diverted_location(name: Any, kwargs: dict[str, Any]) -> Location | None:
    """Return where a Hub repo is whose config, which an auto class has read by now, says that it is protected."""
    config = kwargs.get("config")
    if not isinstance(name, str) or not is_diverted(getattr(config, "transformers_weights", None)):
        return None
    location = location_of(name, kwargs.get("revision"))
    subfolder = kwargs.get("subfolder")
    return replace(location, path=location.key(subfolder)) if location is not None and subfolder else location


def _wrap_peft() -> None:
    library: Any = peft.utils.save_and_load
    plain = getattr(library, _PEFT_READER, None)
    # Without it adapters are not decrypted: peft then refuses the ciphertext by its shapes.
    if plain is None or hasattr(plain, _MARK):
        return

    @functools.wraps(plain)
    def safe_load_file(filename: Any, device: Any = "cpu") -> dict[str, Tensor]:
        folder = _protected_folder(Path(filename).parent)
        if folder is None:
            return plain(filename, device=device)  # type: ignore[no-any-return]
        with opened(Place(path=folder, name=str(folder)), Access.of(None, None)) as one:
            return {name: read_tensor(file, name).to(device) for file in one.files for name in file.names()}

    setattr(safe_load_file, _MARK, True)
    setattr(library, _PEFT_READER, safe_load_file)


def _protected_folder(name: Any, subfolder: str | None = None) -> Path | None:
    """Return the local folder of a name if it has to be opened as a protected one."""
    if not isinstance(name, str | os.PathLike):
        return None
    folder = Path(name) / (subfolder or "")
    return folder if folder.is_dir() and looks_protected(folder) else None
