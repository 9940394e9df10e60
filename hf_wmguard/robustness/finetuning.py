"""Attacks that train: with the real Trainer, on a copy of the model."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed

Rows = list[dict[str, Any]]
_TEMPERATURE = 2.0


def finetune(
    model: PreTrainedModel, rows: Rows, *, learning_rate: float, epochs: float, seed: int = 0
) -> dict[str, Tensor]:
    """Return the weights after fine-tuning all of them.

    Args:
        model: Left as it is.
        rows: ``input_ids``, ``attention_mask`` and ``labels`` of one length.
        learning_rate: Its peak; it falls linearly to 0.
        epochs: Passes over the rows.
        seed: Of order and dropout.
    """
    student = copy.deepcopy(model)
    _train(Trainer, student, rows, learning_rate=learning_rate, epochs=epochs, seed=seed)
    return _state(student)


def finetune_lora(
    model: PreTrainedModel, rows: Rows, *, learning_rate: float, epochs: float, rank: int = 16, seed: int = 0
) -> dict[str, Tensor]:
    """Return the weights after training a low-rank adapter on every linear layer and merging it.

    Args:
        model: Left as it is.
        rows: As for `finetune`.
        learning_rate: Its peak.
        epochs: Passes over the rows.
        rank: Of the adapter; its scale is 2.
        seed: Of the adapter, order and dropout.
    Source: Hu et al. 2021 (LoRA), sec. 4.1.
    """
    set_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted = get_peft_model(copy.deepcopy(model), config)
    _train(Trainer, adapted, rows, learning_rate=learning_rate, epochs=epochs, seed=seed)
    return _state(adapted.merge_and_unload())


def distill(
    model: PreTrainedModel, rows: Rows, *, learning_rate: float, epochs: float, seed: int = 0
) -> dict[str, Tensor]:
    """Return the weights of a fresh model of the same shape that was taught to answer like this one.

    Args:
        model: The teacher, left as it is.
        rows: As for `finetune`; labels are used only to leave padding out.
        learning_rate: Its peak.
        epochs: Passes over the rows.
        seed: Of the fresh weights, order and dropout.
    Source: Hinton et al. 2015, sec. 2 (soft targets alone, at temperature 2).
    """
    set_seed(seed)
    student = type(model)(copy.deepcopy(model.config))
    teacher: Any = copy.deepcopy(model).train(False)

    class Distiller(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            with torch.no_grad():
                goal = teacher.to(outputs.logits.device)(**inputs).logits
            keep = labels != -100
            ours, theirs = (torch.log_softmax(one[keep].float() / _TEMPERATURE, -1) for one in (outputs.logits, goal))
            loss = _TEMPERATURE**2 * torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
            return (loss, outputs) if return_outputs else loss

    _train(Distiller, student, rows, learning_rate=learning_rate, epochs=epochs, seed=seed)
    return _state(student)


def _train(kind: type[Trainer], model: Any, rows: Rows, *, learning_rate: float, epochs: float, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                learning_rate=learning_rate,
                num_train_epochs=epochs,
                per_device_train_batch_size=8,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=False,
                seed=seed,
            ),
            train_dataset=rows,
        )
        # It prints to stdout, where results belong.
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
