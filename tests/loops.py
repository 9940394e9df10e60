"""Training loops of one's own on a tiny model: with accelerate and in plain PyTorch, guarded or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tiny import digest_weights
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerFast, get_linear_schedule_with_warmup

from hf_wmguard import Guard, WatermarkConfig

BATCH = 8
ROWS = 64
ACCUMULATION = 2
STEPS_PER_EPOCH = ROWS // BATCH // ACCUMULATION


def new_accelerator(**settings: Any) -> Accelerator:
    """Return an accelerator whose settings are not those of one before it in this process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION, **settings)


def make_loader(rows: list[dict[str, Any]], *, batch: int = BATCH) -> DataLoader[Any]:
    """Return the rows in batches, always in the same order."""
    columns = [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
    return DataLoader(columns, batch_size=batch)  # type: ignore[arg-type]


@dataclass
class Loop:
    """An own loop with everything that belongs to it.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: What it is trained on.
        epochs: How often.
        accelerated: With accelerate, or in plain PyTorch.
        settings: Of the accelerator.
        scaler: The accelerator's loss scaler, as it would have one on a GPU in fp16.
        guarding: Other arguments of the guard.
        processes: How many train it together, by DDP.
        rank: Which of them this is.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    rows: list[dict[str, Any]]
    epochs: int = 6
    accelerated: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    scaler: Any = None
    guarding: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        self.max_steps = self.epochs * STEPS_PER_EPOCH
        self.loader: Any = make_loader(self.rows, batch=BATCH // self.processes)
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler: Any = get_linear_schedule_with_warmup(self.optimizer, 0, 2 * self.max_steps)
        self.accelerator: Accelerator | None = None
        self.digests: dict[int, str] = {}
        self.guard: Guard | None = None
        self.step = 0
        if self.accelerated:
            self.accelerator = new_accelerator(**self.settings)
            self.accelerator.scaler = self.scaler
            self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
                self.model, self.optimizer, self.loader, self.scheduler
            )
        elif self.processes > 1:
            distributed.init_process_group("gloo")
            self.model = DistributedDataParallel(self.model)  # type: ignore[assignment]
            self.loader = make_loader(self.rows[self.rank :: self.processes], batch=BATCH // self.processes)

    def protect(self, config: WatermarkConfig) -> Guard:
        """Guard the loop."""
        settings = {
            "processing_class": self.tokenizer,
            "max_steps": self.max_steps,
            "dataloader": self.loader,
            **({} if self.accelerated else {"steps_per_epoch": STEPS_PER_EPOCH}),
        }
        self.guard = Guard(config, self.model, self.optimizer, self.accelerator, **{**settings, **self.guarding})
        return self.guard

    def save(self, folder: Path) -> None:
        """Write a checkpoint as this kind of loop does."""
        if self.accelerator is not None:
            self.accelerator.save_state(str(folder))
        else:
            assert self.guard is not None
            self.guard.save(folder, resumable=True)

    def resume(self, folder: Path) -> int:
        """Go on from a checkpoint, and return its step."""
        assert self.guard is not None
        if self.accelerator is not None:
            self.accelerator.load_state(str(folder))
        else:
            self.guard.resume(folder)
            # A plain loop brings its own schedule back; the rate itself came with the optimizer's state.
            self.scheduler.last_epoch = self.guard.step
        self.step = self.guard.step
        return self.step

    def run(self, *, until: int | None = None, at_step: Callable[[int], None] | None = None) -> None:
        """Train, from the step after ``self.step`` on."""
        torch.manual_seed(100 + self.step)
        until = self.max_steps if until is None else until
        while self.step < until:
            # An epoch's batches in order: a resumed loop goes on with the one that comes next.
            done = self.step % STEPS_PER_EPOCH * ACCUMULATION
            for index, batch in enumerate(self.loader):
                if index < done:
                    continue
                last = index % ACCUMULATION == ACCUMULATION - 1
                if self.accelerator is not None:
                    with self.accelerator.accumulate(self.model):
                        self._microstep(batch, last=self.accelerator.sync_gradients)
                else:
                    self._microstep(batch, last=last)
                if last:
                    self.step += 1
                    self.digests[self.step] = digest_weights(self.model)
                    # What a checkpoint brings back is drawn from here on.
                    torch.manual_seed(100 + self.step)
                    if at_step is not None:
                        at_step(self.step)
                    if self.step == until:
                        return

    def _microstep(self, batch: dict[str, torch.Tensor], *, last: bool) -> None:
        accelerated = self.accelerator is not None
        if self.guard is not None:
            self.guard.before_accumulation()
        loss = self.model(**batch).loss
        if self.accelerator is not None:
            self.accelerator.backward(loss)
        else:
            (loss / ACCUMULATION).backward()
        if not accelerated and not last:
            return
        if self.guard is not None:
            self.guard.after_backward()
        self.optimizer.step()
        if self.guard is not None:
            self.guard.after_step(loss=loss)
        self.scheduler.step()
        self.optimizer.zero_grad()


def moments(optimizer: Any) -> dict[str, torch.Tensor]:
    """Return all tensors of an optimizer's state."""
    return {
        f"{index}/{name}": value.detach().clone()
        for index, state in enumerate(optimizer.state.values())
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of a model's weights."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def folder_names(folder: Path) -> set[str]:
    """Return the names of the files in a folder."""
    return {path.name for path in folder.iterdir()}
