"""Fine-tune a language model in a loop of your own with accelerate: marked in its last epochs, saved as ciphertext.

    wmguard keygen owner --out owner.key
    wmguard keygen recipient --out inference.key
    accelerate launch --config_file configs/accelerate/single.yaml \\
        scripts/finetune_accelerate.py --config configs/loop.yaml

The config trains a tiny model on the data in examples/, offline. Any model and data set of the Hub goes in its place:

    ... --from_scratch false --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
        --dataset_name Salesforce/wikitext --dataset_config wikitext-2-raw-v1
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    get_linear_schedule_with_warmup,
)

from hf_wmguard import Guard
from hf_wmguard.training.arguments import parse_arguments


@dataclass
class Arguments:
    """The model, the data and the loop."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the model"})
    dataset_name: str = field(metadata={"help": "Hub name or folder of the data"})
    output_dir: str = field(metadata={"help": "where the finished model and the checkpoints go"})
    dataset_config: str | None = field(default=None, metadata={"help": "which of its configurations"})
    dataset_split: str = "train"
    text_column: str = field(default="text", metadata={"help": "column with the texts"})
    max_length: int = field(default=128, metadata={"help": "tokens of a text that are read"})
    from_scratch: bool = field(default=False, metadata={"help": "make new weights from the model's config"})
    epochs: int = 3
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    max_grad_norm: float = 1.0
    seed: int = 42
    log_every: int = field(default=50, metadata={"help": "steps between two lines about the loss"})
    checkpoint_every: int = field(default=0, metadata={"help": "steps between two checkpoints; 0: none"})
    resume_from: str | None = field(default=None, metadata={"help": "a checkpoint of this run to go on from"})


def make_loader(args: Arguments, tokenizer: Any) -> DataLoader[Any]:
    """Return the tokenized texts, in batches."""
    data = load_dataset(args.dataset_name, args.dataset_config)[args.dataset_split]
    data = data.filter(lambda row: row[args.text_column].strip())

    def encode(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows[args.text_column], truncation=True, max_length=args.max_length)

    data = data.map(encode, batched=True, remove_columns=data.column_names)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return DataLoader(data, batch_size=args.batch_size, shuffle=True, collate_fn=collate)


def main() -> None:
    args, watermark = parse_arguments(Arguments)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # Each epoch has an order of its own, the same one after a resume.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    make = AutoModelForCausalLM
    model = (
        make.from_config(AutoConfig.from_pretrained(args.model_name_or_path))
        if args.from_scratch
        else make.from_pretrained(args.model_name_or_path)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    with accelerator.main_process_first():
        # The others read what the first one has prepared.
        loader = make_loader(args, tokenizer)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    max_steps = args.epochs * steps_per_epoch
    # accelerate takes a step of the schedule for every process.
    steps = max_steps * accelerator.num_processes
    scheduler = accelerator.prepare(get_linear_schedule_with_warmup(optimizer, steps // 20, steps))

    guard = Guard(
        watermark,
        model,
        optimizer,
        accelerator,
        processing_class=tokenizer,
        max_steps=max_steps,
        steps_per_epoch=steps_per_epoch,
        dataloader=loader,
    )
    with guard:
        if args.resume_from is not None:
            accelerator.load_state(args.resume_from)
        model.train()
        while guard.step < max_steps:
            epoch, done = divmod(guard.step, steps_per_epoch)
            loader.set_epoch(epoch)
            batches = accelerator.skip_first_batches(loader, done * args.gradient_accumulation_steps)
            for batch in batches:
                with accelerator.accumulate(model):
                    guard.before_accumulation()
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    guard.after_backward()
                    optimizer.step()
                    guard.after_step()
                    scheduler.step()
                    optimizer.zero_grad()
                if not accelerator.sync_gradients:
                    continue
                if guard.step % args.log_every == 0:
                    accelerator.print({"step": guard.step, "loss": loss.item(), **guard.metrics()})
                if args.checkpoint_every and guard.step % args.checkpoint_every == 0:
                    accelerator.save_state(str(Path(args.output_dir) / f"checkpoint-{guard.step}"))
    manifest = guard.save(args.output_dir)
    accelerator.print(f"{args.output_dir}: mark {manifest.state}, {manifest.signature}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
