"""Turn every ``save_pretrained`` of a guarded model into ciphertext, whoever calls it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import transformers.modeling_utils as modeling_utils
from torch import Tensor
from transformers import PreTrainedModel

from hf_wmguard.errors import UnsupportedError

Sink = Callable[[Mapping[str, Tensor], Path, Mapping[str, str] | None], None]
Save = Callable[..., None]
_WRITER = "safe_save_file"
_patching = threading.RLock()


@contextmanager
def weights_go_to(sink: Sink) -> Iterator[None]:
    """Send what this thread's ``save_pretrained`` would write as safetensors to ``sink`` instead.

    transformers writes weights through one function of `transformers.modeling_utils`. It is replaced for the
    length of one save; other threads' saves still reach the original.

    Raises:
        UnsupportedError: This release of transformers writes weights in another way.
    """
    with _patching:
        original = getattr(modeling_utils, _WRITER, None)
        if original is None:
            raise UnsupportedError(
                "this release of transformers writes weights in a way that cannot be intercepted",
                hint="install a release that pip install hf-wmguard allows",
            )
        thread = threading.get_ident()

        def save_file(tensors: Mapping[str, Tensor], filename: Any, metadata: Mapping[str, str] | None = None) -> None:
            if threading.get_ident() == thread:
                sink(tensors, Path(filename), metadata)
            else:
                original(tensors, filename, metadata=metadata)

        setattr(modeling_utils, _WRITER, save_file)
        try:
            yield
        finally:
            setattr(modeling_utils, _WRITER, original)


def guard_saves(model: PreTrainedModel, save: Callable[[PreTrainedModel, Save, Path, dict[str, Any]], None]) -> None:
    """Shadow ``save_pretrained`` on one model, so that every save of it goes through ``save``.

    Args:
        model: The model. The shadow is a bound method, so that a deep copy of the model is guarded as itself; a
            pickle of the whole model fails, which is as it should be: it would be plaintext.
        save: Called with the model, the unguarded ``save_pretrained``, the folder and the other arguments.
    """

    def save_pretrained(self: PreTrainedModel, save_directory: Any, **kwargs: Any) -> None:
        if kwargs.get("push_to_hub"):
            raise UnsupportedError(
                "push_to_hub is not supported by this version", hint="save to a folder, then push that folder"
            )
        if not kwargs.get("is_main_process", True):
            return
        plain = MethodType(type(self).save_pretrained, self)
        save(self, plain, Path(save_directory), kwargs)

    model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[method-assign]
