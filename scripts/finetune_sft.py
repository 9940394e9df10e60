"""Fine-tune a language model with TRL's SFTTrainer: marked in its last epochs, saved as ciphertext.

    wmguard keygen owner --out owner.key
    wmguard keygen recipient --out inference.key
    python scripts/finetune_sft.py --config configs/sft.yaml

The config has the names that ``trl sft --config`` reads, and the watermark's beside them. It trains a tiny model on the
data in examples/, offline. Any model and data set of the Hub goes in its place:

    ... --from_scratch false --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara --use_peft true
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.distributed import DistributedConfig
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from hf_wmguard import protect_trainer
from hf_wmguard.training.arguments import parse_arguments


@dataclass
class Arguments:
    """What TRL's command has no name for."""

    from_scratch: bool = field(default=False, metadata={"help": "make new weights from the model's config"})
    fsdp_size: int = field(default=1, metadata={"help": "split the model over so many processes, by FSDP2"})


def main() -> None:
    args, script, training, model_args, watermark = parse_arguments(Arguments, ScriptArguments, SFTConfig, ModelConfig)
    set_seed(training.seed)
    name = model_args.model_name_or_path
    data = load_dataset(script.dataset_name, script.dataset_config, streaming=script.dataset_streaming)
    if args.from_scratch and args.fsdp_size > 1:
        raise SystemExit("error: a model that is split is loaded\nhint: add --from_scratch false and the model's name")
    if args.from_scratch:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    else:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=model_args.model_revision,
            attn_implementation=model_args.attn_implementation,
            dtype=model_args.dtype,
            quantization_config=get_quantization_config(model_args),
            distributed_config=DistributedConfig(fsdp_size=args.fsdp_size) if args.fsdp_size > 1 else None,
        )
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
        processing_class=AutoTokenizer.from_pretrained(name, revision=model_args.model_revision),
        peft_config=get_peft_config(model_args),
    )
    protect_trainer(trainer, watermark)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
