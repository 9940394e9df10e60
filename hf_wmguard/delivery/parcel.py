"""What of a protected folder leaves this machine: a list of what may, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from hf_wmguard.container.files import is_protected
from hf_wmguard.errors import ManifestError
from hf_wmguard.evidence.manifest import (
    ENVELOPE_NAME,
    MANIFEST_NAME,
    RECIPIENTS_NAME,
    WEIGHT_SUFFIXES,
    Manifest,
    check_files,
    is_trainer_state,
    read_manifest,
)

CARD_NAME = "README.md"
FIGURES = "wmguard_*.png"
PLAIN_NAMES = (
    "tokenizer*.json",
    "tokenizer.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    CARD_NAME,
    FIGURES,
)
"""What a tokenizer, a processor or a chat template is saved as. Beside these only what the manifest lists is sent."""
_LAST = (RECIPIENTS_NAME, ENVELOPE_NAME, MANIFEST_NAME)
Progress = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """The files of one protected folder that are sent, checked.

    Args:
        folder: Where they are.
        manifest: What the envelope signs.
        signer: Id of the key that signed it.
        names: Relative to the folder, with slashes, in the order in which a store must show them: whoever sees the
            manifest, which is the last, finds everything that it lists.
        left_out: What lies in the folder too and is not sent.
    """

    folder: Path
    manifest: Manifest
    signer: str
    names: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum((self.folder / name).stat().st_size for name in self.names)


def pack(folder: Path, *, progress: Progress | None = None) -> Parcel:
    """Return what of a protected folder is sent, after every signed file was checked byte by byte.

    Args:
        folder: The protected folder.
        progress: Called with a file's name and the bytes just hashed.
    Raises:
        NotFoundError: The folder is not protected, or a part of it is missing.
        ManifestError: A file is not the one that was signed, or is a weight file that the manifest does not list (such
            as plaintext), whatever it is called.
    """
    manifest, signer = read_manifest(folder)
    check_files(folder, manifest, progress=progress)
    for entry in manifest.files:
        # The signature says whose file it is, not that it is ciphertext.
        if Path(entry.name).suffix.lower() in WEIGHT_SUFFIXES and not is_protected(folder / entry.name):
            raise ManifestError(
                f"{entry.name} in {folder} is a plaintext weight file: nothing was sent",
                hint="protect the folder with wmguard protect, and push that",
            )
    signed = {entry.name for entry in manifest.files}
    first, plain, left_out = [], [], []
    for name in _visible(folder):
        if name in signed:
            first.append(name)
        elif name in _LAST:
            continue
        elif not is_trainer_state(name) and any(fnmatchcase(name, pattern) for pattern in PLAIN_NAMES):
            plain.append(name)
        else:
            left_out.append(name)
    return Parcel(
        folder=folder,
        manifest=manifest,
        signer=signer,
        names=(*first, *plain, *_LAST),
        left_out=tuple(left_out),
    )


def _visible(folder: Path) -> list[str]:
    found = []
    # Links to folders are not followed: what is behind them is not part of this one.
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(root)
        found += [
            (here / name).relative_to(folder).as_posix()
            for name in sorted(names)
            if not name.startswith(".") and (here / name).is_file()
        ]
    return found
