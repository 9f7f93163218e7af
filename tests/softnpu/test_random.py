"""Random numbers follow the device's generator, as on a device."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf


def drawn(generator: torch.Generator | None = None) -> list[list[float]]:
    x = torch.empty(6, device="npu")
    probabilities = torch.rand(3, 5, device="npu", generator=generator)
    results = [
        x.uniform_(generator=generator).clone(),
        x.normal_(generator=generator).clone(),
        x.exponential_(generator=generator).clone(),
        probabilities,
        torch.randn(6, device="npu", generator=generator),
        torch.randint(0, 1000, (6,), device="npu", generator=generator),
        torch.randperm(20, device="npu", generator=generator),
        torch.multinomial(probabilities, 3, generator=generator),
        torch.bernoulli(torch.full((20,), 0.5, device="npu"), generator=generator),
    ]
    return [tensor.flatten().tolist() for tensor in results]


def test_same_seed_same_numbers() -> None:
    torch.npu.manual_seed_all(7)
    first, second = drawn(), drawn()
    torch.npu.manual_seed_all(7)
    again = drawn()
    torch.npu.manual_seed_all(8)
    other = drawn()
    assert first == again
    for a, b in zip(first, second, strict=True):
        assert a != b  # the generator moved on
    for a, b in zip(first, other, strict=True):
        assert a != b


def test_generator_of_ones_own() -> None:
    torch.npu.manual_seed(3)
    mine = [drawn(torch.Generator("npu").manual_seed(seed)) for seed in (1, 1, 2)]
    assert mine[0] == mine[1] != mine[2]
    untouched = drawn()
    torch.npu.manual_seed(3)
    assert drawn() == untouched  # the default generator was not used


def test_state_of_the_generator_can_be_kept() -> None:
    torch.npu.manual_seed(5)
    drawn()
    state = torch.npu.get_rng_state()
    first = drawn()
    torch.npu.set_rng_state(state)
    assert drawn() == first


def test_cpu_numbers_are_not_moved_by_the_npus() -> None:
    torch.manual_seed(11)
    first = torch.rand(4).tolist()
    torch.manual_seed(11)
    drawn()
    nnf.dropout(torch.ones(64, device="npu"), 0.5)
    assert torch.rand(4).tolist() == first


def test_numbers_are_distributed_as_they_should() -> None:
    torch.npu.manual_seed(1)
    x = torch.empty(20_000, device="npu")
    assert abs(x.uniform_().mean().item() - 0.5) < 0.02
    assert abs(x.normal_().std().item() - 1) < 0.03
    assert abs(x.exponential_().mean().item() - 1) < 0.04
    assert 0.45 < (nnf.dropout(torch.ones(20_000, device="npu"), 0.5) == 0).float().mean().item() < 0.55
    weights = torch.tensor([0.1, 0.0, 0.9], device="npu")
    counts = torch.multinomial(weights, 5000, replacement=True).bincount(minlength=3)
    assert counts[1].item() == 0
    assert 400 < counts[0].item() < 600
    assert sorted(torch.randperm(100, device="npu").tolist()) == list(range(100))


def test_devices_have_generators_of_their_own() -> None:
    torch.npu.manual_seed_all(2)
    first = torch.rand(4, device="npu:0")
    assert (
        torch.rand(4, device="npu:1").tolist() == first.tolist()
    )  # same seed; device 0's draw did not move device 1's
