"""The processes that train one model together: what one of them decides, and failures that all of them must hear of.

A rank that fails alone leaves the others waiting in a collective until a timeout, or lets them train on towards a save
that will never be whole. So whatever one rank does for all ends with a word to the others.

Keys are never sent: every rank reads the owner key itself, and they only compare its name. What goes over the wire (the
private record, shares of projections) goes to processes that hold the key anyway, over the group's own connections.
"""

from __future__ import annotations

import logging
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, distributed

from hf_wmguard.errors import EnvironmentFault, UsageError

_logger = logging.getLogger(__name__)
T = TypeVar("T")
_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The processes of one run, seen from one of them.

    Args:
        rank: Which one this is, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Self:
        """Return those of the default process group; this process alone where there is none."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(rank=distributed.get_rank(), size=distributed.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run a block on every rank, and end it on all of them alike: a failure on one is an error on each.

        Nobody leaves before all have come, so it is a barrier as well.

        Args:
            what: What the block does, for the message.
        Raises:
            EnvironmentFault: It failed on another rank; here, nothing went wrong.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        finally:
            error = sys.exc_info()[1]
            # From `finally` and not `except`: an interrupt is told to the others as well, and goes on as what it is.
            failed = [one for one in self.gather(None if error is None else _summary(error)) if one is not None]
            if error is None and failed:
                raise EnvironmentFault(
                    f"{what} failed on another process: {failed[0]}", hint="see the error of that process"
                )

    def from_main(self, what: str, action: Callable[[], T]) -> T:
        """Return what ``action`` gives on the main rank, on every rank; it runs there alone.

        Raises:
            EnvironmentFault: It failed there.
        """
        result: Any = None
        with self.together(what):
            if self.is_main:
                result = action()
        return result if self.size == 1 else _from_first(result)  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in order of ranks."""
        if self.size == 1:
            return [value]
        return _from_all(value, self.size)

    def check_same(self, what: str, value: str, *, hint: str) -> None:
        """Check that a value is the same on every rank.

        Raises:
            UsageError: It is not; on all ranks.
        """
        values = self.gather(value)
        if len(set(values)) > 1:
            raise UsageError(
                f"{what} differs between processes: {', '.join(f'{i}: {one}' for i, one in enumerate(values))}",
                hint=hint,
            )

    def mean_(self, values: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the ranks, in place; afterwards they are the same bits everywhere."""
        if self.size == 1:
            return
        for one in values:
            distributed.all_reduce(one)
            one.div_(self.size)


def _from_all(value: T, size: int) -> list[T]:
    """Return every rank's value: `torch.distributed.all_gather_object`, after which a process may end at once."""
    own = _pickled(value)
    lengths = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(size)]
    length = torch.tensor([len(own)], device=own.device)
    _run(partial(distributed.all_gather, lengths, length), [*lengths, length])
    longest = max(int(one) for one in lengths)
    padded = torch.nn.functional.pad(own, (0, longest - len(own)))
    found = [torch.empty_like(padded) for _ in range(size)]
    _run(partial(distributed.all_gather, found, padded), [*found, padded])
    return [_unpickled(one[: int(length)]) for one, length in zip(found, lengths, strict=True)]


def _from_first(value: Any) -> Any:
    """Return the first rank's value, on every rank; as `_from_all`."""
    own = _pickled(value)
    length = torch.tensor([len(own)], device=own.device)
    _run(partial(distributed.broadcast, length, 0), [length])
    sent = own if distributed.get_rank() == 0 else torch.empty(int(length), dtype=torch.uint8, device=own.device)
    _run(partial(distributed.broadcast, sent, 0), [sent])
    return _unpickled(sent)


def _pickled(value: Any) -> Tensor:
    # Also "cuda:nccl"; of "cpu:gloo,cuda:nccl" the first is meant.
    backend = distributed.get_backend()
    on_gpu = "nccl" in backend and "gloo" not in backend
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)


def _unpickled(data: Tensor) -> Any:
    # From the processes of this run, which hold the same keys and run the same code; torch's own functions do the same.
    return pickle.loads(data.cpu().numpy().tobytes())  # noqa: S301


def _run(collective: Callable[[], Any], tensors: Sequence[Tensor]) -> None:
    """Run a collective, and go on when its tensors are the caller's alone.

    gloo's own threads let go of them when it is done already, and need the interpreter's lock for that (torch 2.13):
    who frees the process group at once, as at the end of a script, holds the lock and waits for the thread, for ever.
    A tensor that a thread of torch's holds has one reference more to its Python object, for which one can wait.
    """
    before, deadline = _references(tensors), time.monotonic() + _PATIENCE_S
    collective()
    if "gloo" in distributed.get_backend():
        # Releases of torch before that reference let go in the same way: this gives them time, if no certainty.
        distributed.barrier()
    while _references(tensors) > before:
        if time.monotonic() > deadline:
            _logger.warning("torch holds what was exchanged for more than %d s", _PATIENCE_S)
            return
        # Gives the lock away.
        time.sleep(0.001)


def _references(tensors: Sequence[Tensor]) -> int:
    return sum(sys.getrefcount(one) for one in tensors)


def _summary(error: BaseException) -> str:
    # Not the error itself: it may hold what does not pickle. The message of ours names no key and no weights.
    text = getattr(error, "message", None) or str(error)
    return f"{type(error).__name__}: {text}"


@torch.no_grad()
def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Return two sums of the bits of each tensor, int64 [n, 2], on the first one's device.

    Made to find ranks that have drifted apart, at the speed of memory and without a copy of the weights: it is no
    hash, and nobody is kept from making two tensors that agree.
    """
    sums = []
    for tensor in tensors:
        bits = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim else 1).contiguous()
        rows = bits.view(_INTEGERS[bits.element_size()]).sum(dim=-1, dtype=torch.int64)
        places = torch.arange(1, len(rows) + 1, device=rows.device)
        sums.append(torch.stack([rows.sum(), (rows * places).sum()]))
    return torch.stack(sums)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_equal(ranks: Ranks, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Check that tensors that every rank has a copy of are the same, to the last bit.

    Args:
        ranks: The processes.
        names: Of the tensors.
        tensors: Any dtype, all on one device.
    Raises:
        EnvironmentFault: A rank's copy has drifted; on all ranks.
    """
    if ranks.size == 1 or not tensors:
        return
    own = fingerprint(tensors)
    high, low = own.clone(), own.clone()
    _run(partial(distributed.all_reduce, high, op=distributed.ReduceOp.MAX), [high])
    _run(partial(distributed.all_reduce, low, op=distributed.ReduceOp.MIN), [low])
    apart = (high != low).any(dim=1).nonzero().flatten().tolist()
    if apart:
        raise EnvironmentFault(
            f"{len(apart)} of {len(names)} parameters differ between processes, first {names[apart[0]]}",
            hint="what changes weights must do so on every process alike (a callback, another seed, a mix of devices); "
            "resume from the last checkpoint",
        )
