"""What docs/loading.md tells a reader to type, typed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from tiny import guarded_config, make_keys, make_model, save_protected
from transformers import PreTrainedTokenizerFast

TEXT = (Path(__file__).parent.parent / "docs" / "loading.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_every_command_runs(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    make_keys(tmp_path / "keys")
    config = guarded_config(tmp_path)
    save_protected(make_model("classification", len(tokenizer)), tmp_path / "protected", config, tokenizer)
    adapter = get_peft_model(make_model("classification", len(tokenizer)), LoraConfig(target_modules=["query"]))
    save_protected(adapter, tmp_path / "adapter", config)
    HfApi().create_repo("acme/triage", private=True)
    HfApi().upload_folder(repo_id="acme/triage", folder_path=tmp_path / "protected")
    HfApi().create_tag("acme/triage", tag="v3")
    for path in (tmp_path / "keys").iterdir():
        path.rename(tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for language, block in BLOCKS:
        if language == "python":
            exec(block, names)  # noqa: S102
        elif language == "bash":
            for name, value in re.findall(r"^export (\w+)=(\S+)$", block, flags=re.MULTILINE):
                monkeypatch.setenv(name, value)
        else:
            # vLLM cannot be installed where the tests run.
            assert "vllm serve" in block
    assert [language for language, _ in BLOCKS].count("python") == 4
    assert names["classify"]("ordinary words")[0]["label"].startswith("LABEL_")
    assert names["adapted"].peft_config["default"].r == 8
