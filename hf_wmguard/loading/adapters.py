"""A protected adapter on its base model, decrypted in memory."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from hf_wmguard.errors import FormatError
from hf_wmguard.loading.models import Access, opened
from hf_wmguard.loading.places import Place
from hf_wmguard.suspects.tensors import read_tensor

_ADAPTER = "default"


def load_adapter(place: Place, access: Access, base: Any) -> Any:
    """Return a model with a protected adapter on it, for inference; peft changes the given model in place.

    Args:
        place: The protected folder of an adapter.
        access: Who loads.
        base: The model that the adapter was trained on.
    Raises:
        FormatError: The folder's tensors are not those of its ``adapter_config.json`` on this base.
        NotFoundError, ManifestError, AuthenticationError: As `open_folder`.
    """
    with opened(place, access) as one:
        tensors = {name: read_tensor(file, name) for file in one.files for name in file.names()}
        config = PeftConfig.from_pretrained(str(place.path))
    config.inference_mode = True
    try:
        return _put_on(base, config, tensors, place.name)
    except (RuntimeError, ValueError) as error:
        # peft's own words about modules that are not there and shapes that do not fit; both name no weight.
        raise FormatError(
            f"the adapter in {place.name} does not fit this base: {' '.join(str(error).split())[:150]}",
            hint="pass the model that it was trained on",
        ) from None


def _put_on(base: Any, config: PeftConfig, tensors: dict[str, Tensor], name: str) -> Any:
    model = get_peft_model(base, config, adapter_name=_ADAPTER)
    # Both ways: an adapter of which a part stays as it was initialised is another model than the one that was saved.
    expected = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False).keys()
    if missing := sorted(expected - tensors.keys()):
        raise FormatError(f"{name} lacks {missing[0]!r} and {len(missing) - 1} more", hint="is this the right base?")
    result: Any = set_peft_model_state_dict(model, tensors, adapter_name=_ADAPTER)
    if result.unexpected_keys:
        raise FormatError(f"{name} holds {result.unexpected_keys[0]!r}, which base lacks", hint="use the right base")
    return model.eval()
