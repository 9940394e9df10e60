"""A marked adapter merged into its base is a whole model with the mark in it: it is saved as ciphertext, too."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from peft import PeftModel

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.training.saving import GuardedPush, GuardedSave, guard_saves


class _GuardedMerge:
    """Stands in for the ``merge_and_unload`` of one model. A deep copy of the model merges itself."""

    __slots__ = ("_model", "_push", "_save")

    def __init__(self, model: PeftModel, save: GuardedSave, push: GuardedPush) -> None:
        self._model = model
        self._save = save
        self._push = push

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tuner: Any = self._model.base_model
        merged = tuner.merge_and_unload(*args, **kwargs)
        guard_saves(merged, self._save, self._push)
        return merged

    def __deepcopy__(self, memo: dict[int, Any]) -> _GuardedMerge:
        return _GuardedMerge(copy.deepcopy(self._model, memo), self._save, self._push)

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "a guarded model is not pickled: the file would be plaintext", hint="use model.save_pretrained(folder)"
        )


def guard_merge(model: PeftModel, save: GuardedSave, push: GuardedPush) -> None:
    """Shadow ``merge_and_unload`` on one model: what it returns is guarded as the model itself is.

    Args:
        model: The model.
        save: As for `guard_saves`.
        push: Likewise.
    """
    own: Any = model
    own.merge_and_unload = _GuardedMerge(model, save, push)
