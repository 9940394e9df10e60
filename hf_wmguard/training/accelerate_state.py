"""Keep what accelerate writes about a model ciphertext: ``save_state``, ``load_state`` and ``save_model``.

``save_state`` collects weights, asks its hooks, then writes the weights that are left and the state of every optimizer.
The hook writes the model encrypted under the canonical names and leaves no weights over. The state of the optimizer
goes through its own ``state_dict``, which `hf_wmguard.training.optimizer` has shadowed. ``save_model`` writes weights
without asking the model, and is shadowed on the accelerator. So are ``save_state`` and ``load_state`` themselves: where
several processes train, one that fails tells the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from hf_wmguard.errors import UnsupportedError
from hf_wmguard.training.loop_checks import check_prepared, unwrapped
from hf_wmguard.training.ranks import Ranks
from hf_wmguard.training.saving import Model
from hf_wmguard.training.sharded import check_whole

_HOOKS = "_wmguard_hooks"


def guard_accelerator(
    accelerator: Accelerator,
    model: Model,
    optimizer: Any,
    *,
    save: Callable[[Path], None],
    load: Callable[[Path], None],
    loaded: Callable[[], None],
) -> None:
    """Send a model's part of an accelerator's states elsewhere from now on; a later guard takes this one's place.

    Args:
        accelerator: The accelerator.
        model: The model inside the one it prepared.
        optimizer: The optimizer it prepared.
        save: Called with the folder that ``save_state`` is about to write.
        load: Called with the folder that ``load_state`` is about to read.
        loaded: Called when it has, or has failed.
    """

    def before_save(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        # Again: what was prepared after the guard was made would be written, too.
        check_prepared(accelerator, model, optimizer)
        weights.clear()
        save(Path(output_dir))

    def before_load(models: list[nn.Module], input_dir: str) -> None:
        check_prepared(accelerator, model, optimizer)
        models.clear()
        load(Path(input_dir))

    def save_model(
        model_to_save: nn.Module, save_directory: Any, max_shard_size: Any = "10GB", safe_serialization: bool = True
    ) -> None:
        if unwrapped(model_to_save) is not model or not safe_serialization:
            raise UnsupportedError(
                "accelerator.save_model would write plaintext", hint="use guard.save(folder), or model.save_pretrained"
            )
        model.save_pretrained(save_directory, max_shard_size=max_shard_size)

    for handle in getattr(accelerator, _HOOKS, ()):
        handle.remove()
    plain: Any = type(accelerator)

    def save_state(output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        # Before the hooks are asked, FSDP's plaintext would be on the disk.
        check_whole(model)
        # Each process writes a part of it: its random numbers.
        with Ranks.current().together("saving the state"):
            return plain.save_state(accelerator, output_dir, *args, **kwargs)

    def load_state(input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        check_whole(model)
        with Ranks.current().together("loading the state"):
            try:
                plain.load_state(accelerator, input_dir, *args, **kwargs)
            finally:
                loaded()

    handles = (
        accelerator.register_save_state_pre_hook(before_save),
        accelerator.register_load_state_pre_hook(before_load),
    )
    setattr(accelerator, _HOOKS, handles)
    own: Any = accelerator
    own.save_model, own.save_state, own.load_state = save_model, save_state, load_state
