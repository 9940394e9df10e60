"""The model card of a protected folder: what is encrypted, what is signed, and how to open and check it.

What somebody wrote in ``README.md``, by hand or with ``Trainer.create_model_card``, stays; one section of it, between
two comments, is ours, and is written anew from the manifest each time. Everything in it shows without a key anyway.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, ModelCard

from hf_wmguard.atomic import write_atomic
from hf_wmguard.container.files import inspect_file, is_protected
from hf_wmguard.delivery.figures import draw_contents
from hf_wmguard.delivery.parcel import CARD_NAME, FIGURES, contents
from hf_wmguard.errors import FormatError, NotFoundError
from hf_wmguard.evidence.manifest import Manifest, read_manifest

FIGURE_NAME = "wmguard_contents.png"
BEGIN, END = "<!-- hf-wmguard:begin -->", "<!-- hf-wmguard:end -->"
MAX_CARD_BYTES = 4 << 20
MAX_ROWS = 12
TAGS = ("hf-wmguard", "encrypted", "watermark")
_PIPELINES = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification"),
    "ForConditionalGeneration": (None, "AutoModelForSeq2SeqLM"),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_SECTION = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n")
# What would end a code span, a table cell or the section itself.
_UNSAFE = re.compile(r"[`|<>]")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """All that the card says."""

    manifest: Manifest
    signer: str
    kinds: dict[str, tuple[str, int]]
    suites: tuple[str, ...]
    library: str
    base_model: str | None
    pipeline: str | None
    auto_class: str
    address: str | None
    figure: bool
    tags: tuple[str, ...]


def write_card(folder: Path, *, address: str | None = None, tags: Sequence[str] = ()) -> Path:
    """Write, or bring up to date, the ``README.md`` of a protected folder, with one picture; return its path.

    Without matplotlib there is no picture, and an older one is deleted: it would show another save.

    Args:
        folder: The protected folder.
        address: Where readers will find it, ``hub://org/name``; None: at a path of their own.
        tags: More tags for its metadata.
    Raises:
        NotFoundError, ManifestError: The folder is not protected, or its envelope does not hold.
        FormatError: The README that is there cannot be kept: it is too large, no text, or its metadata no YAML.
        EnvironmentFault: The card cannot be written.
    """
    manifest, signer = read_manifest(folder)
    found = contents(folder, manifest)
    names = [name for name in (*found.signed, *found.plain) if not _is_ours(name)]
    kinds = {name: _kind(folder, name, manifest) for name in names}
    encrypted = [folder / name for name, (kind, _) in kinds.items() if kind == "ciphertext"]
    picture = draw_contents(kinds, encrypted)
    if picture is None:
        (folder / FIGURE_NAME).unlink(missing_ok=True)
    else:
        write_atomic(folder / FIGURE_NAME, picture)
    config, adapter = _read_json(folder / "config.json"), _read_json(folder / "adapter_config.json")
    pipeline, auto_class = _task(config)
    facts = _Facts(
        manifest=manifest,
        signer=signer,
        kinds=kinds,
        suites=tuple(sorted({str(inspect_file(path)["suite"]) for path in encrypted})),
        library="peft" if adapter else "transformers",
        base_model=_base_model(config, adapter),
        pipeline=pipeline,
        auto_class=auto_class,
        address=address,
        figure=picture is not None,
        tags=(*([tags] if isinstance(tags, str) else tags), *TAGS),
    )
    path = folder / CARD_NAME
    write_atomic(path, _merge(_read_card(path), facts).encode())
    return path


def _is_ours(name: str) -> bool:
    return name == CARD_NAME or Path(name).match(FIGURES)


def _kind(folder: Path, name: str, manifest: Manifest) -> tuple[str, int]:
    size_bytes = (folder / name).stat().st_size
    if name.endswith(".safetensors") and is_protected(folder / name):
        return "ciphertext", size_bytes
    return ("signed" if name in {entry.name for entry in manifest.files} else "plain"), size_bytes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _task(config: dict[str, Any]) -> tuple[str | None, str]:
    """Return the pipeline tag and the Auto class of an architecture, as far as its name tells."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    for suffix, found in _PIPELINES.items():
        if first.endswith(suffix):
            return found
    return None, "AutoModel"


def _base_model(config: dict[str, Any], adapter: dict[str, Any]) -> str | None:
    """Return the Hub id of what was fine-tuned. A path is not one: it would tell how somebody's disk looks."""
    for value in (adapter.get("base_model_name_or_path"), config.get("_name_or_path")):
        if isinstance(value, str) and _HUB_ID.fullmatch(value) and not Path(value).exists():
            return value
    return None


def _read_card(path: Path) -> str:
    """Return the README that is there, or an empty text."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CARD_BYTES + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise NotFoundError(f"cannot read {path}: {error.strerror}", hint="check its permissions") from None
    if len(data) > MAX_CARD_BYTES:
        raise FormatError(f"{path} is larger than {MAX_CARD_BYTES} bytes", hint="shorten it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError(f"{path} is not UTF-8 text", hint="convert it, or delete it for a fresh card") from None


def _merge(old: str, facts: _Facts) -> str:
    if not _FRONT.match(old):
        # An empty block keeps the client from warning that there is none.
        old = f"---\n{{}}\n---\n{old}"
    try:
        card = ModelCard(old)
    except (ValueError, TypeError, yaml.YAMLError):
        raise FormatError(f"{CARD_NAME}: its metadata is not that of a model card", hint="mend or delete it") from None
    _add_metadata(card.data, facts)
    section = f"{BEGIN}\n{_section(facts)}\n{END}"
    if _SECTION.search(card.text):
        card.text = _SECTION.sub(lambda _: section, card.text, count=1)
    else:
        card.text = _insert(card.text, section, facts)
    return str(card).rstrip() + "\n"


def _add_metadata(data: CardData, facts: _Facts) -> None:
    """Add what is missing; what somebody wrote stays."""
    tags = data.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    data["tags"] = tags + [tag for tag in facts.tags if tag not in tags]
    for name, value in (
        ("library_name", facts.library),
        ("base_model", facts.base_model),
        ("pipeline_tag", facts.pipeline),
    ):
        if value is not None and data.get(name) is None:
            data[name] = value


def _insert(text: str, section: str, facts: _Facts) -> str:
    """Return a text with our section below its title: a visitor must see first that the weights are ciphertext."""
    lines, fenced = text.split("\n"), False
    for number, line in enumerate(lines):
        if line.startswith("```"):
            fenced = not fenced
        if line.startswith("# ") and not fenced:
            head, rest = "\n".join(lines[: number + 1]), "\n".join(lines[number + 1 :])
            return f"{head}\n\n{section}\n\n{rest.strip()}\n"
    return f"\n# {_plain(facts.manifest.model_id)}\n\n{section}\n\n{text.strip()}\n"


def _section(facts: _Facts) -> str:
    picture = (
        f"\n![What this repository holds, and how even its ciphertext is]({FIGURE_NAME})\n" if facts.figure else ""
    )
    return f"""## The weights here are encrypted

**Without an identity (a private key) that the owner has named, this model is of no use**: the weight files are
ciphertext under their usual names. Loaders that know nothing of this fail; nothing here can be fine-tuned or run.
{picture}
### What is protected

{_contents_table(facts)}

{_facts_table(facts)}

### How to load it

{_loading(facts)}

### How to check it

{_checking(facts)}"""


def _contents_table(facts: _Facts) -> str:
    meaning = {
        "ciphertext": "encrypted and signed",
        "signed": "plain, signed",
        "plain": "plain, not covered by the signature",
    }
    rows = [
        f"| {_code(name)} | {size_bytes:,} | {meaning[kind]} |"
        for kind in meaning
        for name, (of, size_bytes) in facts.kinds.items()
        if of == kind
    ]
    hidden = len(rows) - MAX_ROWS
    if hidden > 0:
        rows = [*rows[:MAX_ROWS], f"| and {hidden} more, in the manifest | | |"]
    return "\n".join(["| File | Bytes | |", "|---|---:|---|", *rows])


def _facts_table(facts: _Facts) -> str:
    manifest = facts.manifest
    rows = [
        ("Model", _code(manifest.model_id)),
        ("Iteration", _code(manifest.iteration)),
        ("Saved", manifest.created + (f", step {manifest.step}" if manifest.step is not None else "")),
        ("Encryption", ", ".join(_code(suite) for suite in facts.suites)),
        ("Signed by", _code(facts.signer)),
        ("Watermark", _watermark(manifest)),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _watermark(manifest: Manifest) -> str:
    """Return what the manifest says of the mark. Its carriers and triggers are the owner's secret and not in there."""
    if manifest.state != "complete":
        return "not finished in this save"
    said = []
    if (read := manifest.signature) is not None:
        decoded = "payload read back" if read.payload_decoded else "payload not read back"
        said.append(f"in the weights: bit error rate {read.bit_error_rate:.4f}, {decoded}")
    if (triggers := manifest.triggers) is not None:
        rate = "not measured" if triggers.match_rate is None else f"match rate {triggers.match_rate:.2f}"
        said.append(f"{triggers.count} secret triggers: {rate}")
    return "; ".join(said) or "none is recorded for this save"


def _loading(facts: _Facts) -> str:
    place = facts.address or "path/to/this/folder"
    repo = place.removeprefix("hub://").partition("@")[0]
    auto = facts.auto_class
    return f"""```python
# pip install hf-wmguard; the identity is a private key that the owner gave access to, never a part of this repository
from transformers import {auto}
from hf_wmguard import load_protected

model = load_protected("{place}", identity="file:inference.key", auto_class={auto})
```

or, in a script that stays as it is, with `WMGUARD_IDENTITY=file:inference.key` in the environment:

```python
import hf_wmguard.loading
from transformers import {auto}

model = {auto}.from_pretrained("{repo}")
```

Plaintext exists in memory only."""


def _checking(facts: _Facts) -> str:
    fetch = f"wmguard pull {facts.address} folder\n" if facts.address else ""
    folder = "folder" if facts.address else "path/to/this/folder"
    return f"""```bash
{fetch}wmguard inspect {folder} --signer file:owner.key.pub
```

This needs no secret: it checks the owner's signature and the SHA-256 of every signed file. Get `owner.key.pub` from the
owner, not from here; its id must be {_code(facts.signer)}."""


def _plain(text: str) -> str:
    return _UNSAFE.sub("?", text)


def _code(text: str) -> str:
    return f"`{_plain(text)}`"
