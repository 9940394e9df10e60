"""``wmguard embed``: a marked copy of a finished model, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_wmguard.cli.options import BudgetOption, JsonOption, OwnerKeyOption, RegistryOption
from hf_wmguard.cli.output import byte_progress, console, err, pairs_table, print_json


def embed(
    model_dir: Annotated[Path, typer.Argument(help="Folder of the model: safetensors in fp32, bf16 or fp16.")],
    out_dir: Annotated[Path, typer.Argument(help="A new folder for the marked copy.")],
    owner_key: OwnerKeyOption,
    registry: RegistryOption,
    model_id: Annotated[str, typer.Option("--model-id", help="Name of the model, for example acme/triage.")],
    iteration: Annotated[str, typer.Option("--iteration", help="Which version of this model.")] = "1",
    budget: BudgetOption = 0.01,
    as_json: JsonOption = False,
) -> None:
    """Write a copy of a model that carries the owner's signature; what is copied is plaintext."""
    from hf_wmguard.config import SignatureConfig, WatermarkConfig
    from hf_wmguard.embedding import embed_folder

    config = WatermarkConfig(
        model_id=model_id,
        iteration=iteration,
        owner_key=owner_key,
        registry=str(registry),
        signature=SignatureConfig(budget=budget),
        triggers=None,
    )
    total = sum(path.stat().st_size for path in model_dir.rglob("*") if path.is_file())
    # Every byte is copied once, and every byte of weights hashed once.
    with byte_progress(2 * total) as advance:
        result = embed_folder(model_dir, out_dir, config, progress=advance)
    if as_json:
        print_json({"out": str(out_dir), **result.to_json()})
        return
    table = pairs_table(f"marked, log10 p = {result.log10_p:.1f}")
    for name, value in result.to_json().items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    err.print(f"{out_dir} holds plaintext weights", markup=False, soft_wrap=True)
