"""Tests of packed dropout masks: known Philox values, equal bits in PyTorch and Triton, drop rate, independence."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flare_kernels import dropout


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int64)


def test_philox_gives_the_known_answers() -> None:
    """Philox gives the test vector of Random123 (kat_vectors, philox4x32 10) whose last counter word is zero."""
    zero = torch.zeros((1, 1), dtype=torch.int64)
    words = dropout.philox(seed_of(0), zero, zero, 0)
    assert [int(word) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_a_mask_takes_at_most_130_operators() -> None:
    """Each operator is a launch on a GPU that cannot run the kernels."""

    class Count(TorchDispatchMode):
        operators = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.operators += 1
            return operator(*args, **(kwargs or {}))

    with Count() as count:
        dropout.dropout_mask_torch(seed_of(3), 64, 250, 6554, 0)
    assert count.operators <= 130


@pytest.mark.parametrize(
    ("rows", "cols", "p", "stream"), [(1, 1, 0.5, 0), (37, 77, 0.1, 1), (9, 1024, 0.3, 0), (20, 1100, 0.999, 3)]
)
def test_torch_and_triton_give_the_same_bits(rows: int, cols: int, p: float, stream: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from flare_kernels.triton_ops.dropout_mask import dropout_mask

    threshold = dropout.drop_threshold(p)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for number in (0, 1, 2**33 + 5, 2**63 - 2):
        seed = seed_of(number).to(device)
        from_torch = dropout.dropout_mask_torch(seed, rows, cols, threshold, stream)
        assert torch.equal(dropout_mask(seed, rows, cols, threshold, stream), from_torch)


def test_mask_is_a_pure_function_of_its_arguments() -> None:
    mask = dropout.packed_mask(seed_of(7), 50, 100, 0.4, dropout.TARGET_STREAM)
    assert mask is not None and mask.dtype == torch.uint8 and mask.shape == (50, 13)
    again = dropout.packed_mask(seed_of(7), 50, 100, 0.4, dropout.TARGET_STREAM)
    assert torch.equal(mask, again)
    # a row does not depend on the number of rows, or on the chunks of rows in which a mask is generated
    taller = dropout.packed_mask(seed_of(7), 6000, 100, 0.4, dropout.TARGET_STREAM)
    assert torch.equal(taller[:50], mask)
    assert not (mask[:, -1] >> (100 % 8)).any(), "bits after the last column must be 0"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_have_the_keep_rate_and_are_independent(p: float) -> None:
    rows, cols = 400, 1000
    masks = [
        dropout.packed_mask(seed_of(seed), rows, cols, p, stream)
        for seed, stream in ((1, dropout.TARGET_STREAM), (1, dropout.SOURCE_STREAM), (2, dropout.TARGET_STREAM))
    ]
    unpacked = [dropout.unpack(mask, cols, torch.float64) for mask in masks]
    deviation = math.sqrt(p * (1 - p) / (rows * cols))
    for mask in unpacked:
        assert abs(mask.mean() - (1 - p)) < 5 * deviation
        # all columns have the same rate, in particular the eight columns of a byte
        assert (mask.mean(0) - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / rows)
    for left, right in ((0, 1), (0, 2)):
        correlation = torch.corrcoef(torch.stack([unpacked[left].flatten(), unpacked[right].flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(rows * cols)
    neighbours = torch.corrcoef(torch.stack([unpacked[0][:, :-1].flatten(), unpacked[0][:, 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(rows * cols)


def test_probabilities_0_and_1_drop_nothing_and_everything() -> None:
    assert dropout.packed_mask(seed_of(0), 3, 9, 0.0, 0) is None
    assert dropout.keep_scale(0.0) == 1.0
    zeros = dropout.packed_mask(seed_of(0), 3, 9, 1.0, 0)
    assert zeros is not None and zeros.shape == (3, 2) and not zeros.any()
    assert dropout.keep_scale(1.0) == 0.0
    assert dropout.packed_mask(seed_of(0), 0, 9, 0.5, 0).shape == (0, 2)
    # a probability below the resolution of 1 / 65536 drops nothing, and the scale is 1
    tiny = dropout.packed_mask(seed_of(0), 3, 9, 1e-9, 0)
    assert dropout.unpack(tiny, 9, torch.float32).all() and dropout.keep_scale(1e-9) == 1.0
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="dropout_p"):
            dropout.keep_scale(p)


def test_scale_corresponds_to_the_rounded_probability() -> None:
    assert dropout.keep_scale(0.1) == 65536 / (65536 - 6554)


def test_unpack_reads_column_8b_plus_j_from_bit_j_of_byte_b() -> None:
    mask = torch.tensor([[0b00000101, 0b00000010]], dtype=torch.uint8)
    expected = [1, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert dropout.unpack(mask, 10, torch.bfloat16).tolist() == [expected]


def test_seed_comes_from_the_generator_of_the_device() -> None:
    torch.manual_seed(3)
    first, second = dropout.draw_seed("cpu"), dropout.draw_seed(torch.device("cpu"))
    assert first.dtype == torch.int64 and first.shape == () and first != second
    torch.manual_seed(3)
    assert dropout.draw_seed("cpu") == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_and_cpu_masks_are_the_same() -> None:
    on_cuda = dropout.packed_mask(seed_of(11).cuda(), 100, 500, 0.2, 1)
    assert torch.equal(on_cuda.cpu(), dropout.packed_mask(seed_of(11), 100, 500, 0.2, 1))
