"""Ask a place whether a push would be let in, before the hours of work whose result is to be pushed."""

from __future__ import annotations

from importlib import import_module

from hf_wmguard.stores.location import Location

# By scheme: module and function.
_CHECKS = {"hub": ("hub", "check_hub"), "s3": ("s3_exposure", "check_s3")}


def check_place(location: Location, *, allow_public: bool = False) -> None:
    """Check that a place is reached, is not public, and may be written to. Nothing that readers see is changed.

    Args:
        location: Where a push is to go. A Hub repo that does not exist is made, private; a bucket is not.
        allow_public: Whether it may be open to everybody.
    Raises:
        StoreError, NotFoundError: It cannot be reached, or may not be written to.
        ExposureError: It is public.
        MissingDependencyError: The client of this store is not installed.
    """
    module, name = _CHECKS[location.scheme]
    getattr(import_module(f"hf_wmguard.delivery.{module}"), name)(location, allow_public=allow_public)
