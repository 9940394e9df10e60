"""The trigger micro-batch: a forward and a backward of its own before the ordinary ones of a step.

Its gradient adds to the step's, and shares the clipping and the optimizer; the number of steps and the learning
rate schedule stay as they are. The ordinary run's random numbers are not touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_wmguard.config import TriggerConfig
from hf_wmguard.errors import NonFiniteWeightError
from hf_wmguard.probing.tasks import task_of
from hf_wmguard.training.schedule import Phase
from hf_wmguard.watermark.answers import Prompt
from hf_wmguard.watermark.contexts import in_context
from hf_wmguard.watermark.prf import Stream
from hf_wmguard.watermark.triggers import TriggerSet

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
    """

    def __init__(
        self, triggers: TriggerSet, config: TriggerConfig, phase: Phase, processor: Any, *, data: Any = None
    ) -> None:
        self._triggers = triggers
        self._config = config
        self.phase = phase
        self._processor = processor
        self._data = data if hasattr(getattr(data, "dataset", None), "__getitem__") else None
        # Of the set itself and no key: surroundings need not be secret, only the same after a resume.
        self._seed = hashlib.sha256(triggers.digest().encode()).digest()
        self.metrics: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Return whether a trigger micro-batch comes before optimizer step ``step`` (counted from 1)."""
        return self.phase.contains(step) and (step - self.phase.start - 1) % self._config.every_n_steps == 0

    def run(self, model: nn.Module, step: int) -> None:
        """Add the gradient of one trigger micro-batch.

        Raises:
            NonFiniteWeightError: The loss is not finite.
        """
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
            loss, matched = task_of(model).loss(model, self._processor, prompts, responses)
            if not bool(torch.isfinite(loss)):
                raise NonFiniteWeightError(
                    f"trigger loss is {float(loss.detach())} at step {step}",
                    hint="lower triggers.weight or the learning rate",
                )
            torch.autograd.backward(self._config.weight * loss)
            # After the triggers' graph is gone: two at a time would double the memory of a step.
            if (ordinary := self._replayed(model, stream, device)) is not None:
                torch.autograd.backward(self._config.weight * ordinary)
        self.metrics = {
            "wmguard/trigger_loss": float(loss.detach()),
            "wmguard/trigger_match_rate": float(matched.float().mean()),
        }

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
