"""The Trainer's own pushes, guarded: every strategy, private repos, ciphertext only, one save per commit."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hub import Hub
from hub.clients import point_clients
from hub.faults import Answer
from huggingface_hub import HfApi, ModelCard, snapshot_download
from s3_servers import ENVIRONMENT, moto_s3
from tiny import StopAt, digest_weights, make_model, make_tokenizer
from transformers import BertForSequenceClassification, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_wmguard import WatermarkCallback, load_protected, protect_trainer, verify
from hf_wmguard.config import ProtectionConfig, SignatureConfig, WatermarkConfig
from hf_wmguard.delivery.pulling import pull
from hf_wmguard.errors import ConfigError, ExposureError, NotFoundError, StoreError, UnsupportedError, WmguardError
from hf_wmguard.evidence.manifest import ENVELOPE_NAME, MANIFEST_NAME, STAGING_PREFIX, check_files, read_manifest
from hf_wmguard.stores.s3 import s3_client
from hf_wmguard.suspects.plaintext import PlaintextFinder
from hf_wmguard.suspects.protected import OPTIMIZER_NAME
from hf_wmguard.training.delivering import DELIVERY

REPO = "acme/tiny"
TOKEN = "hf_owner"
Train = Callable[..., Trainer]


class Weights(TrainerCallback):
    """Keeps every weight that was ever saved."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, value in kwargs["model"].state_dict().items():
            self.seen[f"{state.global_step}/{name}"] = value.clone()


@pytest.fixture
def make(make_trainer: Callable[..., Trainer], make_config: Callable[..., WatermarkConfig], tmp_path: Path) -> Train:
    """Make a guarded Trainer of 3 epochs, 8 steps each."""

    def guarded(
        *, protection: dict[str, Any] | None = None, config: WatermarkConfig | None = None, **args: Any
    ) -> Trainer:
        if config is None:
            config = make_config(triggers=None, signature=SignatureConfig(budget=0.06, last_epochs=2))
            config = dataclasses.replace(
                config, protection=dataclasses.replace(config.protection, **(protection or {}))
            )
        settings = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": TOKEN, "hub_always_push": True}
        trainer = make_trainer(**{**settings, **args})
        trainer.add_callback(Weights())
        protect_trainer(trainer, config)
        trainer.wmguard_config = config
        return trainer

    return guarded


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    seen = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Weights)).seen
    return {**seen, **trainer.model.state_dict()}


def files_of(commit: str | None = None) -> set[str]:
    return set(HfApi(token=TOKEN).list_repo_files(REPO, revision=commit))


def history() -> list[Any]:
    return list(reversed(HfApi(token=TOKEN).list_repo_commits(REPO)))


def check_every_commit(folder: Path) -> list[str]:
    """Check that each commit holds whole saves only, at its root and in its folders; return their ids at the root.

    The last one is downloaded, as anybody would.
    """
    api, found = HfApi(token=TOKEN), []
    for one in history()[1:]:
        files = {file.path: file for file in api.list_repo_tree(REPO, recursive=True, revision=one.commit_id)}
        for path in [path for path in files if path.rpartition("/")[2] == MANIFEST_NAME]:
            where = path.removesuffix(MANIFEST_NAME)
            for name in (MANIFEST_NAME, ENVELOPE_NAME):
                api.hf_hub_download(REPO, where + name, revision=one.commit_id, local_dir=folder / one.commit_id)
            manifest, _ = read_manifest(folder / one.commit_id / where)
            for entry in manifest.files:
                file = files[where + entry.name]
                assert file.size == entry.size_bytes
                assert file.lfs is None or file.lfs.sha256 == entry.sha256
            if not where:
                found.append(manifest.set_id)
    shutil.rmtree(folder)
    snapshot_download(REPO, local_dir=folder, token=TOKEN)
    for manifest_file in folder.rglob(MANIFEST_NAME):
        check_files(manifest_file.parent, read_manifest(manifest_file.parent)[0])
    return found


def check_nothing_leaked(hub: Hub, trainer: Trainer, root: Path) -> None:
    """Search all that was sent, and all that is on the disk, for plaintext weights and for the token."""
    finder = PlaintextFinder(weights_of(trainer))
    assert hub.traffic.bytes_in("^PUT") > 100_000
    assert finder.scan([hub.traffic.folder, hub.storage.folder, root / "out"]) == {}
    for path in hub.traffic.folder.iterdir():
        for line in path.read_bytes().splitlines():
            assert TOKEN.encode() not in line or line.lower().startswith(b"authorization: "), path
    for path in (root / "out").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert not any("training_args" in path for one in history() for path in files_of(one.commit_id))
    assert not list((root / "out").glob(f"{STAGING_PREFIX}*"))


STRATEGIES = {
    "end": (set(), 0),
    "every_save": (set(), 3),
    "checkpoint": ({"last-checkpoint"}, 6),
    "all_checkpoints": ({"checkpoint-8", "checkpoint-16", "checkpoint-24"}, 6),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy(hub: Hub, make: Train, tmp_path: Path, strategy: str) -> None:
    folders, during = STRATEGIES[strategy]
    trainer = make(hub_strategy=strategy)
    assert HfApi().model_info(REPO).private
    trainer.train()
    assert len(history()) == 1 + during
    pushed = trainer.push_to_hub(tags=["ours"])
    assert {path.partition("/")[0] for path in files_of() if "/" in path} == folders
    check_every_commit(tmp_path / "back")
    assert read_manifest(tmp_path / "back")[0].state == "complete"
    assert HfApi().model_info(REPO).sha == pushed.revision
    card = ModelCard.load(tmp_path / "back" / "README.md")
    assert {"ours", "generated_from_trainer", "hf-wmguard"} <= set(card.data.tags or [])
    assert "## The weights here are encrypted" in card.text
    # The Trainer's own part of the card.
    assert "## Training procedure" in card.text
    where = {"owner_key": trainer.wmguard_config.owner_key, "registry": trainer.wmguard_config.registry}
    assert verify(tmp_path / "back", **where).verdict == "detected"
    check_nothing_leaked(hub, trainer, tmp_path)
    if folders:
        # From the last step nothing is left to train, but all of the state must be there and be read.
        pulled = tmp_path / "back" / ("last-checkpoint" if strategy == "checkpoint" else "checkpoint-16")
        assert (pulled / OPTIMIZER_NAME).is_file()
        again = make(config=trainer.wmguard_config, output_dir=tmp_path / "again", push_to_hub=False)
        again.train(resume_from_checkpoint=str(pulled))
        assert again.state.global_step == 24
        assert digest_weights(again.model) == digest_weights(trainer.model)


def test_without_push_to_hub_a_push_is_guarded_too(hub: Hub, make: Train, tmp_path: Path) -> None:
    trainer = make(push_to_hub=False, save_strategy="no")
    trainer.train()
    assert hub.traffic.exchanges == []
    future = trainer.push_to_hub(blocking=False, revision="candidate", commit_message="by hand")
    assert isinstance(future, Future)
    pushed = future.result()
    assert HfApi().model_info(REPO).private
    assert HfApi().list_repo_commits(REPO, revision="candidate")[0].title == "by hand"
    assert MANIFEST_NAME in files_of("candidate")
    assert MANIFEST_NAME not in files_of("main")
    assert pushed.uri == f"hub://{REPO}@candidate"
    # As the Trainer does whenever a user saves.
    trainer.args.push_to_hub = True
    trainer.save_model(str(tmp_path / "final"))
    assert MANIFEST_NAME in files_of("main")
    check_nothing_leaked(hub, trainer, tmp_path)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_sft_trainer(hub: Hub, make_config: Callable[..., WatermarkConfig], tmp_path: Path, texts: list[str]) -> None:
    tokenizer = make_tokenizer()
    args = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=8,
        save_steps=4,
        save_strategy="steps",
        per_device_train_batch_size=4,
        max_length=64,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id=REPO,
        hub_token=TOKEN,
        hub_strategy="checkpoint",
        hub_always_push=True,
    )
    trainer = SFTTrainer(
        model=make_model("causal", len(tokenizer)),
        args=args,
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        processing_class=tokenizer,
    )
    trainer.add_callback(Weights())
    protect_trainer(trainer, make_config(triggers=None))
    trainer.train()
    trainer.push_to_hub(dataset_name="texts")
    assert HfApi().model_info(REPO).private
    assert len(history()) == 1 + 2 * 2 + 1
    check_every_commit(tmp_path / "back")
    card = ModelCard.load(tmp_path / "back" / "README.md")
    assert {"trl", "sft", "hf-wmguard"} <= set(card.data.tags or [])
    assert "TRL" in card.text
    assert card.text.count("hf-wmguard:begin") == 1
    check_nothing_leaked(hub, trainer, tmp_path)


def test_a_model_pushes_itself(hub: Hub, make: Train, tmp_path: Path) -> None:
    trainer = make(push_to_hub=False, save_strategy="no")
    trainer.train()
    trainer.model.push_to_hub(REPO, tags=["ours"], max_shard_size="300KB")
    assert HfApi().model_info(REPO).private
    trainer.model.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id=REPO, revision="other")
    ids = check_every_commit(tmp_path / "back")
    assert len(ids) == 1
    assert "ours" in (ModelCard.load(tmp_path / "back" / "README.md").data.tags or [])
    assert MANIFEST_NAME in files_of("other")
    with pytest.raises(UnsupportedError, match="create_pr"):
        trainer.model.push_to_hub(REPO, create_pr=True)
    with pytest.raises(ExposureError, match="public"):
        trainer.model.push_to_hub(REPO, private=False)
    with pytest.raises(UnsupportedError, match="part of a guarded model"):
        trainer.model.bert.push_to_hub(REPO)
    check_nothing_leaked(hub, trainer, tmp_path)


def test_a_public_repo_is_refused_before_training(hub: Hub, make: Train) -> None:
    api = HfApi()
    api.create_repo(REPO, private=False)
    api.upload_file(path_or_fileobj=b"# mine", path_in_repo="README.md", repo_id=REPO)
    with pytest.raises(ExposureError, match="public"):
        make()
    assert not api.model_info(REPO).private
    with pytest.raises(ExposureError, match="public"):
        make(hub_private_repo=False, hub_model_id="acme/fresh")
    with pytest.raises(ExposureError, match="public"):
        make(push_to_hub=False, save_strategy="no").push_to_hub()
    trainer = make(protection={"allow_public": True}, hub_strategy="end", num_train_epochs=1)
    trainer.train()
    trainer.push_to_hub()
    assert MANIFEST_NAME in files_of()


def test_a_repo_that_becomes_public_ends_the_pushes(
    hub: Hub, make: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(hub_strategy="every_save")

    class Publish(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 10:
                HfApi().update_repo_settings(REPO, private=False)

    trainer.add_callback(Publish())
    with caplog.at_level(logging.WARNING, "hf_wmguard"), pytest.raises(ExposureError, match="public") as caught:
        trainer.train()
    assert f"wmguard push {tmp_path / 'out' / 'checkpoint-24'} hub://{REPO}" in caught.value.hint
    assert "tried again at the next save" in caplog.text
    assert len(history()) <= 2
    # The training itself went to its end.
    assert trainer.state.global_step == 24


def test_plaintext_in_the_output_folder_stops_the_push(hub: Hub, make: Train, tmp_path: Path) -> None:
    trainer = make(save_strategy="no")
    trainer.train()
    before = len(history())
    torch.save(trainer.model.state_dict(), tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(WmguardError, match=r"pytorch_model\.bin"):
        trainer.push_to_hub()
    assert len(history()) == before
    (tmp_path / "out" / "pytorch_model.bin").unlink()
    trainer.push_to_hub()
    assert len(history()) == before + 1


def test_plaintext_state_of_the_optimizer_is_not_pushed(hub: Hub, make: Train, tmp_path: Path) -> None:
    trainer = make(hub_strategy="all_checkpoints", num_train_epochs=1)
    plain = trainer._push_from_checkpoint

    def tampered(folder: str) -> None:
        torch.save(dict(trainer.model.state_dict()), Path(folder) / "optimizer.pt")
        plain(folder)

    trainer._push_from_checkpoint = tampered
    with pytest.raises(WmguardError, match=r"optimizer\.pt"):
        trainer.train()
    assert not any(path.startswith("checkpoint-8/") for path in files_of())
    check_nothing_leaked_on_the_wire(hub, trainer)


def check_nothing_leaked_on_the_wire(hub: Hub, trainer: Trainer) -> None:
    assert PlaintextFinder(weights_of(trainer)).scan([hub.traffic.folder, hub.storage.folder]) == {}


def test_a_save_during_a_push_does_not_get_into_it(hub: Hub, make: Train, tmp_path: Path) -> None:
    trainer = make(save_strategy="no", num_train_epochs=1)
    trainer.train()
    model, out = trainer.model, tmp_path / "out"

    hub.faults.add("/objects/batch", Answer(503, retry_after=0))
    first = trainer.push_to_hub(blocking=False)
    # As many saves into the same folder as fit while the first push is on its way.
    saves = 0
    while not first.done():
        with torch.no_grad():
            model.classifier.bias.add_(1e-3)
        model.save_pretrained(out)
        saves += 1
    assert first.result().revision
    assert saves > 1
    trainer.push_to_hub()
    ids = check_every_commit(tmp_path / "back")
    assert len(set(ids)) == 2
    check_nothing_leaked(hub, trainer, tmp_path)


def test_failed_pushes_are_made_up_for(hub: Hub, make: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(hub_strategy="all_checkpoints")
    hub.faults.add("/commit/", Answer(500, retry_after=90), times=2)
    with caplog.at_level(logging.WARNING, "hf_wmguard"):
        trainer.train()
    assert "checkpoint-8 was not pushed" in caplog.text
    assert {path.partition("/")[0] for path in files_of() if "/" in path} == STRATEGIES["all_checkpoints"][0]
    check_every_commit(tmp_path / "back")


def test_a_hub_that_is_gone_does_not_cost_the_model(hub: Hub, make: Train, tmp_path: Path) -> None:
    trainer = make(hub_strategy="every_save", save_strategy="steps", save_steps=10)
    trainer.add_callback(StopAt(12, save=False))
    hub.faults.add("/commit/", Answer(500, retry_after=90), times=100)
    with pytest.raises(StoreError, match="busy") as caught:
        trainer.train()
    # No checkpoint holds the last step: what was trained was saved before the error.
    assert f"wmguard push {tmp_path / 'out' / DELIVERY} hub://{REPO}" in caught.value.hint
    assert read_manifest(tmp_path / "out" / DELIVERY)[0].step == 12
    assert len(history()) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_destination_on_the_hub(hub: Hub, make: Train, tmp_path: Path, fails: bool) -> None:
    trainer = make(protection={"destination": f"hub://{REPO}@main"}, push_to_hub=False, save_strategy="no")
    if fails:
        hub.faults.add("/commit/", Answer(500, retry_after=90), times=9)
        with pytest.raises(StoreError) as caught:
            trainer.train()
        assert f"wmguard push {tmp_path / 'out' / DELIVERY} hub://{REPO}@main" in caught.value.hint
    else:
        trainer.train()
    assert read_manifest(tmp_path / "out" / DELIVERY)[0].state == "complete"
    assert HfApi().model_info(REPO).private
    if not fails:
        assert len(check_every_commit(tmp_path / "back")) == 1
        model = load_protected(
            f"hub://{REPO}",
            identity=trainer.wmguard_config.protection.recipients[0].removesuffix(".pub"),
            auto_class=BertForSequenceClassification,
        )
        assert torch.equal(model.classifier.bias, trainer.model.classifier.bias)
        check_nothing_leaked(hub, trainer, tmp_path)


def test_a_destination_in_s3(make: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with moto_s3() as (host, port):
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}"}.items():
            monkeypatch.setenv(name, value)
        trainer = make(protection={"destination": "s3://models/acme"}, push_to_hub=False, save_strategy="no")
        with pytest.raises(NotFoundError, match="models"):
            trainer.train()
        assert trainer.state.global_step == 0
        with closing(s3_client()) as client:
            client.create_bucket(Bucket="models")
        trainer.train()
        pull("s3://models/acme", tmp_path / "back")
    manifest, _ = read_manifest(tmp_path / "back")
    check_files(tmp_path / "back", manifest)
    assert manifest.state == "complete"
    assert "wmguard pull s3://models/acme folder" in (tmp_path / "back" / "README.md").read_text()


@pytest.mark.parametrize("token", [None, "hf_reader"])
def test_who_may_not_push_is_told_before_training(
    hub: Hub, make: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    HfApi().create_repo(REPO, private=True)
    point_clients(monkeypatch, hub, tmp_path / "other-home", token=token)
    trainer = make(protection={"destination": f"hub://{REPO}"}, push_to_hub=False)
    with pytest.raises(StoreError):
        trainer.train()
    assert trainer.state.global_step == 0
    if token is not None:
        trainer = make(hub_token=token)
        with pytest.raises(StoreError, match="403"):
            trainer.train()
        assert trainer.state.global_step == 0


def test_a_bare_callback_cannot_guard_pushes(
    hub: Hub, make_trainer: Callable[..., Trainer], make_config: Callable[..., WatermarkConfig]
) -> None:
    trainer = make_trainer(push_to_hub=True, hub_model_id=REPO, hub_private_repo=True)
    trainer.add_callback(WatermarkCallback(make_config()))
    with pytest.raises(UnsupportedError, match="bare callback"):
        trainer.train()
    trainer = make_trainer(hub_model_id=REPO)
    trainer.add_callback(WatermarkCallback(make_config()))
    with pytest.raises(UnsupportedError, match="bare callback"):
        trainer.push_to_hub()
    assert files_of() == {".gitattributes"}


@pytest.mark.parametrize("destination", ["ftp://host/x", "hub://name", "hub://a/b/../c", "s3://B"])
def test_an_address_is_checked_when_the_callback_is_made(
    make_config: Callable[..., WatermarkConfig], destination: str
) -> None:
    with pytest.raises(ConfigError):
        WatermarkCallback(make_config(protection=ProtectionConfig(destination=destination)))
