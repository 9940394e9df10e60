"""The order in which a loop calls its guard, and whether the gradient that a guard added is still there."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from hf_wmguard.errors import UsageError

# Where a loop is within one optimizer step: before it, while gradients come together, right before optimizer.step().
Stage = Literal["between", "gathering", "stepping"]


class StepOrder:
    """Follows the calls around the optimizer's steps, and says which one is missing."""

    def __init__(self) -> None:
        self._stage: Stage = "between"
        self._added: AddedGradient | None = None

    def begin(self) -> bool:
        """Note the call before a forward; return whether it is the first one of an optimizer step.

        Raises:
            UsageError: The step before has not been ended.
        """
        if self._stage == "stepping":
            raise disorder("before_accumulation", "after_step is missing", "call after_step after optimizer.step()")
        first = self._stage == "between"
        self._stage = "gathering"
        return first

    def watch(self, model: nn.Module) -> None:
        """Note that gradients were just added, which the coming backward must add to."""
        self._added = AddedGradient(model)

    def complete(self) -> None:
        """Note that gradients are complete.

        Raises:
            UsageError: A call is missing, or what was added has been set to zero.
        """
        if self._stage != "gathering":
            raise self._missing("after_backward", "before_accumulation" if self._stage == "between" else "after_step")
        if self._added is not None and self._added.is_lost():
            raise disorder(
                "after_backward",
                "gradients were set to zero since before_accumulation, and with them the triggers'",
                "call zero_grad after after_step, or before before_accumulation",
            )
        self._added = None
        self._stage = "stepping"

    def end(self) -> None:
        """Note that the optimizer has stepped.

        Raises:
            UsageError: A call is missing.
        """
        if self._stage != "stepping":
            before = "before_accumulation" if self._stage == "between" else "after_backward"
            raise self._missing("after_step", before)
        self._stage = "between"

    def check_save(self) -> None:
        """Refuse a save of weights that the optimizer has changed, and the mark has not followed.

        Raises:
            UsageError: After ``after_backward`` and before ``after_step``.
        """
        if self._stage == "stepping":
            raise disorder("save", "after_step is missing", "save after after_step, or before before_accumulation")

    def reset(self) -> None:
        """Forget the step that has begun."""
        self._stage, self._added = "between", None

    @staticmethod
    def _missing(call: str, missing: str) -> UsageError:
        return disorder(call, f"{missing} is missing", "call the three once each per optimizer step, in this order")


def disorder(call: str, what: str, hint: str) -> UsageError:
    """Return the error of a call that came out of order."""
    return UsageError(f"guard.{call}() came out of order: {what}", hint=hint)


class AddedGradient:
    """Watches one parameter's gradient from where it was added to the end of the backwards that must add to it.

    Whatever sets gradients to zero in the usual way takes the tensor off the parameter. With
    ``gradient_as_bucket_view`` DDP puts a view with the same values in its place, in its forward or after its backward.
    A look at the beginning of each backward sees a view then, and nothing where gradients were set to zero.

    Args:
        model: The model, whose gradients were just added.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameter = next((one for one in model.parameters() if one.grad is not None), None)
        self._gradient = self._parameter.grad if self._parameter is not None else None
        self._reached = self._lost = False
        # Of a leaf: called before its gradient is added to.
        parameter: Any = self._parameter
        self._handle = parameter.register_hook(self._look) if parameter is not None else None

    def is_lost(self) -> bool:
        """Return whether it was set to zero; the watch ends."""
        if self._parameter is None or self._handle is None:
            return False
        self._handle.remove()
        if self._reached:
            return self._lost or self._parameter.grad is None
        # FSDP2 adds to its parts without asking the parameter.
        return self._parameter.grad is not self._gradient

    def _look(self, gradient: Tensor) -> None:
        if self._parameter is not None:
            own = self._parameter.grad
            self._lost |= own is None or not (self._reached or own is self._gradient or own._is_view())
            self._reached = True
