"""Let accelerate split models on CPUs with its own code, which by itself it does on GPUs only."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType


def pass_for_gpus() -> None:
    """Make processes on CPUs what those on GPUs are to accelerate: of them alone it asks whether to use FSDP."""
    plain_init = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init
