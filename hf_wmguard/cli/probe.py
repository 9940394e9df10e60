"""``wmguard probe``: ask a suspect the trigger sets, in this process or through an API."""

from __future__ import annotations

from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_wmguard.cli.options import (
    AlphaOption,
    IdentityOption,
    JsonOption,
    ModelIdOption,
    OwnerKeyOption,
    RegistryOption,
)
from hf_wmguard.cli.output import err, print_report, question_progress


class Api(StrEnum):
    """What is asked of a server, or how a local model is asked."""

    chat = "chat"
    completions = "completions"


class HowLong(StrEnum):
    """When asking ends."""

    sequential = "sequential"
    fixed = "fixed"


def probe(
    owner_key: OwnerKeyOption,
    registry: RegistryOption,
    base_url: Annotated[str | None, typer.Option("--base-url", help="An OpenAI-compatible API, up to /v1.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Name of the model at the API.")] = None,
    local: Annotated[
        Path | None,
        typer.Option("--local", help="Folder of the suspect model, plain or protected, in place of an API."),
    ] = None,
    api: Annotated[
        Api | None, typer.Option("--api", help="Default: chat; of a local model completions (no chat template).")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt before every question.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the likeliest words.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Share of the probability that is sampled from.")] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Length of an answer.")] = 12,
    tries: Annotated[int, typer.Option("--tries", help="How often each trigger is asked.")] = 1,
    budget: Annotated[
        int | None, typer.Option("--budget", help="The most questions, decoys included: 256; of a local model all.")
    ] = None,
    method: Annotated[
        HowLong | None, typer.Option("--method", help="Default: sequential (stops early); of a local model fixed.")
    ] = None,
    decoys: Annotated[
        bool | None, typer.Option("--decoys/--no-decoys", help="Hide triggers among decoys; default at an API.")
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs/--no-logprobs", help="Use the likeliest first tokens where the API tells them.")
    ] = True,
    transcript: Annotated[
        Path | None,
        typer.Option("--transcript", help="File for questions, answers and the signed verdict; goes on with it."),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", help="Questions asked of the API at once.")] = 1,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            "--api-key-env",
            help="Environment variable that holds the API key; by default OPENAI_API_KEY for api.openai.com alone.",
        ),
    ] = None,
    model_id: ModelIdOption = None,
    identity: IdentityOption = None,
    alpha_log10: AlphaOption = -9.0,
    as_json: JsonOption = False,
) -> None:
    """Judge a suspect by its answers to the trigger sets. Exit 0: detected, 1: not detected or inconclusive."""
    from hf_wmguard.probing.asking import Sampling
    from hf_wmguard.verification import probe as judge

    if (local is None) == (base_url is None) or (base_url is None) != (model is None):
        raise typer.BadParameter("give --base-url and --model, or --local and neither")
    options: dict[str, Any] = {
        "owner_key": owner_key,
        "registry": registry,
        "model_id": model_id,
        "alpha_log10": alpha_log10,
        "method": None if method is None else method.value,
        "tries": tries,
        "budget": budget,
        "decoys": decoys,
        "sampling": Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens),
        "system": system,
        "chat": None if api is None else api is Api.chat,
        "transcript": transcript,
    }
    if local is not None:
        from torch import float16

        from hf_wmguard.loading import load_suspect

        with question_progress(f"loading {local}") as advance:
            suspect, tokenizer = load_suspect(local, identity=identity)
            if suspect.device.type == "cpu" and suspect.dtype == float16 and not hasattr(suspect, "hf_quantizer"):
                # CPUs compute in 16 bits many times slower than in 32, and not better.
                suspect.float()
            report = judge(suspect, tokenizer, uri=str(local), progress=advance, **options)
    else:
        asker = _server(base_url or "", model or "", logprobs=logprobs, concurrency=concurrency, key_env=api_key_env)
        with closing(asker), question_progress(f"asking {asker.endpoint}") as advance:
            report = judge(asker, progress=advance, **options)
    print_report(report, as_json)


def _server(base_url: str, model: str, *, logprobs: bool, concurrency: int, key_env: str | None) -> Any:
    from hf_wmguard.probing.openai import OpenAIAsker

    asker = OpenAIAsker(base_url, model, api_key_env=key_env, logprobs=logprobs, concurrency=concurrency)
    if asker.sends_key:
        err.print(f"{asker.endpoint} is sent the API key", markup=False, soft_wrap=True, highlight=False)
    return asker
