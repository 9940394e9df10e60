"""What of a protected folder leaves this machine: a list of what may, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from hf_wmguard.container.disguise import BEGIN_BYTES, begins_like
from hf_wmguard.container.files import is_protected
from hf_wmguard.errors import ManifestError, NotFoundError
from hf_wmguard.evidence.manifest import (
    ENVELOPE_NAME,
    MANIFEST_NAME,
    RECIPIENTS_NAME,
    WEIGHT_SUFFIXES,
    Manifest,
    check_files,
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
LAST = (RECIPIENTS_NAME, ENVELOPE_NAME, MANIFEST_NAME)
"""What is shown last, the manifest after everything that it lists."""
# The only ones of these that are no text.
_BINARY = (".model", ".png")
Progress = Callable[[str, int], None]
Stamp = tuple[int, int, int, int]


def stamp(file: Path | int) -> Stamp:
    """Return what changes when a file is replaced or written to: device, inode, size and time of the last change.

    The time at which the inode changed is not in it: that of a file with several names changes when one of them goes.

    Args:
        file: Its path, or a descriptor of it.
    """
    found = file.stat() if isinstance(file, Path) else os.fstat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


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
        stamps: What `stamp` said of each signed file before it was hashed: one that says the same when it is sent need
            not be hashed again.
    """

    folder: Path
    manifest: Manifest
    signer: str
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

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
            as plaintext), or would be sent under another name and begins like one.
    """
    _check_protected(folder)
    manifest, signer = read_manifest(folder)
    stamps = {entry.name: stamp(folder / entry.name) for entry in manifest.files if (folder / entry.name).is_file()}
    check_files(folder, manifest, progress=progress)
    for entry in manifest.files:
        # The signature says whose file it is, not that it is ciphertext.
        if Path(entry.name).suffix.lower() in WEIGHT_SUFFIXES and not is_protected(folder / entry.name):
            raise ManifestError(
                f"{entry.name} in {folder} is a plaintext weight file: nothing was sent",
                hint="protect the folder with wmguard protect, and push that",
            )
    if not (folder / RECIPIENTS_NAME).is_file():
        raise NotFoundError(f"{folder} lacks {RECIPIENTS_NAME}", hint="fetch the whole protected folder")
    found = contents(folder, manifest)
    for name in (*found.signed, *found.plain):
        _check_harmless(folder, name)
    return Parcel(
        folder=folder,
        manifest=manifest,
        signer=signer,
        names=(*found.signed, *found.plain, *LAST),
        left_out=found.left_out,
        stamps=stamps,
    )


def _check_protected(folder: Path) -> None:
    """Say so where a folder was never protected, by the name of what would have left it.

    Raises:
        NotFoundError: There is no such folder.
        ManifestError: It holds weights, and neither manifest nor envelope.
    """
    if not folder.is_dir():
        raise NotFoundError(f"no folder {folder}", hint="give a folder that wmguard protect or a guarded save wrote")
    if any((folder / name).exists() for name in (MANIFEST_NAME, ENVELOPE_NAME)):
        return
    weights = next((name for name in _visible(folder) if Path(name).suffix.lower() in WEIGHT_SUFFIXES), None)
    if weights is not None:
        raise ManifestError(
            f"{folder} is not protected, and {weights} in it is perhaps plaintext: nothing was sent",
            hint="protect the folder with wmguard protect, and push that",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What lies in a protected folder, manifest, envelope and recipients apart; names relative to it, with slashes."""

    signed: tuple[str, ...]
    plain: tuple[str, ...]
    left_out: tuple[str, ...]


def contents(folder: Path, manifest: Manifest) -> Contents:
    """Return what of a protected folder is signed, what else may leave, and what stays. No file is read."""
    listed = {entry.name for entry in manifest.files}
    signed, plain, left_out = [], [], []
    for name in _visible(folder):
        if name in listed:
            signed.append(name)
        elif name in LAST:
            continue
        elif may_be_plain(name):
            plain.append(name)
        else:
            left_out.append(name)
    return Contents(signed=tuple(signed), plain=tuple(plain), left_out=tuple(left_out))


def may_be_plain(name: str) -> bool:
    """Return whether a file that nobody signs belongs to a protected folder by its name."""
    # A star stands for no slash: what lies in other folders is somebody else's.
    return any(name.count("/") == one.count("/") and fnmatchcase(name, one) for one in PLAIN_NAMES)


def _check_harmless(folder: Path, name: str) -> None:
    """Check that a file is not plaintext weights under another name.

    Raises:
        ManifestError: It is.
        NotFoundError: It cannot be read.
    """
    path = folder / name
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        # Judged by its header already.
        return
    try:
        with path.open("rb") as file:
            begin = file.read(BEGIN_BYTES)
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from None
    what = begins_like(begin)
    if what is None and b"\0" in begin and may_be_plain(name) and path.suffix not in _BINARY:
        what = "no text"
    if what is not None and not is_protected(path):
        raise ManifestError(
            f"{name} in {folder} begins like {what}, which its name is not for: nothing was sent",
            hint="if it holds weights, protect the folder it came from; otherwise move it away",
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
