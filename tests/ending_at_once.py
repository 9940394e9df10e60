"""Processes that end their group, and free what was on it, right after they have told each other something.

Called with a folder, where the processes find each other, and how often; torch's own all_gather_object hangs here.
"""

from __future__ import annotations

import os
import sys
import time

import torch
from torch import distributed, nn

from hf_wmguard.training.ranks import Ranks, check_equal


def once(folder: str, turn: int) -> None:
    """Make a group, tell each other something, and end it."""
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{turn}", rank=rank, world_size=2)
    # The last to hold the group, whose end waits for gloo's threads.
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 3))
    # What DDP itself exchanges as it begins is over.
    time.sleep(0.02)
    ranks = Ranks.current()
    if turn % 2:
        assert ranks.gather({"turn": turn, "rank": rank}) == [{"turn": turn, "rank": one} for one in (0, 1)]
        check_equal(ranks, ["weight"], [model.module.weight])
    else:
        said = "x" * turn * (1 + 1000 * rank)
        assert [len(one) for one in ranks.gather(said)] == [turn, turn * 1001]
        assert ranks.from_main("saying", lambda: torch.arange(turn).tolist()) == list(range(turn))
    distributed.destroy_process_group()


if __name__ == "__main__":
    for number in range(int(sys.argv[2])):
        once(sys.argv[1], number)
