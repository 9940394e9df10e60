"""Turn every ``model.save_pretrained(...)`` of a guarded model into ciphertext, whoever calls it.

The method is shadowed on the instance; a call through the class, ``PeftModel.save_pretrained(model, ...)``, is unseen.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

import peft.peft_model
import transformers.modeling_utils
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from hf_wmguard.errors import EnvironmentFault, UnsupportedError, WmguardError
from hf_wmguard.training.ranks import Ranks
from hf_wmguard.training.sharded import is_sharded, reshard, splits_itself, tied_again, whole_state

Model = PreTrainedModel | PeftModel
Sink = Callable[[Mapping[str, Tensor], Path, Mapping[str, str] | None], None]
Save = Callable[..., None]
GuardedSave = Callable[[Model, Save, Path, dict[str, Any]], None]
GuardedPush = Callable[[Path, str, dict[str, Any]], Any]
_WRITER = "safe_save_file"
_PUSH_OPTIONS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
    "exist_ok",
)
_patching = threading.RLock()


@contextmanager
def weights_go_to(sink: Sink, model: Model) -> Iterator[None]:
    """Send what this thread's ``save_pretrained`` would write as safetensors to ``sink`` instead.

    transformers writes weights through one function of `transformers.modeling_utils`, and peft through one of
    `peft.peft_model`. It is replaced for the length of one save; other threads' saves still reach the original.

    Args:
        sink: Called with the tensors, the file's path and its metadata.
        model: The model that is saved.
    Raises:
        UnsupportedError: This release of transformers or peft writes weights in another way.
    """
    library: Any = peft.peft_model if isinstance(model, PeftModel) else transformers.modeling_utils
    with _patching:
        original = getattr(library, _WRITER, None)
        if original is None:
            name = library.__name__.partition(".")[0]
            raise UnsupportedError(
                f"this release of {name} writes weights in a way that cannot be intercepted",
                hint="install a release that pip install hf-wmguard allows",
            )
        thread, failed = threading.get_ident(), list[WmguardError]()

        def save_file(tensors: Mapping[str, Tensor], filename: Any, metadata: Mapping[str, str] | None = None) -> None:
            if threading.get_ident() != thread:
                original(tensors, filename, metadata=metadata)
            elif not failed:
                try:
                    sink(tensors, Path(filename), metadata)
                except WmguardError as error:
                    # Of a model in parts, all others wait for this process at the end of transformers' own save.
                    failed.append(error)

        setattr(library, _WRITER, save_file)
        try:
            yield
        finally:
            setattr(library, _WRITER, original)
        if failed:
            raise failed[0]


@contextmanager
def naming_faults(folder: Path) -> Iterator[None]:
    """Say what to do where a library cannot write a file of its own, such as the config; ours say it themselves.

    Raises:
        EnvironmentFault: The system refused to write.
    """
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"cannot save into {folder}: {error.strerror or error}", hint="check free space and permissions"
        ) from error


def put_together(model: Model, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a save, with all weights of a model that lies in parts and does not see to it itself."""
    if not is_sharded(model) or splits_itself(model):
        return dict(kwargs)
    # accelerate has put them together already where somebody asked it for the state dict: on every process.
    state = kwargs.get("state_dict")
    Ranks.current().check_same(
        "whether save_pretrained is given a state_dict",
        str(state is not None),
        hint="give it on every process, or on none",
    )
    reshard(model)
    return {**kwargs, "state_dict": tied_again(model, whole_state(model) if state is None else state)}


def send_parts(model: Model, plain_save: Save, kwargs: Mapping[str, Any]) -> None:
    """Take part in the save of a model that lies in parts, on a process that writes nothing of it."""
    if not splits_itself(model):
        put_together(model, kwargs)
        return
    with tempfile.TemporaryDirectory() as folder:
        # transformers makes and lists a folder on every process.
        plain_save(folder, **{**kwargs, "is_main_process": False})


def _push_once(model: Model, push: Callable[[], Any]) -> Any:
    """Push what was saved from the process that has written it; the others, where all took part, hear how it went."""
    with (Ranks.current() if is_sharded(model) else Ranks()).together("pushing"):
        return push() if Ranks.current().is_main else None


class _GuardedSave:
    """Stands in for the ``save_pretrained`` of one model.

    A deep copy of the model gets a guard of its own, for its own weights. Pickling a guarded model
    (``torch.save(model)``) fails, because the file would be plaintext.
    """

    __slots__ = ("_model", "_push", "_save")

    def __init__(self, model: Model, save: GuardedSave, push: GuardedPush) -> None:
        self._model = model
        self._save = save
        self._push = push

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        plain = MethodType(type(self._model).save_pretrained, self._model)
        kwargs |= dict(zip(list(inspect.signature(plain).parameters)[1:], args, strict=False))
        options = {name: kwargs.pop(name) for name in _PUSH_OPTIONS if name in kwargs}
        pushes, repo = kwargs.pop("push_to_hub", False), options.pop("repo_id", None)
        if kwargs.get("distributed_checkpoint"):
            raise UnsupportedError(
                "distributed_checkpoint writes plaintext", hint="call save_pretrained without distributed_checkpoint"
            )
        if not kwargs.get("safe_serialization", True) or kwargs.get("path_initial_model_for_weight_conversion"):
            raise UnsupportedError(
                "a converted adapter, or one that is not safetensors, would be plaintext",
                hint="call save_pretrained(folder) without safe_serialization or weight conversion",
            )
        # Of a model that lies in parts, all processes take part in a save.
        if not kwargs.get("is_main_process", True) and not is_sharded(self._model):
            return
        self._save(self._model, plain, Path(save_directory), kwargs)
        if pushes:
            name = repo or Path(save_directory).absolute().name
            _push_once(self._model, partial(self._push, Path(save_directory), name, options))

    def __deepcopy__(self, memo: dict[int, Any]) -> _GuardedSave:
        return _GuardedSave(copy.deepcopy(self._model, memo), self._save, self._push)

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "a guarded model is not pickled: the file would be plaintext", hint="use model.save_pretrained(folder)"
        )


class _GuardedPush:
    """Stands in for the ``push_to_hub`` of one model; as `_GuardedSave`, by which it saves."""

    __slots__ = ("_model", "_push")

    def __init__(self, model: Model, push: GuardedPush) -> None:
        self._model = model
        self._push = push

    def __call__(self, repo_id: str, **kwargs: Any) -> Any:
        options = {name: kwargs.pop(name) for name in _PUSH_OPTIONS if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            # What lies here until it is sent is ciphertext.
            self._model.save_pretrained(folder, **kwargs)
            return _push_once(self._model, partial(self._push, Path(folder), repo_id, options))

    def __deepcopy__(self, memo: dict[int, Any]) -> _GuardedPush:
        return _GuardedPush(copy.deepcopy(self._model, memo), self._push)

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "a guarded model is not pickled: the file would be plaintext", hint="use model.save_pretrained(folder)"
        )


def is_guarded(model: Any) -> bool:
    """Return whether saves of this model, and not just of one around it, are ciphertext."""
    return isinstance(vars(model).get("save_pretrained"), _GuardedSave)


class _RefusedSave:
    """What stands where ``save_pretrained`` and ``push_to_hub`` were on a model inside a guarded one."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(
            "a part of a guarded model is not saved by itself: the file would be plaintext",
            hint="save the whole model with its own save_pretrained",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _RefusedSave:
        return self

    def __reduce__(self) -> NoReturn:
        self()


def inner_model(model: Model) -> PreTrainedModel:
    """Return the model itself, or the one that adapters were put into."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner  # type: ignore[no-any-return]


def guard_saves(model: Model, save: GuardedSave, push: GuardedPush) -> None:
    """Shadow ``save_pretrained`` and ``push_to_hub`` on one model: every save of it goes through ``save``.

    The models inside it (``model.base_model``) share its weights, and refuse to be saved.

    Args:
        model: The model.
        save: Called with the model, the unguarded ``save_pretrained``, the folder and the other arguments.
        push: Called with a folder that was just saved, the repo's name and the other arguments of ``push_to_hub``.
    """
    for part in model.modules():
        if isinstance(part, Model):
            own: Any = part
            own.save_pretrained = _GuardedSave(model, save, push) if part is model else _RefusedSave()
            own.push_to_hub = _GuardedPush(model, push) if part is model else _RefusedSave()
