"""Tests of the measurement of memory and time, on examples whose sizes are known."""

from __future__ import annotations

import time

import pytest
import torch

from flare.experiments.measure import StepTimer, peak_bytes, saved_bytes

KIB = 1024  # bytes of a float32 tensor of 256 numbers


def numbers() -> torch.Tensor:
    return torch.ones(256)


def test_peak_is_the_largest_live_size():
    with peak_bytes() as peak:
        a = torch.empty(256)
        b = torch.empty(512)
        del a
        c = torch.empty(256)
        del b, c
        d = torch.empty(256)
    assert (peak.at_start, peak.peak, peak.current) == (0, 3 * KIB, KIB)
    del d
    assert peak.current == KIB, "counting stops when the block ends"


def test_views_and_in_place_results_count_once():
    with peak_bytes() as peak:
        a = torch.empty(256)
        views = [a.view(16, 16), a[3:7], a.t(), a.detach(), a.add_(1.0)]
    assert peak.peak == KIB
    assert len(views) == 5


def test_a_storage_counts_until_its_last_view_is_freed():
    with peak_bytes() as peak:
        part = torch.empty(256)[:1]
        assert peak.current == KIB
        del part
        assert peak.current == 0


def test_existing_tensors_count_only_if_passed_as_live():
    before, live = numbers(), numbers()
    with peak_bytes(live=[live, {"again": live.view(2, 128)}]) as peak:
        before.mul_(2)
        live.mul_(2)
        out = before + live
    assert (peak.at_start, peak.peak, peak.above_start) == (KIB, 2 * KIB, KIB)
    del out


def test_freeing_a_live_tensor_is_counted():
    live = numbers()
    with peak_bytes(live=[live]) as peak:
        del live
        new = numbers()
    assert (peak.at_start, peak.peak, peak.current) == (KIB, KIB, KIB)
    del new


def test_freeing_a_tensor_not_passed_as_live_changes_nothing():
    before = numbers()
    with peak_bytes() as peak:
        total = before.sum()
        del before
    assert peak.current == peak.peak == total.untyped_storage().nbytes()


def test_reused_addresses_are_counted_again():
    with peak_bytes() as peak:
        for _ in range(20):
            torch.empty(256)
    assert (peak.peak, peak.current) == (KIB, 0)


def test_growing_a_tensor_is_counted():
    with peak_bytes() as peak:
        a = torch.empty(256)
        a.resize_(1024)
    assert peak.peak == 4 * KIB


def test_peak_includes_the_backward_pass():
    weight = torch.ones(256, requires_grad=True)
    with peak_bytes(live=[weight]) as peak:
        # While the backward of exp runs, these tensors are live: the weight, the output of exp, the gradient of that
        # output (one number of 4 bytes, expanded), and the gradient of the weight.
        loss = weight.exp().sum()
        loss.backward()
    assert weight.grad is not None
    assert KIB * 3 <= peak.peak <= KIB * 3 + 64
    assert peak.current == 2 * KIB + loss.untyped_storage().nbytes()


def test_saved_bytes_of_known_functions():
    x = torch.ones(256, requires_grad=True)
    with saved_bytes() as saved:
        x.exp()
    assert (saved.total, saved.storages) == (KIB, 1)
    with saved_bytes() as saved:
        x * 2.0
    assert saved.total == 0, "a product with a constant saves nothing"
    with saved_bytes() as saved:
        y = x.exp()
        (y * y).sin()
    # exp saves y, the product saves y twice, and the sine saves the product
    assert (saved.total, saved.storages) == (2 * KIB, 2)


def test_a_saved_view_counts_its_whole_storage():
    big, x = torch.ones(1024), torch.ones(256, requires_grad=True)
    with saved_bytes() as saved:
        x * big[:256]
    assert saved.total == 4 * KIB


def test_parameters_and_inputs_can_be_ignored():
    linear, x = torch.nn.Linear(256, 1), torch.ones(1, 256)
    with saved_bytes() as everything:
        linear(x).exp()
    with saved_bytes(ignore=[linear.parameters(), {"x": x}]) as saved:
        linear(x).exp()
    assert saved.total == 4
    assert everything.total - saved.total in (KIB, 2 * KIB), (
        "the ignored bytes are the input, and the weight if PyTorch saves it"
    )


def test_a_loop_with_backward_counts_every_step():
    x = torch.ones(256, requires_grad=True)
    with saved_bytes() as saved:
        for _ in range(5):
            x.exp().sum().backward()
    assert saved.total == 5 * KIB


def test_counting_does_not_change_gradients():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 3))
    x, y = torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1])
    torch.nn.functional.cross_entropy(net(x), y).backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with peak_bytes(), saved_bytes():
        torch.nn.functional.cross_entropy(net(x), y).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(net.parameters(), expected, strict=True))


def test_checkpointing_keeps_fewer_bytes_for_backward():
    net = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()) for _ in range(4)])
    x = torch.ones(32, 64)
    with saved_bytes(ignore=[net.parameters(), x]) as plain:
        net(x)
    with saved_bytes(ignore=[net.parameters(), x]) as less:
        hidden = x
        for block in net:
            hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
    assert less.total < plain.total


def test_the_median_leaves_out_the_warm_up():
    timer = StepTimer(warmup=2)
    assert timer.median is None
    for pause in (0.05, 0.05, 0.0, 0.0, 0.0):
        with timer.step():
            time.sleep(pause)
    assert len(timer.seconds) == 5
    assert timer.median is not None and timer.median < 0.02 < timer.seconds[0]


def test_all_steps_count_if_there_are_only_warm_up_steps():
    timer = StepTimer(warmup=3)
    with timer.step():
        pass
    assert timer.median == timer.seconds[0]


def test_invalid_use_of_the_timer_raises():
    with pytest.raises(ValueError, match="warmup"):
        StepTimer(warmup=-1)
    timer = StepTimer()
    with pytest.raises(RuntimeError, match="start"):
        timer.stop()
    with pytest.raises(KeyError), timer.step():
        raise KeyError
    assert timer.seconds == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_a_gpu_is_the_peak_of_the_allocator():
    with peak_bytes(device="cuda") as peak:
        a = torch.empty(1 << 20, device="cuda")
    assert peak.above_start == 4 << 20
    del a


def test_iterators_inside_containers_are_read() -> None:
    """`ignore=[model.parameters()]` leaves the parameters out, and `live=[model.parameters()]` counts them."""
    layer = torch.nn.Linear(8, 8)
    size = sum(p.nbytes for p in layer.parameters())
    x = torch.randn(4, 8, requires_grad=True)
    with saved_bytes(ignore=[layer.parameters(), x]) as saved:
        y = layer(x)
    del y
    assert saved.total == 0
    with peak_bytes(live=[layer.parameters()]) as peak:
        pass
    assert peak.at_start == size
