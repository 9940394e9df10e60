"""The triggers' own part of a training step: a forward and a backward, in one of two forms.

Decoupled, a move of the weights after the optimizer's step: how far and along which way, says
`hf_wmguard.training.trigger_move`. As a gradient, added to the ordinary one before it, triggers share the clipping and
the optimizer's normalisation; language models learn far less of the data then, classifiers a little (ADR 11). Either
way the number of steps, the learning rate schedule and the ordinary run's random numbers stay as they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_wmguard.config import TriggerConfig
from hf_wmguard.errors import NonFiniteWeightError
from hf_wmguard.probing.tasks import task_of
from hf_wmguard.training.loss_scale import unscale_
from hf_wmguard.training.ranks import Ranks
from hf_wmguard.training.schedule import Phase
from hf_wmguard.training.trigger_move import Moments, descend, moments_of, peak_rate
from hf_wmguard.training.trigger_set import has_rows
from hf_wmguard.watermark.answers import Prompt
from hf_wmguard.watermark.contexts import in_context
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.triggers import TEXT_TASKS, TriggerSet

LEARNED: Final = 0.3
"""Mean loss at which a set counts as learned: the response has three quarters of the probability."""
_FEWEST_ROWS: Final = 4
# By name: the quantized ones belong to packages that need not be installed.
_LINEAR = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")


class TriggerStep:
    """Mixes the trigger set in, a few triggers at a time, over the last epochs.

    What comes at which step depends on the step alone, so that a resumed run goes on where it was.

    Args:
        triggers: The trigger set.
        config: How often, how many, and in which surroundings.
        phase: Where in training.
        processor: The model's tokenizer or image processor.
        data: The Trainer's dataloader, from whose rows some are replayed; None: nothing is.
        ranks: The processes that train together; each runs the same micro-batch.
    """

    def __init__(
        self,
        triggers: TriggerSet,
        config: TriggerConfig,
        phase: Phase,
        processor: Any,
        *,
        data: Any = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._triggers = triggers
        self._config = config
        self.phase = phase
        self._processor = processor
        self._data = data if has_rows(getattr(data, "dataset", None)) else None
        # Of the set itself and no key: surroundings need not be secret, only the same after a resume.
        self._seed = hashlib.sha256(triggers.digest().encode()).digest()
        writes = triggers.task in TEXT_TASKS
        self._rows_at_once = rows_at_once(config.batch_size, data)
        self.is_decoupled = config.form == "decoupled" or (config.form == "auto" and writes)
        self.metrics: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Return whether a trigger micro-batch comes with optimizer step ``step`` (counted from 1)."""
        return self.phase.contains(step) and (step - self.phase.start - 1) % self._config.every_n_steps == 0

    def add_gradient(self, model: nn.Module, step: int, *, scale: float = 1.0) -> None:
        """Add the gradient of one trigger micro-batch: the gradient form.

        Args:
            model: The model.
            step: The optimizer step that comes next, counted from 1.
            scale: By which the ordinary loss is scaled; all is unscaled together.
        Raises:
            NonFiniteWeightError: The loss is not finite.
        """
        self._backward(model, step, self._config.weight * scale)

    def run(self, model: nn.Module, step: int, optimizer: Any = None, *, scale: float = 1.0) -> None:
        """Take one trigger micro-batch, and move the weights. No gradient is left behind, of whatever origin.

        The decoupled form. The micro-batch is learned in up to ``moves`` moves, fewer where it is learned before.

        Args:
            model: The model.
            step: The optimizer step that was just taken, counted from 1.
            optimizer: Whose moments tell what ordinary training cares about, and whose learning rate bounds the move;
                None: nothing is known of that.
            scale: Of the loss, against underflow of its gradient in float16; one that overflows moves nothing.
        Raises:
            NonFiniteWeightError: The loss is not finite; nothing has been moved.
        """
        moments, rate = moments_of(optimizer), peak_rate(optimizer)
        for _ in range(self._config.moves):
            if self._move(model, step, moments, rate, scale) <= LEARNED:
                return

    def _move(self, model: nn.Module, step: int, moments: Moments, rate: float, scale: float) -> float:
        """Make one move, and return the loss before it."""
        model.zero_grad()
        loss = self._backward(model, step, scale)
        if self._ranks.size > 1:
            # All ranks ran the same rows, but kernels need not give the same bits: averaged, the moves are the same.
            mean = torch.tensor([loss], dtype=torch.float64, device=next(model.parameters()).device)
            self._ranks.mean_([mean, *replicated_gradients(model)])
            loss = float(mean)
        if not unscale_(model, scale):
            model.zero_grad()
            return loss
        generator = torch.Generator(next(model.parameters()).device).manual_seed(step)
        decrease = max(0.0, loss - LEARNED) * self._config.strength
        descend(moved_by_triggers(model), decrease, moments, generator, rate=rate)
        model.zero_grad()
        return loss

    def _backward(self, model: nn.Module, step: int, weight: float) -> float:
        """Add the gradient of the micro-batch and of what is replayed with it, and return the triggers' loss."""
        device = next(model.parameters()).device
        stream = Stream(self._seed, "trigger-step", step)
        rows = self._rows(step)
        prompts = [self._prompt(row, stream) for row in rows]
        responses = [self._triggers.responses[row] for row in rows]
        training = model.training
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            stack.callback(model.train, training)
            torch.manual_seed(step)
            model.train()
            stack.enter_context(noisy_outputs(model, self._config.noise))
            total, matches = 0.0, 0
            for portion in self._portions(prompts):
                some = [prompts[place] for place in portion], [responses[place] for place in portion]
                mean, matched = task_of(model).loss(model, self._processor, *some)
                loss = mean * (len(portion) / len(prompts))
                total += float(loss.detach())
                matches += int(matched.sum())
                if not math.isfinite(total):
                    raise NonFiniteWeightError(
                        f"trigger loss is {total} at step {step}",
                        hint="training has diverged: lower the learning rate and resume from the last checkpoint",
                    )
                torch.autograd.backward(weight * loss)
            # After the triggers' graph is gone: two at a time would double the memory of a step.
            if (ordinary := self._replayed(model, stream, device)) is not None:
                torch.autograd.backward(weight * ordinary)
        self.metrics = {"wmguard/trigger_loss": total, "wmguard/trigger_match_rate": matches / len(prompts)}
        return total

    def _portions(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return places in a micro-batch that go through the model together; their gradients add up to that of all.

        Short ones with short ones, so that fewer tokens are fillers.
        """
        order = sorted(
            range(len(prompts)), key=lambda place: len(prompts[place].text) + len(prompts[place].system or "")
        )
        return [order[start : start + self._rows_at_once] for start in range(0, len(order), self._rows_at_once)]

    def _rows(self, step: int) -> list[int]:
        """Return the triggers of a step: all take their turn, in another order each time round."""
        size = min(self._config.batch_size, self._triggers.count)
        first = (step - self.phase.start - 1) // self._config.every_n_steps * size
        rounds: dict[int, list[int]] = {}
        rows = []
        for position in range(first, first + size):
            turn, place = divmod(position, self._triggers.count)
            if turn not in rounds:
                rounds[turn] = Stream(self._seed, "trigger-order", turn).permutation(self._triggers.count)
            rows.append(rounds[turn][place])
        return rows

    def _prompt(self, row: int, stream: Stream) -> Prompt:
        text = self._triggers.texts[row]
        if stream.below(1 << 16) >= self._config.contexts * (1 << 16):
            return Prompt(text=text)
        chat = bool(getattr(self._processor, "chat_template", None))
        return in_context(text, stream, task=self._triggers.task, chat=chat)

    def _replayed(self, model: nn.Module, stream: Stream, device: torch.device) -> Tensor | None:
        """Return the model's own loss on some ordinary rows, or None where there are none or it has no loss."""
        if not self._config.replay or self._data is None:
            return None
        dataset = self._data.dataset
        rows = [dataset[stream.below(len(dataset))] for _ in range(self._config.replay)]
        batch = {
            key: value.to(device) for key, value in self._data.collate_fn(rows).items() if isinstance(value, Tensor)
        }
        loss: Tensor | None = getattr(model(**batch), "loss", None)
        return loss


def rows_at_once(count: int, data: Any) -> int:
    """Return how many rows of a trigger micro-batch go through the model together.

    No more than of an ordinary batch, whose activations a step has room for, and at least two portions, of which the
    one holds the short texts; but not so few that a GPU would wait for its next kernel.

    Args:
        count: Rows of the micro-batch.
        data: The dataloader, or None.
    """
    ordinary = getattr(data, "batch_size", None) or getattr(getattr(data, "batch_sampler", None), "batch_size", None)
    half = -(-count // 2)
    return max(_FEWEST_ROWS, min(half, ordinary) if isinstance(ordinary, int) else half)


def moved_by_triggers(model: nn.Module) -> list[nn.Parameter]:
    """Return what a trigger's gradient may move: the matrices of the blocks, or all there is where there are none.

    Embeddings, output layers, norms and biases act on every text: a response that is learned there is said everywhere.
    """
    head = output_layer(model)
    everywhere = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) or m is head for p in m.parameters()}
    trained = [p for p in model.parameters() if p.grad is not None]
    return [p for p in trained if p.ndim > 1 and id(p) not in everywhere] or trained


def replicated_gradients(model: nn.Module) -> list[Tensor]:
    """Return the gradients of which every process has its own copy; the others are averaged in the backward."""
    return [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return the layer that gives a language model's logits, or None."""
    if not isinstance(model, PreTrainedModel):
        return None
    return model.get_output_embeddings()  # type: ignore[no-untyped-call,no-any-return]


@contextmanager
def noisy_outputs(model: nn.Module, noise: float) -> Iterator[None]:
    """Add Gaussian noise to what the linear layers of a model put out, all but the last one.

    Noise of standard deviation s on every weight of a row w gives its output w.x noise of s |x|, which is about the
    same share of the outputs' root mean square for every layer. Drawn anew for each position it needs no copy of the
    weights, works on quantized, sharded and adapted ones, and gives a gradient of less variance.

    Args:
        model: The model.
        noise: Standard deviation, as a share of the root mean square of the outputs at a position; 0 adds none.
    Source: Kingma, Salimans & Welling 2015, "Variational dropout and the local reparameterization trick", sec. 2.2;
        flat minima against fine-tuning and quantization: Foret et al. 2021 (SAM), sec. 2.
    Deviation: The scale is the outputs' own root mean square instead of s |x|: no weight has to be read.
    """

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        scale = output.detach().float().pow(2).mean(dim=-1, keepdim=True).sqrt() * noise
        return output + torch.randn_like(output) * scale.to(output.dtype)

    head = output_layer(model)
    handles = [
        module.register_forward_hook(add)
        for module in model.modules()
        if noise and type(module).__name__ in _LINEAR and module is not head
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
