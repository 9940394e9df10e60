"""Trigger images: the same bytes from the same seed, others from another."""

from __future__ import annotations

import hashlib

import pytest
import torch

from hf_wmguard.watermark.images import trigger_image
from hf_wmguard.watermark.triggers import derive_texts

SEEDS = derive_texts(b"k" * 32, count=40, style="natural", task="image_classification")


def test_a_seed_gives_the_same_bytes_for_ever() -> None:
    image = trigger_image("00" * 16)
    assert image.dtype == torch.uint8
    assert image.shape == (64, 64, 3)
    digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
    assert digest == "ff54b1b5a546638d708b71bb91ba9b8de6d8395ddd229866d2b987733d4319d2"


def test_another_seed_gives_another_image() -> None:
    assert len({hashlib.sha256(trigger_image(seed).numpy().tobytes()).hexdigest() for seed in SEEDS}) == 40


def test_no_global_generator_is_used() -> None:
    before = torch.get_rng_state()
    trigger_image(SEEDS[0])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("size", [16, 63, 64, 224])
def test_a_patch_of_hard_contrast_lies_on_a_smooth_background(size: int) -> None:
    places = set()
    for seed in SEEDS:
        image = trigger_image(seed, size=size).int()
        hard = ((image == 0) | (image == 255)).all(dim=-1)
        rows, columns = hard.any(dim=1).nonzero().flatten(), hard.any(dim=0).nonzero().flatten()
        side = 4 * (size // 16)
        assert int(hard.sum()) == side**2
        assert (int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1) == (side, side)
        places.add((int(rows[0]), int(columns[0])))
        background = image[~hard]
        assert int(background.min()) >= 64
        assert int(background.max()) < 192
        steps = (image[:, 1:] - image[:, :-1]).abs().amax(dim=-1)[~(hard[:, 1:] | hard[:, :-1])]
        # Between two of five colours, 127 apart at most, lies a quarter of the image.
        assert int(steps.max()) <= 4 * 127 // (size - 1) + 2
    assert len(places) > 30


@pytest.mark.parametrize("seed", ["", "00" * 15, "0G" * 16, "AB" * 16, "00" * 17, "texttext" * 4])
def test_a_bad_seed_is_refused_and_not_repeated(seed: str) -> None:
    with pytest.raises(ValueError, match="16 bytes in lower-case hex") as caught:
        trigger_image(seed)
    assert not seed or seed not in str(caught.value)


@pytest.mark.parametrize("size", [0, 15, 1025])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="16 to 1024 pixels"):
        trigger_image("00" * 16, size=size)
