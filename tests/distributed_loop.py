"""One guarded loop of one's own, on as many processes as torchrun starts: what the tests of the guard drive.

Called with a folder and a JSON object of settings (see `Settings`); each rank writes ``rank-N.json`` into the folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from loops import STEPS_PER_EPOCH, Loop, moments, weights_of
from tiny import (
    digest_weights,
    excerpts,
    files_holding,
    guarded_config,
    make_model,
    make_rows,
    make_texts,
    make_tokenizer,
)
from torch import distributed

from hf_wmguard.config import QualityConfig, SignatureConfig, TriggerConfig, WatermarkConfig
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.training.ranks import Ranks

EPOCHS = 3
STATE_AT = 2 * STEPS_PER_EPOCH


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is different in a run."""

    task: str = "classification"
    form: str = "gradient"
    accelerated: bool = True
    bucket_views: bool = False
    disk_full: bool = False
    drift: bool = False
    only_until: int | None = None
    resume: bool = False
    quality: bool = False


def make_loop(root: Path, settings: Settings) -> tuple[Loop, WatermarkConfig]:
    """Return the loop of this process, and what guards it."""
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = make_tokenizer()
    config = dataclasses.replace(
        guarded_config(root),
        signature=SignatureConfig(budget=0.06, last_epochs=2),
        triggers=TriggerConfig(count=8, batch_size=4, last_epochs=2, contexts=0.0, form=settings.form),
        quality=QualityConfig(metric="rank", tolerance=1.0) if settings.quality else None,
    )
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=settings.bucket_views)
    loop = Loop(
        make_model(settings.task, len(tokenizer)),
        tokenizer,
        make_rows(settings.task, tokenizer, make_texts()),
        epochs=EPOCHS,
        accelerated=settings.accelerated,
        settings={"kwargs_handlers": [views]} if settings.accelerated else {},
        # Each process comes to a number of its own.
        guarding={"evaluate": lambda model: {"rank": 1.0 + rank}} if settings.quality else {},
        processes=processes,
        rank=rank,
    )
    return loop, config


def part(root: Path, settings: Settings) -> None:
    """Train up to a checkpoint inside the marked phase, or from there to the end, maybe on other processes."""
    loop, config = make_loop(root, settings)
    guard, state = loop.protect(config), root / "state"
    resumed_at = loop.resume(state) if settings.resume else 0
    loop.run(until=settings.only_until)
    seen, states = weights_of(loop.model), moments(loop.optimizer)
    if settings.only_until is not None:
        loop.save(state)
    else:
        guard.finish()
        guard.save(root / "final")
    result: dict[str, Any] = {
        "world": Ranks.current().size,
        "resumed_at": resumed_at,
        "digest": digest_weights(loop.model),
        "metrics": guard.metrics(),
        "steps": len(loop.digests),
    }
    if loop.rank == 0:
        found = [
            *PlaintextFinder({**seen, **weights_of(loop.model)}).scan([root]),
            *files_holding(root, excerpts(states)),
        ]
        result["exposed"] = [str(path) for path in found]
    (root / f"rank-{loop.rank}.json").write_text(json.dumps(result))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    root, settings = Path(sys.argv[1]), Settings(**json.loads(sys.argv[2]))
    if settings.resume or settings.only_until is not None:
        part(root, settings)
        return
    loop, config = make_loop(root, settings)
    rank = loop.rank
    state, seen, states = root / "state", dict[str, Any](), dict[str, Any]()

    def sabotage() -> None:
        if settings.disk_full and rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))
        if settings.drift and rank == 1:
            with torch.no_grad():
                next(loop.model.parameters())[0, 0] += 1e-3

    def save(step: int) -> None:
        if step != STATE_AT:
            return
        sabotage()
        seen.update({f"state/{name}": tensor for name, tensor in weights_of(loop.model).items()})
        states.update(moments(loop.optimizer))
        loop.save(state)

    with loop.protect(config) as guard:
        loop.run(at_step=save)
    manifest = guard.save(root / "final")
    first = digest_weights(loop.model)

    # Back into the marked phase, in the same processes.
    resumed_at = loop.resume(state)
    loop.run()
    guard.finish()
    result = {
        "world": distributed.get_world_size(),
        "state": manifest.state,
        "resumed_at": resumed_at,
        "first": first,
        "second": digest_weights(loop.model),
    }
    if rank == 0:
        seen.update({f"final/{name}": tensor for name, tensor in weights_of(loop.model).items()})
        result["exposed"] = [str(path) for path in PlaintextFinder(seen).scan([root])]
        result["exposed"] += [str(path) for path in files_holding(root, excerpts(states))]
    (root / f"rank-{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
