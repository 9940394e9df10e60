"""Read named weight tiles out of a suspect, whatever it is stored in.

A suspect is somebody else's file: nothing in it is executed (pickles are read with ``weights_only``), and
nothing but the tiles that are asked for is brought into memory, where the format allows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hf_wmguard.container.files import inspect_file, is_protected
from hf_wmguard.container.format import PUBLIC_HEADER
from hf_wmguard.container.plain import FileTensor, PlainFile
from hf_wmguard.container.recipients import Identity
from hf_wmguard.container.source import LocalFile
from hf_wmguard.errors import AuthenticationError, FormatError, UnsupportedError
from hf_wmguard.stores.remote import RemoteFile
from hf_wmguard.suspects.adapter import Adapter, is_adapter
from hf_wmguard.suspects.files import GGUF_SUFFIX, digest, weight_files
from hf_wmguard.suspects.gguf import Gguf
from hf_wmguard.suspects.locate import Layout
from hf_wmguard.suspects.pickles import load_pickle
from hf_wmguard.suspects.protected import open_folder
from hf_wmguard.suspects.quantized import dequantized
from hf_wmguard.suspects.remote import RemoteFolder
from hf_wmguard.suspects.sources import (
    REMOTE_READERS,
    Encrypted,
    InMemory,
    Ranges,
    Safetensors,
    Suspect,
    read_bounded,
)
from hf_wmguard.watermark.carriers import Carrier

__all__ = ["Encrypted", "Suspect", "digest", "open_suspect", "tile_reader", "weight_files"]

_MAX_CONFIG_BYTES = 4 << 20
_ONE_FILE = "give one of the files, not their folder"


@contextmanager
def open_suspect(
    source: str | Path | RemoteFolder | Mapping[str, Tensor] | nn.Module, *, identities: tuple[Identity, ...] = ()
) -> Iterator[Suspect]:
    """Open a suspect for reading.

    Args:
        source: A folder, plain or protected, of a model or a LoRA adapter; a ``.safetensors``, ``.gguf``, ``.bin``,
            ``.pt`` or ``.pth`` file; a folder that `open_remote` opened; a state dict or a model.
        identities: What can open a protected folder.
    Raises:
        NotFoundError: No such file, or a folder without weights.
        FormatError: The file cannot be read, or is a pickle that would run code.
        UnsupportedError: An adapter of a kind that cannot be judged without its base model.
        MissingDependencyError: A GGUF file without the package that dequantizes it.
        AuthenticationError: A protected folder that no identity opens.
    """
    if isinstance(source, nn.Module):
        if getattr(source, "peft_config", None):
            raise UnsupportedError(
                f"{type(source).__name__} holds adapters beside the weights they change",
                hint="save it and judge the folder, or judge a merged copy",
            )
        to_dict = getattr(getattr(source, "config", None), "to_dict", dict)
        yield dequantized(InMemory(source.state_dict(), to_dict()), {})
        return
    if isinstance(source, Mapping):
        bad = [name for name, one in source.items() if not isinstance(name, str) or not _is_readable(one)]
        if bad:
            raise FormatError(f"{bad[0]!r} is no dense tensor in memory", hint="give a plain state dict")
        yield dequantized(InMemory(source), {})
        return
    with ExitStack() as stack:
        if isinstance(source, RemoteFolder):
            yield _open_remote(source, identities, stack)
        else:
            yield _open_path(Path(source), identities, stack)


def _is_readable(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided


def _open_path(path: Path, identities: tuple[Identity, ...], stack: ExitStack) -> Suspect:
    files = weight_files(path)
    folder = files[0].parent
    if files[0].suffix == GGUF_SUFFIX:
        return Gguf([stack.enter_context(LocalFile(file)) for file in files])
    stored, metadata = _open_files(path, files, _read_config(folder), identities, stack)
    return _meaning(stored, metadata, [file.name for file in files], folder)


def _open_remote(remote: RemoteFolder, identities: tuple[Identity, ...], stack: ExitStack) -> Suspect:
    names, config = remote.weight_names(), _read_config(remote.folder)
    files = [remote.weights[name] for name in names]
    with ThreadPoolExecutor(REMOTE_READERS) as pool:
        for _ in pool.map(RemoteFile.fetch_head, files):
            pass
    suffix = Path(names[0]).suffix
    if suffix == GGUF_SUFFIX:
        found = Gguf(files)
        found.concurrency = REMOTE_READERS
        return found
    if suffix != ".safetensors":
        raise UnsupportedError(
            f"{remote.location}: {names[0]} is a pickle, of which no part can be read alone",
            hint="download it where that is safe (hf download), and judge the folder",
        )
    if any(is_protected(file) for file in files):
        opened = stack.enter_context(open_folder(remote.folder, identities, remote=remote.weights))
        parts = {name: file for file in opened.files for name in file.names()}
        return Encrypted(parts, config, concurrency=REMOTE_READERS)
    plain = [PlainFile(file) for file in files]
    tensors: dict[str, FileTensor] = {}
    for one in plain:
        if twice := tensors.keys() & one.tensors.keys():
            raise FormatError(f"{one.name} holds {min(twice)!r}, as another file does", hint=_ONE_FILE)
        tensors |= one.tensors
    metadata = {key: value for one in plain for key, value in one.metadata.items()}
    stored = Ranges(tensors, config)
    return _meaning(stored, metadata, names, remote.folder)


def _meaning(stored: Suspect, metadata: Mapping[str, str], names: Sequence[str], folder: Path) -> Suspect:
    """Return stored tensors as what they stand for: the changes of an adapter, or the weights of a model."""
    return Adapter(stored, folder) if is_adapter(stored, names, folder) else dequantized(stored, metadata)


def _open_files(
    path: Path, files: tuple[Path, ...], config: Mapping[str, Any], identities: tuple[Identity, ...], stack: ExitStack
) -> tuple[Suspect, Mapping[str, str]]:
    """Return the tensors as they are stored, and the metadata of safetensors files."""
    if any(file.suffix == ".safetensors" and is_protected(file) for file in files):
        if not path.is_dir():
            raise AuthenticationError(
                f"{path} is one file of a protected folder",
                hint="give the folder, which holds the manifest and the recipients",
            )
        opened = stack.enter_context(open_folder(path, identities))
        return Encrypted({name: file for file in opened.files for name in file.names()}, config), {}
    if all(file.suffix == ".safetensors" for file in files):
        return _open_safetensors(files, config, stack)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in load_pickle(file).items():
            if name in tensors:
                raise FormatError(f"{file} holds {name!r}, as another file does", hint=_ONE_FILE)
            tensors[name] = tensor
    return InMemory(tensors, config), {}


def _open_safetensors(
    files: tuple[Path, ...], config: Mapping[str, Any], stack: ExitStack
) -> tuple[Suspect, Mapping[str, str]]:
    handles: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    ours: list[Path] = []
    for file in files:
        handle = stack.enter_context(_map_safetensors(file))
        own = handle.metadata() or {}
        metadata |= own
        ours += [file] if PUBLIC_HEADER in own else []
        for name in handle.keys():  # noqa: SIM118
            if name in handles:
                raise FormatError(f"{file} holds {name!r}, as another file does", hint=_ONE_FILE)
            handles[name] = handle
    sizes = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in handles.items()}
    # Blobs under our own header: ciphertext that was damaged. A stranger's file that only claims to be ours has
    # matrices, and is judged by them.
    if all(len(shape) < 2 for shape in sizes.values()):
        for file in ours:
            inspect_file(file)
    return Safetensors(handles, sizes, config), metadata


def _map_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} is not a readable safetensors file: {error}", hint="the file is damaged or cut short"
        ) from None


def _read_config(folder: Path) -> Mapping[str, Any]:
    """Return the suspect's ``config.json``; nothing where there is none that can be read, for it is needed rarely."""
    path = folder / "config.json"
    try:
        value = json.loads(read_bounded(path, _MAX_CONFIG_BYTES)) if path.is_file() else {}
    except (OSError, ValueError, RecursionError, FormatError):
        value = {}
    return value if isinstance(value, dict) else {}


def tile_reader(suspect: Suspect) -> Callable[[Carrier], Tensor | None]:
    """Return a function that reads a carrier's tile out of a suspect, or None where the suspect has no such matrix.

    A tile is floating-point [rows, columns]; of an adapter it is the change of the weights.
    """
    layout = Layout(suspect)

    def tile_of(carrier: Carrier) -> Tensor | None:
        location = layout.locate(carrier.name, carrier.shape)
        if location is None:
            return None
        tile = location.read(suspect, carrier.row_start, carrier.rows)
        return tile if tile.is_floating_point() else None

    return tile_of
