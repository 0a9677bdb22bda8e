"""Rewards against the sums that define them, batched and vmapped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pirl.errors import InvalidRewardError
from pirl.rewards import expected_reward, linear_reward, neural_reward, tabular_reward

S, A, K = 5, 3, 4


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (6,), (6, 1), (2, 3, 1)])
@pytest.mark.parametrize("pairs", [(S,), (S, A)])
def test_linear_reward_is_the_inner_product(batch: tuple[int, ...], pairs: tuple[int, ...]) -> None:
    features, weights = random(*pairs, K), random(*batch, K)
    reward = linear_reward(features, weights)
    expected = torch.einsum("sak,...k->...sa", features.reshape(S, -1, K), weights)
    torch.testing.assert_close(reward, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("pairs", [(S,), (S, A)])
def test_linear_reward_vmaps(pairs: tuple[int, ...]) -> None:
    features, weights = random(*pairs, K), random(7, K)
    mapped = torch.func.vmap(lambda w: linear_reward(features, w))(weights)
    torch.testing.assert_close(mapped, linear_reward(features, weights), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("features", "weights", "complaint"),
    [
        (torch.zeros(S), torch.zeros(S), r"expected \[S, K\] or \[S, A, K\]"),
        (torch.zeros(S, K), torch.zeros(K + 1), r"expected \[\*batch, 4\]"),
        (torch.zeros(S, K), torch.tensor(1.0), r"expected \[\*batch, 4\]"),
        (torch.zeros(S, K), torch.zeros(K, dtype=torch.float64), "float32"),
        (torch.zeros(S, K, dtype=torch.long), torch.zeros(K, dtype=torch.long), r"give features.double\(\)"),
    ],
)
def test_linear_reward_names_what_does_not_fit(features: Tensor, weights: Tensor, complaint: str) -> None:
    with pytest.raises(InvalidRewardError, match=complaint):
        linear_reward(features, weights)


def test_tabular_reward_broadcasts_over_actions() -> None:
    values = random(2, S)
    reward = tabular_reward(values) + torch.zeros(S, A)
    assert reward.equal(values.unsqueeze(-1).expand(2, S, A))
    mapped = torch.func.vmap(tabular_reward)(values)
    assert mapped.equal(tabular_reward(values))


@pytest.mark.parametrize("values", [torch.tensor(1.0), torch.zeros(S, dtype=torch.long)])
def test_tabular_reward_names_what_does_not_fit(values: Tensor) -> None:
    with pytest.raises(InvalidRewardError, match="floating tensor"):
        tabular_reward(values)


class Ensemble(nn.Module):
    """A batch of linear maps, as posterior draws of a network are."""

    def __init__(self, *batch: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(random(*batch, K, 1))

    def forward(self, features: Tensor) -> Tensor:
        weights = self.weights if features.dim() == 2 else self.weights.unsqueeze(-3)
        return features @ weights


@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
@pytest.mark.parametrize("pairs", [(S,), (S, A)])
def test_neural_reward_of_a_linear_network_is_linear(batch: tuple[int, ...], pairs: tuple[int, ...]) -> None:
    network, features = Ensemble(*batch), random(*pairs, K)
    expected = linear_reward(features, network.weights.squeeze(-1))
    torch.testing.assert_close(neural_reward(network, features), expected, rtol=1e-13, atol=1e-13)


def test_neural_reward_keeps_a_number_for_each_action() -> None:
    network = nn.Linear(K, A, dtype=torch.float64)
    features = random(S, K)
    assert neural_reward(network, features).equal(network(features))


def test_neural_reward_vmaps_over_parameters() -> None:
    network = nn.Sequential(nn.Linear(K, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    features = random(S, K)
    draws = {name: random(6, *parameter.shape) for name, parameter in network.named_parameters()}

    class Drawn(nn.Module):
        def __init__(self, draw: dict[str, Tensor]) -> None:
            super().__init__()
            self.draw = draw

        def forward(self, features: Tensor) -> Tensor:
            return torch.func.functional_call(network, self.draw, (features,))

    mapped = torch.func.vmap(lambda draw: neural_reward(Drawn(draw), features))(draws)
    assert mapped.shape == (6, S, 1)
    looped = [neural_reward(Drawn({name: value[i] for name, value in draws.items()}), features) for i in range(6)]
    torch.testing.assert_close(mapped, torch.stack(looped), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("network", "shape", "complaint"),
    [
        (nn.Identity(), (K,), r"expected \[S, D\]"),
        (nn.Flatten(0), (S, K), r"expected \[\*batch, 5, 1\]"),
        (nn.Linear(K, 2), (S, A, K), r"expected \[\*batch, 5, 3, 1\]"),
        (nn.Flatten(0), (S, A, K), r"expected \[\*batch, 5, 3, 1\]"),
        (nn.Linear(K + 1, 1), (S, K), r"does not take features \[5, 4\] of torch.float32 on cpu: mat1 and mat2 shapes"),
        (nn.Linear(K, 1).double(), (S, K), "does not take features .* same dtype"),
    ],
)
def test_neural_reward_names_what_does_not_fit(network: nn.Module, shape: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(InvalidRewardError, match=complaint):
        neural_reward(network, torch.zeros(shape))


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("layout", ["dense", "coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_expected_reward_is_the_mean_over_next_states(batch: tuple[int, ...], layout: str) -> None:
    transition = torch.rand(S, A, S, dtype=torch.float64)
    transition[transition < 0.5] = 0.0
    transition = transition / transition.sum(dim=-1, keepdim=True)
    reward_sas = random(*batch, S, A, S)
    expected = torch.einsum("sat,...sat->...sa", transition, reward_sas)
    if layout != "dense":
        table = transition.reshape(S * A, S)
        transition = table.to_sparse_coo() if layout == "coo" else table.to_sparse_csr()
    torch.testing.assert_close(expected_reward(reward_sas, transition), expected, rtol=1e-13, atol=1e-13)


def test_expected_reward_vmaps() -> None:
    transition = torch.full((S, A, S), 1 / S, dtype=torch.float64)
    reward_sas = random(4, S, A, S)
    mapped = torch.func.vmap(lambda r: expected_reward(r, transition))(reward_sas)
    torch.testing.assert_close(mapped, expected_reward(reward_sas, transition), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(S, A), (S, S, A), (S, A, S + 1)])
def test_expected_reward_names_what_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRewardError, match=r"\(5, 3, 5\)"):
        expected_reward(torch.zeros(shape), torch.full((S, A, S), 1 / S))
