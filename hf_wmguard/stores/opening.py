"""Open the store that an address belongs to."""

from __future__ import annotations

from importlib import import_module

from hf_wmguard.stores.location import Location
from hf_wmguard.stores.store import Store

# By scheme: module and class. Each is imported where it is used, and its client with it.
_STORES = {"hub": ("hub", "HubStore"), "s3": ("s3", "S3Store")}


def open_store(location: Location) -> Store:
    """Return one version of a folder that is kept elsewhere, ready to be read.

    Raises:
        NotFoundError: No such repo, revision, bucket, or nothing is there.
        StoreError: The store refuses, or does not answer.
        MissingDependencyError: The client of this store is not installed.
    """
    module, name = _STORES[location.scheme]
    opened: Store = getattr(import_module(f"hf_wmguard.stores.{module}"), name)(location)
    return opened
