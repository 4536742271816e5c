"""The controller, equation by equation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from decouplify.controller import ArchitectureController, binarise, improved_semhash
from toynets import TOYS, random_images, randomise_gates

N, K = 8, 6


def soft(t: float) -> float:
    """v1 of Eq. 3."""
    return min(1.0, max(0.0, 1.2 / (1 + math.exp(-t)) - 0.1))


def flat(x: Tensor) -> list[float]:
    return x.flatten().tolist()


def images_that_are_soft(z: Tensor, t: Tensor) -> list[bool]:
    """Which images got v1; the others must have got v2, each whole."""
    v1 = torch.tensor([soft(v) for v in flat(t)], dtype=t.dtype).view_as(t)
    v2 = (t > 0).to(t.dtype)
    is_soft = [torch.allclose(z[i], v1[i], atol=1e-6) for i in range(len(t))]
    assert all(s or torch.equal(z[i], v2[i]) for i, s in enumerate(is_soft))
    return is_soft


# Equations 3 to 5 -----------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_half_of_the_images_get_v1_the_others_v2(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    t = torch.randn(n, K, dtype=torch.float64)
    n_soft = sum(images_that_are_soft(improved_semhash(t, noise=0.0), t))
    assert n_soft == n // 2 if n % 2 == 0 else n_soft in (n // 2, n // 2 + 1)


@given(seed=st.integers(0, 2**16))
def test_binary_gates_of_training_are_exactly_binary_and_have_the_gradient_of_v1(seed: int) -> None:
    torch.manual_seed(seed)
    t = torch.randn(2 * N, K, requires_grad=True)
    z = improved_semhash(t, noise=0.0)
    assert sum(bool(((row == 0) | (row == 1)).all()) for row in z) >= N
    (gradient,) = torch.autograd.grad(z.sum(), t)
    sigmoid = torch.sigmoid(t.detach())
    slope = 1.2 * sigmoid * (1 - sigmoid) * ((1.2 * sigmoid - 0.1 > 0) & (1.2 * sigmoid - 0.1 < 1))
    assert torch.allclose(gradient, slope, atol=1e-6)


def test_every_image_and_either_half_of_an_odd_batch_has_its_turn() -> None:
    t = torch.randn(3, K)
    halves = {tuple(images_that_are_soft(improved_semhash(t, noise=0.0), t)) for _ in range(100)}
    assert len(halves) == 6  # one of three, or two of three


def test_the_noise_is_standard_normal_and_drawn_per_filter() -> None:
    g = torch.zeros(2, 20_000, dtype=torch.float64)
    torch.manual_seed(3)
    z = improved_semhash(g, noise=2.0)
    torch.manual_seed(3)
    t = 2.0 * torch.randn_like(g)
    assert sum(images_that_are_soft(z, t)) == 1


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=K))
def test_the_soft_and_the_hard_half_have_the_gradient_of_v1(logits: list[float]) -> None:
    t = torch.tensor([logits, logits], dtype=torch.float64, requires_grad=True)
    z = improved_semhash(t, noise=0.0)
    assert images_that_are_soft(z.detach(), t.detach())  # one row is v1, the other v2
    (gradient,) = torch.autograd.grad(z.sum(), t)
    sigmoid = torch.tensor(logits, dtype=torch.float64).sigmoid()
    slope = 1.2 * sigmoid * (1 - sigmoid)
    inside = (1.2 * sigmoid - 0.1 >= 0) & (1.2 * sigmoid - 0.1 <= 1)
    assert torch.allclose(gradient, (slope * inside).expand(2, -1), atol=1e-12)


def test_v1_is_flat_where_it_is_clipped() -> None:
    t = torch.tensor([[-2.5, -2.3, 2.3, 2.5]] * 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(improved_semhash(t, noise=0.0).sum(), t)
    assert (gradient[0] > 0).tolist() == [False, True, True, False]


def test_the_hard_half_is_exactly_binary() -> None:
    g = torch.randn(1000, 50)
    z = improved_semhash(g)
    n_binary = sum(bool(((row == 0) | (row == 1)).all()) for row in z)
    assert n_binary == 500


def test_gates_lie_between_zero_and_one() -> None:
    z = improved_semhash(10 * torch.randn(100, K))
    assert 0 <= float(z.min()) <= float(z.max()) <= 1


def test_evaluation_opens_where_the_logit_is_positive() -> None:
    assert binarise(torch.tensor([-1.0, -0.0, 0.0, 1e-30, 1.0])).tolist() == [0, 0, 0, 1, 1]


def test_nan_passes_through() -> None:
    g = torch.tensor([[math.nan, 1.0], [math.nan, 1.0]])
    assert binarise(g).isnan().tolist() == [[True, False]] * 2
    assert improved_semhash(g).isnan().tolist() == [[True, False]] * 2


def test_the_same_seed_gives_the_same_gates() -> None:
    g = torch.randn(N, K)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(improved_semhash(g))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# Equation 2 -----------------------------------------------------------------------------------------------------------


def controller(n_inputs: int = 8, bias: float = 0.0, input_norm: bool = False, axis: int = 1) -> ArchitectureController:
    return ArchitectureController(n_inputs, K, 4, bias, input_norm, axis)


def test_logits_are_two_layers_on_the_mean_over_positions() -> None:
    """g = W2 relu(W1 s + b1) + b2, written out."""
    module, x = controller(), torch.randn(2, 8, 3, 5)
    w1, b1, w2, b2 = (p.tolist() for p in module.parameters())
    for n in range(2):
        s = [sum(flat(x[n, c])) / 15 for c in range(8)]
        hidden = [max(0.0, b1[h] + sum(w1[h][c] * s[c] for c in range(8))) for h in range(2)]
        expected = [b2[k] + sum(w2[k][h] * hidden[h] for h in range(2)) for k in range(K)]
        assert flat(module(x)[n]) == pytest.approx(expected, abs=1e-6)


def test_the_channel_axis_can_be_the_last_one() -> None:
    first, last = controller(), controller(axis=-1)
    last.load_state_dict(first.state_dict())
    x = torch.randn(N, 8, 3, 3)
    assert torch.allclose(first(x), last(x.permute(0, 2, 3, 1)), atol=1e-6)


@pytest.mark.parametrize(("n_inputs", "hidden"), [(3, 1), (4, 1), (8, 2), (67, 16)])
def test_there_is_one_hidden_unit_per_reduction_inputs(n_inputs: int, hidden: int) -> None:
    module = controller(n_inputs)
    assert [tuple(p.shape) for p in module.parameters()] == [(hidden, n_inputs), (hidden,), (K, hidden), (K,)]


@pytest.mark.parametrize("bias", [2.0, 0.1])
def test_a_positive_bias_starts_open_for_any_input(bias: float) -> None:
    x = torch.cat([1e6 * torch.randn(N, 8, 2, 2), torch.zeros(1, 8, 2, 2)])
    assert (controller(bias=bias)(x) == bias).all()


@pytest.mark.parametrize("bias", [0.0, -1.0])
def test_another_bias_starts_with_a_random_second_layer(bias: float) -> None:
    module = controller(bias=bias)
    assert (module.fc2.bias == bias).all()
    assert module.fc2.weight.any()


def test_the_input_norm_uses_the_batch_in_training_and_running_statistics_in_evaluation() -> None:
    module, x = controller(input_norm=True), torch.randn(N, 8, 2, 2) * 3 + 1
    s = x.mean((2, 3))
    plain = controller()
    plain.load_state_dict(module.state_dict(), strict=False)

    def logits(pooled: Tensor) -> Tensor:
        return plain(pooled[:, :, None, None])

    by_batch = (s - s.mean(0)) / (s.var(0, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(module(x), logits(by_batch), atol=1e-5)
    mean, var = 0.1 * s.mean(0), 0.9 + 0.1 * s.var(0)
    assert torch.allclose(module.eval()(x), logits((s - mean) / (var + 1e-5).sqrt()), atol=1e-5)
    assert torch.allclose(module.train()(x[:1]), module.eval()(x[:1]))  # one image has no batch statistics


# Precision ------------------------------------------------------------------------------------------------------------


def test_logits_are_float32_and_the_same_bits_under_autocast() -> None:
    module, x = randomise(controller()), torch.randn(N, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_norm", [False, True])
def test_parameters_of_half_precision_compute_in_float32(dtype: torch.dtype, input_norm: bool) -> None:
    module, x = randomise(controller(input_norm=input_norm)).to(dtype), torch.randn(N, 8, 4, 4).to(dtype)
    exact = controller(input_norm=input_norm)
    exact.load_state_dict({name: tensor.float() for name, tensor in module.state_dict().items()})
    for training in (True, False):
        found = module.train(training)(x)
        assert found.dtype == torch.float32
        assert torch.allclose(found, exact.train(training)(x.float()), atol=1e-2 if input_norm else 1e-6)
    if input_norm:
        assert module.norm.running_mean.dtype == dtype
        assert torch.allclose(module.norm.running_mean.float(), exact.norm.running_mean, atol=1e-2)


def randomise(module: ArchitectureController) -> ArchitectureController:
    nn.init.normal_(module.fc2.weight)
    return module


# In a model -----------------------------------------------------------------------------------------------------------


def test_evaluation_is_deterministic_and_binary() -> None:
    model = randomise_gates(TOYS["Plain"].wrapped()).eval()
    first, again = (flat(model.decoupling.path()) for _ in range(2) if model(random_images(N)) is not None)
    assert first == again
    assert set(first) == {0.0, 1.0}


def test_training_gates_follow_noise_and_hard() -> None:
    model = randomise_gates(TOYS["Plain"].wrapped()).train()
    model.decoupling.noise = 0.0
    model(random_images(N))
    margins, gates = model.decoupling.margins(), model.decoupling.gates()
    assert sum(images_that_are_soft(gates["a.0"].detach(), margins["a.0"].detach())) == N // 2
    model.decoupling.hard = True
    model.decoupling.noise = 5.0  # not used by hard gates
    model(random_images(N))
    margins, gates = model.decoupling.margins(), model.decoupling.gates()
    assert torch.equal(gates["a.0"], (margins["a.0"] > 0).float())
    (gradient,) = torch.autograd.grad(gates["a.0"].sum(), margins["a.0"])
    assert (gradient > 0).any()
