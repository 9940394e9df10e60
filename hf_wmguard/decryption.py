"""Write a protected folder's plaintext: file to file, a few megabytes at a time, and not interpreted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hf_wmguard.atomic import write_atomic
from hf_wmguard.container.files import ProtectedFile
from hf_wmguard.container.plain import write_plain
from hf_wmguard.container.recipients import load_identity
from hf_wmguard.container.shards import INDEX_SUFFIX, encode_index
from hf_wmguard.evidence.manifest import ENVELOPE_NAME, MANIFEST_NAME, RECIPIENTS_NAME
from hf_wmguard.evidence.signing import load_signer
from hf_wmguard.folders import check_new_folder, new_folder
from hf_wmguard.suspects.protected import OPTIMIZER_NAME, open_folder, restore_config

Progress = Callable[[str, int], None]
STAGING_PREFIX = ".wmguard-decrypt-"
_OURS = {MANIFEST_NAME, ENVELOPE_NAME, RECIPIENTS_NAME, OPTIMIZER_NAME}
# What says what the weights mean, or is run: only as it was signed.
_ONLY_SIGNED = {"config.json", "adapter_config.json", "generation_config.json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decrypted:
    """What `decrypt_folder` wrote.

    Args:
        files: The plaintext weight files.
        unsigned: Copied files that the manifest does not cover: what a Trainer puts beside a save, such as the
            tokenizer. Anybody who could write into the folder can have changed them.
        left_out: Files and folders that the manifest does not cover and that were not copied: code, configs, anything
            in a subfolder, hidden files.
    """

    files: tuple[Path, ...]
    unsigned: tuple[str, ...]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as ``--json`` prints it."""
        return {
            "files": [file.name for file in self.files],
            "unsigned": list(self.unsigned),
            "left_out": list(self.left_out),
        }


def decrypt_folder(
    path: Path, out: Path, *, identity: str, signer: str | None = None, progress: Progress | None = None
) -> Decrypted:
    """Write a protected folder's plaintext into a new folder, because somebody asked for exactly that.

    Args:
        path: The protected folder.
        out: A folder that does not exist yet, or is empty; nobody else may read it.
        identity: Reference to a private key that opens it.
        signer: As for `load_protected`.
        progress: Called with a file's name and the plaintext bytes just written.
    Raises:
        UsageError: The output folder holds something, or lies inside the input.
        NotFoundError, ManifestError, AuthenticationError, FormatError: As `open_folder`.
        EnvironmentFault: The plaintext cannot be written.
    """
    check_new_folder(path, out)
    pinned = load_signer(signer) if signer else None
    with (
        open_folder(path, (load_identity(identity),), signer=pinned) as opened,
        new_folder(out, STAGING_PREFIX, mode=0o700) as staging,
    ):
        weights = {file.name for file in opened.files}
        covered = {entry.name for entry in opened.manifest.files} - weights
        unsigned, left_out = _sort_out(path, covered, _not_copied(path) | weights)
        for name in (*covered, *unsigned):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / name, staging / name)
        for file in opened.files:
            write_plain(staging / file.name, file, progress=progress)
        _write_index(staging, opened.files)
        restore_config(staging / "config.json")
    return Decrypted(
        files=tuple(sorted(out / name for name in weights)), unsigned=tuple(unsigned), left_out=tuple(left_out)
    )


def _not_copied(path: Path) -> set[str]:
    # A note without the state that it is about, which only the owner opens.
    return _OURS | ({"optimizer.pt"} if (path / OPTIMIZER_NAME).is_file() else set())


def _sort_out(path: Path, covered: set[str], known: set[str]) -> tuple[list[str], list[str]]:
    """Return which of the files that the manifest does not cover are copied, and which are not."""
    unsigned, left_out = [], []
    for name in _uncovered(path, covered | known):
        plain = "/" not in name and not name.startswith(".") and (path / name).is_file()
        if plain and name not in _ONLY_SIGNED and not name.endswith((".py", INDEX_SUFFIX)):
            unsigned.append(name)
        else:
            left_out.append(name)
    return unsigned, left_out


def _uncovered(path: Path, covered: set[str]) -> Iterator[str]:
    """Yield the files that are not covered, and with a slash at the end the folders in which nothing is."""
    for root, folders, names in os.walk(path, onerror=_raise):
        here = Path(root).relative_to(path)
        for name in sorted(folders):
            folder = f"{(here / name).as_posix()}/"
            if not any(one.startswith(folder) for one in covered):
                yield folder
                folders.remove(name)
        yield from sorted(one for name in names if (one := (here / name).as_posix()) not in covered)


def _raise(error: OSError) -> NoReturn:
    raise error


def _write_index(staging: Path, files: tuple[ProtectedFile, ...]) -> None:
    """Write the index of several files where none was signed, because it would have shown hidden names."""
    if len(files) < 2:
        return
    sizes = {file.name: {name: file.info(name).size_bytes for name in file.names()} for file in files}
    name, data = encode_index(sizes)
    if not (staging / name).exists():
        write_atomic(staging / name, data)
