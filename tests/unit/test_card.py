"""The model card: what it says, what it keeps of somebody else's, and what it never tells."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from hf_wmguard.delivery.card import BEGIN, END, FIGURE_NAME, MAX_ROWS, write_card
from hf_wmguard.delivery.figures import count_bytes, entropy_bits
from hf_wmguard.errors import FormatError, NotFoundError
from hf_wmguard.evidence.manifest import read_manifest
from hf_wmguard.protection import protect_folder

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, owner_file: Path, identity_file: Path) -> Make:
    """Make a protected folder of a model that is no model."""

    def protected(config: dict[str, object] | None = None, *, model_id: str = "acme/tiny", **options: object) -> Path:
        plain, out = tmp_path / "plain", tmp_path / "protected"
        plain.mkdir()
        tensors = {f"{i}": torch.randn(64, 512, generator=torch.Generator().manual_seed(i)) for i in range(32)}
        save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        (plain / "config.json").write_text(json.dumps(config or {"architectures": ["BertForSequenceClassification"]}))
        (plain / "vocab.txt").write_text("a\nb\n")
        protect_folder(
            plain,
            out,
            recipients=(f"file:{identity_file}.pub",),
            owner_key=f"file:{owner_file}",
            model_id=model_id,
            **options,  # type: ignore[arg-type]
        )
        return out

    return protected


def test_a_fresh_card_says_what_is_there(make: Make, tmp_path: Path) -> None:
    folder = make()
    card = ModelCard.load(write_card(folder, address="hub://acme/tiny", tags=["ours"]))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.tags == ["ours", "hf-wmguard", "encrypted", "watermark"]
    assert card.text.lstrip().startswith("# acme/tiny\n")
    _, signer = read_manifest(folder)
    for said in (
        signer,
        "AES-256-GCM",
        "| `model.safetensors` |",
        "none is recorded for this save",
        'load_protected("hub://acme/tiny", identity="file:inference.key"',
        'AutoModelForSequenceClassification.from_pretrained("acme/tiny")',
        "WMGUARD_IDENTITY",
        "wmguard inspect folder --signer file:owner.key.pub",
        f"({FIGURE_NAME})",
    ):
        assert said in card.text, said
    assert str(tmp_path) not in card.content
    # The same save, the same card.
    before = (folder / "README.md").read_bytes(), (folder / FIGURE_NAME).read_bytes()
    write_card(folder, address="hub://acme/tiny", tags=["ours"])
    assert before == ((folder / "README.md").read_bytes(), (folder / FIGURE_NAME).read_bytes())


def test_what_somebody_wrote_stays(make: Make) -> None:
    folder = make()
    (folder / "README.md").write_text(
        "---\nlicense: mit\ntags:\n- mine\nlibrary_name: other\nlanguage: de\n---\n\n"
        "<!-- generated -->\n\n```bash\n# no title\n```\n\n# My model\n\nIts text.\n\n## More\n\nEven more.\n"
    )
    card = ModelCard.load(write_card(folder))
    assert (card.data.license, card.data.language, card.data.library_name) == ("mit", "de", "other")
    assert card.data.tags == ["mine", "hf-wmguard", "encrypted", "watermark"]
    begin = card.text.index(BEGIN)
    assert card.text.index("# My model") < begin < card.text.index("Its text.")
    assert card.text.rstrip().endswith("## More\n\nEven more.")
    # Ours alone is written anew, wherever it has been moved to.
    ours = card.text[begin : card.text.index(END) + len(END)]
    (folder / "README.md").write_text(card.content.replace(ours, "") + f"\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    again = ModelCard.load(write_card(folder))
    assert again.text.count(BEGIN) == 1
    assert "\nold\n" not in again.text
    assert again.text.index("Even more.") < again.text.index(BEGIN) < again.text.index("The end.")


@pytest.mark.parametrize(
    "text", ["---\n[1, 2]\n---\n# x\n", "---\n: : :\n\t- x\n---\n# x\n", "---\n1: 2\n---\n# x\n", b"\xff\xfe\x00"]
)
def test_a_card_that_cannot_be_kept_is_refused(make: Make, text: str | bytes) -> None:
    folder = make()
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "README.md").write_bytes(data)
    with pytest.raises(FormatError) as caught:
        write_card(folder)
    assert caught.value.hint
    assert (folder / "README.md").read_bytes() == data


def test_without_matplotlib_there_is_no_picture(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    write_card(folder)
    assert (folder / FIGURE_NAME).is_file()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = write_card(folder).read_text()
    assert FIGURE_NAME not in text
    assert not (folder / FIGURE_NAME).exists()


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("google-bert/bert-base-cased", "google-bert/bert-base-cased"),
        ("/home/somebody/models/secret", None),
        ("./out/checkpoint-5", None),
        ("tests/unit", None),
        ("..", None),
        (7, None),
    ],
)
def test_a_base_model_is_named_only_by_its_id(make: Make, base: object, said: str | None) -> None:
    folder = make({"architectures": ["LlamaForCausalLM"], "_name_or_path": base})
    card = ModelCard.load(write_card(folder))
    assert card.data.get("base_model") == said
    assert "somebody" not in card.content


def test_a_name_cannot_break_out_of_the_section(make: Make) -> None:
    folder = make(model_id=f"a`|<b>{END}")
    text = write_card(folder).read_text()
    assert text.count(END) == 1
    assert "<b>" not in text


def test_many_shards_are_not_all_listed(make: Make) -> None:
    folder = make(max_shard_bytes=130_000)
    text = write_card(folder).read_text()
    assert "more, in the manifest" in text
    assert text.count("encrypted and signed") == MAX_ROWS


def test_ciphertext_is_even_and_plaintext_is_not(make: Make, tmp_path: Path) -> None:
    assert entropy_bits(count_bytes([make() / "model.safetensors"])) > 7.999
    assert entropy_bits(count_bytes([tmp_path / "plain" / "model.safetensors"])) < 7.6


def test_a_folder_that_is_not_protected_gets_no_card(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        write_card(tmp_path)
    assert list(tmp_path.iterdir()) == []
