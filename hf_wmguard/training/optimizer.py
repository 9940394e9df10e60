"""Keep the optimizer's state out of a checkpoint's plaintext: its moments tell about the weights and the data.

The Trainer writes ``torch.save(optimizer.state_dict(), ".../optimizer.pt")``. While it writes a checkpoint, the
optimizer's ``state_dict`` writes the state itself, encrypted, beside the weights, and returns a short note for
``optimizer.pt`` that says so; ``load_state_dict`` understands the note. Both are shadowed on the optimizer that a
callback is handed anyway, so that a bare callback can do it too.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_wmguard.container.files import FileContext, ProtectedFile, write_protected
from hf_wmguard.errors import ManifestError, UnsupportedError
from hf_wmguard.evidence.manifest import Manifest, read_manifest
from hf_wmguard.keys import OwnerKey
from hf_wmguard.suspects.protected import OPTIMIZER_NAME
from hf_wmguard.suspects.tensors import Encoded, has_name, read_tensor

TRAINER_NAME = "optimizer.pt"
_NOTE = "hf-wmguard"
_SKELETON = "skeleton"
_GUARD = "_wmguard_state"
_ROLE = "optimizer"


class OptimizerGuard:
    """Encrypts the optimizer's state in checkpoints, for the owner alone.

    The key is derived from the owner key and the save's set id. Recipients, who only run the model, cannot open it, and
    the state of one save cannot be slipped under the weights of another.

    Args:
        owner: The owner's key.
        hide_names: Whether number and sizes of the tensors are hidden, as those of the weights are.
    """

    def __init__(self, owner: OwnerKey, *, hide_names: bool = False) -> None:
        self._owner = owner
        self._hide_names = hide_names
        self._checkpoint: tuple[Path, Manifest, bool] | None = None
        self._reading: Path | None = None
        self._expected: Path | None = None

    def guard(self, optimizer: Any) -> None:
        """Shadow ``state_dict`` and ``load_state_dict`` of an optimizer; once, however often it is called."""
        if optimizer is None or vars(optimizer).get(_GUARD) is self:
            return
        setattr(optimizer, _GUARD, self)
        plain_state, plain_load = optimizer.state_dict, optimizer.load_state_dict

        def state_dict() -> Any:
            if self._checkpoint is None:
                return plain_state()
            (folder, manifest, writes), self._checkpoint = self._checkpoint, None
            if writes:
                self.write(folder, _context(manifest), plain_state())
            return {_NOTE: f"the state is in {OPTIMIZER_NAME}"}

        def load_state_dict(state: Any) -> Any:
            folder, self._expected = self._reading or self._expected, None
            return plain_load(state if folder is None else self._follow_note(state, folder))

        optimizer.state_dict, optimizer.load_state_dict = state_dict, load_state_dict

    def follow(self, folder: Path, manifest: Manifest, *, writes: bool = True) -> None:
        """Note that the model's weights have just been saved in a checkpoint, whose optimizer state comes next.

        Args:
            folder: The checkpoint.
            manifest: Its manifest.
            writes: Whether this process writes the state; where it does not, it keeps it back all the same.
        """
        self._checkpoint = (folder, manifest, writes)

    def finish(self) -> None:
        """Check, when the Trainer has written a checkpoint, that no state in it went past the guard.

        Raises:
            UnsupportedError: One did; it has been deleted.
        """
        if self._checkpoint is None:
            return
        (folder, _, _), self._checkpoint = self._checkpoint, None
        if (folder / TRAINER_NAME).is_file():
            (folder / TRAINER_NAME).unlink()
            raise UnsupportedError(
                "this Trainer writes the optimizer's state in a way that cannot be intercepted; the plaintext "
                f"{TRAINER_NAME} in {folder} was deleted",
                hint="set save_only_model=True, or install a release that pip install hf-wmguard allows",
            )

    @contextmanager
    def reading(self, folder: Path) -> Iterator[None]:
        """Expect what ``load_state_dict`` is given to come from this checkpoint."""
        self._reading = folder
        try:
            yield
        finally:
            self._reading = None

    def expect(self, folder: Path | None) -> None:
        """Expect the next state that ``load_state_dict`` is given, and that alone, to come from this checkpoint."""
        self._expected = folder

    def pending(self) -> bool:
        """Return whether a checkpoint's weights were saved, and nobody has asked for the state that belongs to them."""
        return self._checkpoint is not None

    def write(self, folder: Path, context: FileContext, state: Any) -> None:
        """Write a state, encrypted, beside the weights of a save.

        Args:
            folder: The save, or where it is staged.
            context: Which save, as `state_context` names it.
            state: What ``state_dict`` gave.
        Raises:
            EnvironmentFault: It cannot be written.
        """
        path = folder / OPTIMIZER_NAME
        tensors: dict[str, Tensor] = {}
        skeleton = io.BytesIO()
        torch.save(_take_out(state, tensors), skeleton)
        tensors[_SKELETON] = torch.frombuffer(skeleton.getbuffer(), dtype=torch.uint8)
        write_protected(
            path,
            Encoded(tensors),
            dek=self._key(context),
            context=context,
            hide_names=self._hide_names,
        )

    def _follow_note(self, state: Any, folder: Path) -> Any:
        if not isinstance(state, dict) or _NOTE not in state:
            # Fail closed, as for weights: whoever can put a plaintext state here steers the training.
            raise ManifestError(
                f"{TRAINER_NAME} in {folder} is plaintext, expected a note about {OPTIMIZER_NAME}",
                hint=f"it was not written by this run; delete {TRAINER_NAME} to resume without the optimizer's state",
            )
        return self.read(folder)

    def read(self, folder: Path) -> Any:
        """Return the state that lies beside the weights of a save.

        Raises:
            NotFoundError: There is none.
            ManifestError, AuthenticationError, FormatError: It does not belong to this save, or was changed.
        """
        manifest, _ = read_manifest(folder, signer=self._owner.signing_key().public_key())
        context = _context(manifest)
        with ProtectedFile(folder / OPTIMIZER_NAME, dek=self._key(context), context=context) as file:
            # As the Trainer reads its own: no code is run.
            skeleton = io.BytesIO(file.read(_SKELETON))
            return _put_back(torch.load(skeleton, map_location="cpu", weights_only=True), file)

    def _key(self, context: FileContext) -> bytes:
        return self._owner.derive(
            "optimizer", model_id=context.model_id, iteration=context.iteration, salt=context.set_id.encode()
        )

    def __repr__(self) -> str:
        return "OptimizerGuard()"


def is_note(state: object) -> bool:
    """Return whether what ``optimizer.pt`` holds is the note about where the state is, and nothing else."""
    return state == {_NOTE: f"the state is in {OPTIMIZER_NAME}"}


def state_context(model_id: str, iteration: str, set_id: str) -> FileContext:
    """Return what ties an optimizer's state to one save."""
    return FileContext(model_id=model_id, iteration=iteration, set_id=set_id, role=_ROLE)


def _context(manifest: Manifest) -> FileContext:
    return state_context(manifest.model_id, manifest.iteration, manifest.set_id)


def _take_out(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a state with a note in the place of every ordinary tensor, which is put into ``tensors``."""
    if type(value) in (Tensor, nn.Parameter) and has_name(value.dtype):
        name = str(len(tensors))
        tensors[name] = value
        return {_NOTE: name}
    if isinstance(value, dict):
        return {key: _take_out(one, tensors) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_take_out(one, tensors) for one in value)
    # Whatever else there is stays in the skeleton, which is encrypted as well.
    return value


def _put_back(value: Any, file: ProtectedFile) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_NOTE}:
            return read_tensor(file, value[_NOTE])
        return {key: _put_back(one, file) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_put_back(one, file) for one in value)
    return value
