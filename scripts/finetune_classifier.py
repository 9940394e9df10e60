"""Fine-tune a text classifier with the Trainer: marked in its last epochs, saved as ciphertext.

    wmguard keygen owner --out owner.key
    wmguard keygen recipient --out inference.key
    python scripts/finetune_classifier.py --config configs/classifier.yaml

The config trains a tiny model on the data in examples/, offline. Any model and data set of the Hub goes in its place:

    ... --from_scratch false --model_name_or_path distilbert/distilbert-base-uncased \\
        --dataset_name dair-ai/emotion --text_column text --label_column label
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import ClassLabel, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.distributed import DistributedConfig

from hf_wmguard import protect_trainer
from hf_wmguard.metrics import load_metric
from hf_wmguard.training.arguments import parse_arguments


@dataclass
class Arguments:
    """The model and the data."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the model"})
    dataset_name: str = field(metadata={"help": "Hub name or folder of the data"})
    dataset_config: str | None = field(default=None, metadata={"help": "which of its configurations"})
    text_column: str = field(default="text", metadata={"help": "column with the texts"})
    label_column: str = field(default="label", metadata={"help": "column with the labels, names or numbers"})
    train_split: str = "train"
    test_split: str = "test"
    max_length: int = field(default=128, metadata={"help": "tokens of a text that are read"})
    from_scratch: bool = field(default=False, metadata={"help": "make new weights from the model's config"})
    fsdp_size: int = field(default=1, metadata={"help": "split the model over so many processes, by FSDP2"})


def main() -> None:
    args, training, watermark = parse_arguments(Arguments, TrainingArguments)
    if args.from_scratch and args.fsdp_size > 1:
        raise SystemExit("error: a model that is split is loaded\nhint: add --from_scratch false and the model's name")
    set_seed(training.seed)
    data = load_dataset(args.dataset_name, args.dataset_config)
    train = data[args.train_split]
    feature = train.features[args.label_column]
    names = feature.names if isinstance(feature, ClassLabel) else sorted(set(train[args.label_column]))
    numbers = {name: number for number, name in enumerate(names)}

    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    config = AutoConfig.from_pretrained(
        args.model_name_or_path,
        num_labels=len(names),
        id2label={number: str(name) for name, number in numbers.items()},
        label2id={str(name): number for name, number in numbers.items()},
    )
    make = AutoModelForSequenceClassification
    split = DistributedConfig(fsdp_size=args.fsdp_size) if args.fsdp_size > 1 else None
    model = (
        make.from_config(config)
        if args.from_scratch
        else make.from_pretrained(args.model_name_or_path, config=config, distributed_config=split)
    )

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        labels = rows[args.label_column]
        encoded = tokenizer(rows[args.text_column], truncation=True, max_length=args.max_length)
        return {**encoded, "labels": labels if isinstance(feature, ClassLabel) else [numbers[one] for one in labels]}

    with training.main_process_first():
        data = data.map(encode, batched=True, remove_columns=train.column_names)
    metric = load_metric("accuracy")

    def accuracy(prediction: EvalPrediction) -> Any:
        return metric.compute(predictions=prediction.predictions.argmax(axis=-1), references=prediction.label_ids)

    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=data[args.train_split],
        eval_dataset=data.get(args.test_split),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    protect_trainer(trainer, watermark)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    if trainer.eval_dataset is not None:
        trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
