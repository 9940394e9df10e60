"""Download files of a Hub repo with the Hub's own client, which checks them, resumes, and knows xet."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm

from hf_wmguard.delivery.fetching import check_room
from hf_wmguard.stores.hub_errors import hub_errors
from hf_wmguard.stores.store import Store

_CACHE = ".cache"
# Where files lie as they lie in the repo, until they are moved: no file that is fetched has such a name.
_WHOLE = ".wmguard-hub"


def download(
    store: Store, names: Collection[str], folder: Path, progress: Callable[[str, int], None] | None = None
) -> None:
    """Bring files of a repo into a folder; what is there already, or in part, is not fetched again.

    Args:
        store: A `HubStore`.
        names: Relative to its location.
        folder: Gets them under these names.
        progress: Called with a file's name and the bytes just fetched.
    Raises:
        NotFoundError, StoreError: As `hub_errors`.
        EnvironmentFault: They do not fit on the disk.
        OSError: The disk became full.
    """
    location = store.location
    root = folder / _WHOLE if location.path else folder
    missing = [name for name in names if not (root / location.key(name)).is_file()]
    # Less what has arrived in part, and lies in the client's own folder.
    partial = sum(path.stat().st_size for path in (root / _CACHE).rglob("*.incomplete"))
    check_room(folder, sum(store.files()[name].size_bytes for name in missing) - partial)
    with hub_errors(str(location)):
        snapshot_download(
            location.root,
            revision=location.revision,
            local_dir=root,
            # Names are patterns to the client.
            allow_patterns=[glob.escape(location.key(name)) for name in names],
            tqdm_class=_reporting(str(location), progress),
        )
    if location.path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (root / location.path / name).replace(folder / name)
        shutil.rmtree(root)
    shutil.rmtree(folder / _CACHE, ignore_errors=True)


def _reporting(where: str, progress: Callable[[str, int], None] | None) -> type[tqdm]:
    """Return a progress bar that shows nothing, and says what has come in."""

    class Reporting(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The client has another bar, which counts files.
            self._of_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if self._of_bytes and n and progress is not None:
                progress(where, int(n))
            return None

    return Reporting
