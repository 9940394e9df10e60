"""Between tensors and bytes: every dtype there and back, and nothing made up."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from hf_wmguard.errors import FormatError, UnsupportedError
from hf_wmguard.suspects.tensors import Encoded, decode, encode

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.complex64,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


def example(dtype: torch.dtype, *shape: int) -> Tensor:
    return (4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (7,), (2, 3, 4), (0,), (0, 4), (3, 0)])
def test_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = example(dtype, *shape)
    data = encode("w", tensor)
    assert data.shape == shape
    again = decode(data.dtype, data.shape, bytearray(data.view()))
    assert again.dtype == dtype
    assert again.shape == tensor.shape
    assert encode("w", again).view() == data.view()


# The library of safetensors knows F8_E8M0, but does not yet write it from torch.
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float8_e8m0fnu], ids=str)
def test_names_and_bytes_are_those_of_safetensors(dtype: torch.dtype) -> None:
    tensor = example(dtype, 3, 5)
    data, file = encode("w", tensor), save({"w": tensor})
    assert f'"dtype":"{data.dtype}"'.encode() in file
    assert file.endswith(bytes(data.view()))


def test_memory_is_shared_and_strides_are_not() -> None:
    tensor = example(torch.float32, 4, 6)
    data = encode("w", tensor)
    tensor[0, 0] = 1234.5
    assert decode(data.dtype, data.shape, bytearray(data.view()))[0, 0] == 1234.5
    data = encode("w", tensor.T)
    assert torch.equal(decode(data.dtype, data.shape, bytearray(data.view())), tensor.T)


def test_gradients_stay_behind() -> None:
    data = encode("w", torch.nn.Parameter(example(torch.float32, 2, 2)))
    assert not decode(data.dtype, data.shape, bytearray(data.view())).requires_grad


def test_a_dtype_that_files_do_not_have() -> None:
    with pytest.raises(UnsupportedError, match="complex128"):
        encode("w", torch.zeros(2, dtype=torch.complex128))


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("F32", (2, 3), 0),
        ("F32", (), 0),
        ("F32", (2, 3), 20),
        ("F32", (2, 3), 28),
        ("F32", (2, 3), 23),
        ("F32", (0, 3), 4),
        ("F99", (2,), 8),
        ("", (2,), 8),
    ],
)
def test_bytes_that_are_no_such_tensor(dtype: str, shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(FormatError):
        decode(dtype, shape, bytearray(size))


@pytest.mark.parametrize("tensor", [torch.arange(6.0), torch.arange(6.0).reshape(2, 3).T, torch.zeros(0, 3)])
def test_bytes_come_when_they_are_asked_for(tensor: Tensor) -> None:
    tensors = Encoded({"w": tensor})
    assert (list(tensors), len(tensors)) == (["w"], 1)
    expected = encode("w", tensor)
    assert tensors["w"].info() == expected.info()
    whole = expected.info().size_bytes
    assert tensors["w"].part(0, whole, memoryview(b"")) == expected.view()
    assert tensors["w"].part(whole // 2, whole, memoryview(b"")) == expected.view()[whole // 2 :]
    if tensor.numel() and tensor.is_contiguous():
        one = tensors["w"]
        view = one.part(0, whole, memoryview(b""))
        tensor[0] = 7
        assert bytes(view[:4]) == bytes(encode("w", tensor).view()[:4])
    with pytest.raises(UnsupportedError, match="dtype"):
        Encoded({"w": torch.zeros(2, dtype=torch.complex128)})["w"]
