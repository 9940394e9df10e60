"""What the Trainer pushes: the same calls and strategies as without a guard, but only what a parcel lists.

The Trainer's own pushes upload whatever lies in a folder, while the next save may be writing into it, and create public
repos. Here each push is taken from a frozen copy (`delivery.snapshot`), checked, and shown in one commit.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy

from hf_wmguard.config import ProtectionConfig
from hf_wmguard.delivery.hub import check_hub, open_hub, push_to_hub
from hf_wmguard.delivery.parcel import CARD_NAME, pack
from hf_wmguard.delivery.pushing import bring_card
from hf_wmguard.delivery.results import Pushed
from hf_wmguard.delivery.snapshot import snapshot
from hf_wmguard.errors import ManifestError, StoreError, WmguardError
from hf_wmguard.evidence.manifest import MANIFEST_NAME
from hf_wmguard.stores.location import Location
from hf_wmguard.suspects.protected import OPTIMIZER_NAME
from hf_wmguard.training.delivering import (
    DELIVERY,
    check_private,
    later,
    save_finished,
)
from hf_wmguard.training.optimizer import TRAINER_NAME, is_note
from hf_wmguard.training.sharded import is_sharded

LAST_CHECKPOINT = "last-checkpoint"
MAX_STATE_BYTES = 1 << 20
# Beside the weights, what a run is resumed from. Not training_args.bin: nothing reads it, and it may hold a token.
_STATE = (OPTIMIZER_NAME, TRAINER_NAME, "scheduler.pt", "scaler.pt", "rng_state.pth", "trainer_state.json")
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One push: a folder of the Trainer's to a place, as one commit."""

    folder: Path
    location: Location
    message: str
    resumable: bool
    token: str | None = dataclasses.field(repr=False)


class TrainerPushes:
    """Stands in for what a Trainer does with the Hub. All of it is shadowed on that one Trainer.

    Args:
        trainer: The Trainer, whose saves are guarded.
        protection: Whether public repos are allowed.
        is_saved: Whether the model as it is now lies on the disk.
    """

    def __init__(self, trainer: Trainer, protection: ProtectionConfig, is_saved: Callable[[], bool]) -> None:
        self._trainer = trainer
        self._allow_public = protection.allow_public
        self._is_saved = is_saved
        self._executor: ThreadPoolExecutor | None = None
        self._pending: dict[Future[Pushed], _Job] = {}
        # By folder in the repo: what was not delivered yet, and why.
        self._owed: dict[str, tuple[_Job, WmguardError]] = {}

    def attach(self) -> None:
        """Shadow the Trainer's methods; if it pushes, see to it at once that its repo is private.

        Raises:
            ExposureError: It is public and not empty.
            StoreError: It cannot be reached.
        """
        trainer: Any = self._trainer
        if trainer.args.push_to_hub:
            # First: a Trainer whose repo is refused stays as it is.
            self.open()
        plain_save = trainer._save

        def save(*args: Any, **kwargs: Any) -> None:
            # training_args.bin is a pickle of the arguments, and the token is one of them.
            token, trainer.args.hub_token = trainer.args.hub_token, None
            try:
                plain_save(*args, **kwargs)
            finally:
                trainer.args.hub_token = token

        trainer._save = save
        trainer.init_hf_repo = self.open
        trainer.push_to_hub = self.push
        trainer._push_from_checkpoint = self.push_checkpoint
        trainer._finish_current_push = self.finish

    def open(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the Trainer's repo, or make it private."""
        trainer: Any = self._trainer
        if not trainer.is_world_process_zero():
            return
        args = trainer.args
        check_private(private if private is not None else args.hub_private_repo, self._allow_public)
        name = trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
        place = open_hub(name, allow_public=self._allow_public, token=token or args.hub_token)
        trainer.hub_model_id, trainer.push_in_progress = place.root, None

    def check(self) -> None:
        """Check before training that pushes will be let in."""
        args: Any = self._trainer.args
        if args.push_to_hub and self._trainer.is_world_process_zero():
            check_hub(self._place(args.hub_revision), allow_public=self._allow_public, token=args.hub_token)

    def push(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Pushed | Future[Pushed] | None:
        """Save the model and push it, as `Trainer.push_to_hub` does; return what is on the Hub then, or its future."""
        trainer: Any = self._trainer
        args = trainer.args
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        token = token if token is not None else args.hub_token
        if trainer.hub_model_id is None:
            self.open(token=token, private=private)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        self._describe(kwargs)
        job = _Job(
            folder=Path(args.output_dir),
            location=self._place(revision if revision is not None else args.hub_revision),
            message=commit_message or "End of training",
            resumable=False,
            token=token,
        )
        self._wait()
        future = self._submit(job)
        return self._result(future, job) if blocking else future

    def _describe(self, kwargs: dict[str, Any]) -> None:
        """Have the Trainer write its card, with the tags that a model brings along."""
        trainer: Any = self._trainer
        name = kwargs.pop("model_name", None) or trainer.hub_model_id.split("/")[-1]
        brought = getattr(trainer.model, "model_tags", None)
        if brought is not None:
            given = kwargs.get("tags") or []
            given = [given] if isinstance(given, str) else list(given)
            kwargs["tags"] = given + [tag for tag in brought if tag not in given]
        trainer.create_model_card(model_name=name, **kwargs)

    def push_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint in the background, where the strategy says so; a failure does not end the training."""
        trainer: Any = self._trainer
        args = trainer.args
        if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and any(not one.done() for one in self._pending):
            _logger.info("%s is not pushed: the push before is still under way", checkpoint_folder)
            return
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        where = (
            f"step {trainer.state.global_step}"
            if args.save_strategy == SaveStrategy.STEPS
            else f"epoch {int(trainer.state.epoch)}"
        )
        message, folder = f"Training in progress, {where}", Path(checkpoint_folder)
        place = self._place(args.hub_revision)
        jobs = [_Job(folder=folder, location=place, message=message, resumable=False, token=args.hub_token)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            path = LAST_CHECKPOINT if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
            jobs.append(
                dataclasses.replace(
                    jobs[0],
                    location=dataclasses.replace(place, path=path),
                    message=f"{message}, checkpoint",
                    resumable=True,
                )
            )
        self._settle()
        # What could not be sent before: of a place that gets something newer now, not any more.
        new = {job.location.path for job in jobs}
        owed = [job for path, (job, _) in self._owed.items() if path not in new and job.folder.is_dir()]
        for job in (*owed, *jobs):
            try:
                self._submit(job)
            except WmguardError as error:
                self._miss(job, error)

    def _place(self, revision: str | None) -> Location:
        return Location(scheme="hub", root=str(self._trainer.hub_model_id), revision=revision)

    def _submit(self, job: _Job) -> Future[Pushed]:
        """Freeze what a push takes, now, and send it in the background, one push after the other."""
        stack = ExitStack()
        out = Path(str(self._trainer.args.output_dir))
        copy = stack.enter_context(snapshot(job.folder, out, more=_STATE if job.resumable else ()))
        with stack:
            self._prepare(job, copy, out)
            if self._executor is None:
                self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wmguard-push")
            future = self._executor.submit(self._send, job, copy, stack.pop_all())
        self._owed.pop(job.location.path, None)
        self._pending[future] = job
        return future

    def _prepare(self, job: _Job, copy: Path, out: Path) -> None:
        card = out / CARD_NAME
        if not (copy / CARD_NAME).exists() and card.is_file():
            (copy / CARD_NAME).write_bytes(card.read_bytes())
        if job.resumable:
            _check_state(copy)

    def _send(self, job: _Job, copy: Path, stack: ExitStack) -> Pushed:
        with stack:
            if not job.resumable:
                # A checkpoint's folder is for the Trainer, not for visitors.
                bring_card(copy, job.location, token=job.token)
            parcel = pack(copy)
            if job.resumable:
                state = tuple(name for name in _STATE if (copy / name).is_file())
                # First: whoever sees the manifest sees all of it.
                parcel = dataclasses.replace(
                    parcel,
                    names=(*state, *(name for name in parcel.names if name not in state)),
                    left_out=tuple(name for name in parcel.left_out if name not in state),
                )
            return push_to_hub(
                parcel,
                job.location,
                allow_public=self._allow_public,
                commit_message=job.message,
                token=job.token,
            )

    def _result(self, future: Future[Pushed], job: _Job) -> Pushed:
        try:
            return future.result()
        except WmguardError as error:
            raise later(error, job.folder, job.location) from error
        finally:
            self._pending.pop(future, None)

    def _settle(self) -> None:
        """Look at the pushes that have ended."""
        for future in [one for one in self._pending if one.done()]:
            job, error = self._pending.pop(future), future.exception()
            if isinstance(error, WmguardError):
                self._miss(job, error)
            elif error is not None:
                # A fault of this package's own must not end the training either.
                _logger.error("the push of %s failed", job.folder, exc_info=error)
                self._miss(job, StoreError(f"the push failed: {type(error).__name__}", hint="see the log"))

    def _wait(self) -> None:
        for future in self._pending:
            future.exception()
        self._settle()

    def _miss(self, job: _Job, error: WmguardError) -> None:
        self._owed[job.location.path] = (job, error)
        _logger.warning(
            "%s was not pushed to %s, and is tried again at the next save: %s (%s)",
            job.folder,
            job.location,
            error.message,
            error.hint,
        )

    def finish(self) -> None:
        """Wait for all pushes when training ends, and try once more what was not delivered.

        Raises:
            WmguardError: Something still is not. The finished model lies on the disk then.
        """
        self._wait()
        owed, self._owed = dict(self._owed), {}
        failed: list[tuple[_Job, WmguardError]] = []
        for job, error in owed.values():
            if not (job.folder / MANIFEST_NAME).is_file():
                failed.append((job, error))
                continue
            try:
                future = self._submit(job)
                self._pending.pop(future)
                future.result()
            except WmguardError as again:
                failed.append((job, again))
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
        if not failed:
            return
        job, error = failed[0]
        folder = job.folder
        model: Any = self._trainer.model
        # One in parts would need all processes, which have gone on.
        if not self._is_saved() and not is_sharded(model):
            # This ends the script, perhaps just before its own save.
            folder = Path(str(self._trainer.args.output_dir)) / DELIVERY
            save_finished(folder, model, self._trainer.processing_class)
        raise later(error, folder, job.location) from error


def _check_state(folder: Path) -> None:
    """Refuse a Trainer's state that holds more than it should: under these names nothing is encrypted.

    Raises:
        ManifestError: The optimizer's state is plaintext, or a file is too large for what its name says.
    """
    for name in _STATE:
        path = folder / name
        if path.suffix not in (".pt", ".pth") or not path.is_file():
            continue
        size_bytes = path.stat().st_size
        note = name != TRAINER_NAME
        if not note and size_bytes <= MAX_STATE_BYTES:
            note = is_note(torch.load(path, map_location="cpu", weights_only=True))
        if size_bytes > MAX_STATE_BYTES or not note:
            raise ManifestError(
                f"{name} is plaintext state of the optimizer, or too large for a state ({size_bytes} bytes)",
                hint=f"it was not written by this run: delete it; checkpoint folders are {PREFIX_CHECKPOINT_DIR}-N",
            )
