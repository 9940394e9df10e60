"""A frozen copy of what leaves a folder, so that the next save cannot get into a push that is still under way.

Ciphertext is not copied but gets a second name: a save replaces such files and never writes into them. What others
write in place, such as a tokenizer, is small and is copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hf_wmguard.delivery.parcel import LAST, contents
from hf_wmguard.errors import EnvironmentFault
from hf_wmguard.evidence.manifest import STAGING_PREFIX, check_sizes, read_manifest
from hf_wmguard.folders import staging_folder

_PREFIX = f"{STAGING_PREFIX}push-"
_REPLACED = (".safetensors", ".wmguard")


@contextmanager
def snapshot(folder: Path, beside: Path, *, more: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a folder with what leaves a protected folder, gone at the end of the block.

    Args:
        folder: The protected folder.
        beside: An existing folder of the same file system, in which the hidden copy is made.
        more: Names of other files in it that are wanted, where they exist.
    Raises:
        NotFoundError: The folder is not protected.
        ManifestError: A weight file in it is not in the manifest, such as plaintext.
        EnvironmentFault: The copy cannot be made.
    """
    manifest, _ = read_manifest(folder)
    # Of the folder itself: the copy has only what may leave, and would never show a plaintext file.
    check_sizes(folder, manifest)
    found = contents(folder, manifest)
    names = [*found.signed, *found.plain, *LAST, *(name for name in more if (folder / name).is_file())]
    with staging_folder(beside, _PREFIX) as copy:
        try:
            for name in names:
                _take(folder / name, copy / name)
        except OSError as error:
            raise EnvironmentFault(
                f"cannot copy {folder} for a push: {error.strerror or error}", hint="check free space and permissions"
            ) from error
        yield copy


def _take(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in _REPLACED:
        try:
            os.link(source, target)
            return
        except OSError:
            # A file system without second names.
            pass
    shutil.copyfile(source, target)
