"""Read a protected checkpoint back into the model that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor

from hf_wmguard.container.recipients import X25519Identity
from hf_wmguard.errors import ManifestError, UnsupportedError
from hf_wmguard.evidence.manifest import MANIFEST_NAME, Manifest
from hf_wmguard.keys import OwnerKey
from hf_wmguard.loading import read_state_dict
from hf_wmguard.training.backends import ADAPTER
from hf_wmguard.training.saving import Model
from hf_wmguard.training.sharded import is_sharded, load_whole, local


def read_weights(folder: Path, model: Model, owner: OwnerKey) -> None:
    """Put the weights of a checkpoint that the owner signed into a model: all of them, or it is an error.

    Raises:
        UnsupportedError: The checkpoint's weights are not those of this model, or have other names on disk.
        ManifestError: The folder has no manifest, or one that does not match its signature or its files.
        NotFoundError, AuthenticationError, FormatError: As `read_state_dict`.
    """
    if not (folder / MANIFEST_NAME).is_file():
        # Fail closed: whoever can put a plaintext checkpoint here could put other weights under the mark.
        raise ManifestError(
            f"checkpoint {folder} has no manifest: it is not protected, or its save was interrupted",
            hint="resume from an encrypted checkpoint of this run, or start a new run from the plaintext weights",
        )
    tensors = read_state_dict(folder, (X25519Identity.from_owner(owner),), signer=owner.signing_key().public_key())
    result: Any
    if isinstance(model, PeftModel):
        # An adapter's checkpoint lacks the base's weights, as it should.
        result = set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)
        wrong = result.unexpected_keys
    else:
        result = load_whole(model, tensors) if is_sharded(model) else model.load_state_dict(tensors, strict=False)
        wrong = [*result.unexpected_keys, *_not_read(model, tensors, result.missing_keys)]
    if wrong:
        raise UnsupportedError(
            f"checkpoint {folder} does not fit the model: {', '.join(sorted(wrong)[:3])} and {len(wrong)} in all",
            hint="resume with the model that was trained; one whose weights have other names on disk cannot be resumed",
        )


def steps_done(manifest: Manifest, folder: Path) -> int:
    """Return the optimizer steps done when a checkpoint was written.

    Raises:
        ManifestError: No training run has written it.
    """
    if manifest.step is None:
        raise ManifestError(f"{folder} was not written by a training run", hint="load it as the model to start from")
    return manifest.step


def _not_read(model: Any, tensors: Mapping[str, Tensor], missing: list[str]) -> list[str]:
    """Return those of the missing names that are not tied to one that was read, and are saved at all."""
    weights = {name: local(one) for name, one in model.state_dict(keep_vars=True).items() if isinstance(one, Tensor)}
    read = {weights[name].data_ptr() for name in tensors if name in weights}
    never_saved = set(model._keys_to_ignore_on_save or ())
    return [
        name for name in missing if name in weights and weights[name].data_ptr() not in read and name not in never_saved
    ]
