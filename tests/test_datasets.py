"""The bus data against the raw records, and against the estimates that Rust published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from pirl.datasets import NUM_STATES, BusData, bus_transition, zurcher_months, zurcher_raw, zurcher_table
from pirl.errors import DataError, OptionError

# Rust 1987, table IX: groups, discount, RC, theta11; and the log-likelihood of the choices alone.
TABLE_IX = [
    ("1-3", 0.9999, 11.7270, 4.8259, -132.3887),
    ("4", 0.9999, 10.0750, 2.2930, -163.5843),
    ("1-4", 0.9999, 9.7558, 2.6275, -300.2503),
    ("1-3", 0.0, 8.2985, 109.9031, -134.7468),
    ("4", 0.0, 7.6358, 71.5133, -165.4585),
    ("1-4", 0.0, 7.3055, 70.2769, -306.6411),
]


def choice_log_likelihood(
    parameters: np.ndarray, discount: float, choices: np.ndarray, transition: np.ndarray
) -> float:
    """Rust's model written out in NumPy, apart from pirl: Newton on the soft Bellman equation, logit choices."""
    replacement_cost, theta = parameters
    state = np.arange(NUM_STATES)
    reward = np.stack([-0.001 * theta * state, np.full(NUM_STATES, -replacement_cost)], axis=1)
    value = np.zeros(NUM_STATES)
    for _ in range(100):
        q = reward + discount * transition @ value
        residual = np.logaddexp(q[:, 0], q[:, 1]) - value
        if np.abs(residual).max() < 1e-9:
            break
        policy = np.exp(q - np.logaddexp(q[:, :1], q[:, 1:]))
        value += np.linalg.solve(np.eye(NUM_STATES) - discount * np.einsum("sa,sat->st", policy, transition), residual)
    else:
        raise AssertionError("Newton's method did not converge")
    return float((choices * (q - np.logaddexp(q[:, :1], q[:, 1:]))).sum())


@pytest.mark.parametrize(("groups", "discount", "replacement_cost", "theta", "log_likelihood"), TABLE_IX)
def test_maximum_likelihood_is_rusts(
    groups: str, discount: float, replacement_cost: float, theta: float, log_likelihood: float
) -> None:
    fleet = zurcher_table(groups)
    choices = fleet.choices.sum(dim=0).numpy()
    transition = bus_transition(fleet.usage.sum(dim=0)).numpy()
    published = np.array([replacement_cost, theta])
    # In units of a start well away from the published maximum.
    scale = 1.3 * published
    found = minimize(
        lambda x: -choice_log_likelihood(x * scale, discount, choices, transition), np.ones(2), method="BFGS"
    )
    assert found.x * scale == pytest.approx(published, rel=1e-3)
    assert -found.fun == pytest.approx(log_likelihood, abs=1e-3)


def test_group_4_has_rusts_usage() -> None:
    assert zurcher_table("4").usage.sum(dim=0).tolist() == [1682, 2555, 55]


def test_each_counted_month_has_one_choice_and_one_usage() -> None:
    fleet = zurcher_table()
    assert len(fleet) == len(set(fleet.bus)) == 104
    assert fleet.choices.sum(dim=(1, 2)).equal(fleet.usage.sum(dim=1))
    assert fleet.choices.sum().item() == 8156
    assert fleet.choices[..., 1].sum().item() == 60


@pytest.mark.parametrize(("groups", "wanted"), [("4", {4}), ("1-3", {1, 2, 3}), (" 1, 3-4", {1, 3, 4}), ("2,2", {2})])
def test_groups_are_selected(groups: str, wanted: set[int]) -> None:
    fleet = zurcher_table(groups)
    assert set(fleet.group) == wanted
    everyone = zurcher_table()
    kept = torch.tensor([group in wanted for group in everyone.group])
    assert fleet.choices.equal(everyone.choices[kept])
    assert fleet.usage.equal(everyone.usage[kept])


@pytest.mark.parametrize("groups", ["", "5", "3-1", "1-", "all", "1;2"])
def test_other_groups_are_refused(groups: str) -> None:
    with pytest.raises(OptionError, match="groups"):
        zurcher_table(groups)


def test_selecting_absent_groups_is_an_error() -> None:
    with pytest.raises(DataError, match=r"there are groups \[4\]"):
        zurcher_table("4").select("1-3")


def test_the_shipped_table_comes_from_the_raw_records(data_folder: Path) -> None:
    derived, shipped = zurcher_raw(data_folder / "zurcher_bus"), zurcher_table()
    assert derived.bus == shipped.bus
    assert derived.group == shipped.group
    assert derived.choices.equal(shipped.choices)
    assert derived.usage.equal(shipped.usage)


def test_months_are_sequences_that_the_conventions_explain(data_folder: Path) -> None:
    months = zurcher_months(data_folder / "zurcher_bus", "3,4")
    for _, bus in months.groupby("bus"):
        assert bus["month"].tolist() == list(range(1, len(bus) + 1))
        state, replaced, usage = (bus[name].to_numpy() for name in ("state", "replaced", "usage"))
        before = np.where(replaced[:-1] == 1, 0, state[:-1])
        # Rounded up after a replacement, the usage is the state it led to or one more.
        assert (usage[1:] - (state[1:] - before) <= replaced[:-1]).all()
        assert (usage[1:] >= state[1:] - before).all()
    assert (~months.duplicated("bus")).sum() == 85


# Rust's format by hand, a bus a column: identity, bought, first and second replacement, first observed, odometer.
def write_fleet(folder: Path, *buses: list[int]) -> Path:
    np.savetxt(folder / "g870.asc", np.array(buses).T, fmt="%d")
    return folder


def a_bus(identity: int, odometer: list[int], first: int = 0, second: int = 0) -> list[int]:
    return [identity, 1, 70, 2, 72, first, 3, 74, second, 1, 70, *odometer]


def test_one_bus_by_hand(tmp_path: Path) -> None:
    odometer = [1_000, 4_000, 9_000, 12_000, 18_000, 18_500]
    # Replaced at 10,000 miles: in the third month, because the fourth is the first to pass it.
    months = zurcher_months(
        write_fleet(tmp_path, a_bus(7, odometer, first=10_000), a_bus(8, [0, 1, 2, 3, 4, 900_000])), "1"
    )
    mine = months[months["bus"] == 7]
    assert mine["state"].tolist() == [0, 1, 0, 1, 1]
    assert mine["replaced"].tolist() == [0, 1, 0, 0, 0]
    # 2,000 miles after the replacement count as one bin, rounded up.
    assert mine["usage"].tolist() == [0, 1, 1, 1, 0]
    assert months[months["bus"] == 8]["state"].tolist() == [0, 0, 0, 0, NUM_STATES - 1]


def test_one_number_a_line_is_a_matrix_column_by_column(tmp_path: Path) -> None:
    buses = [a_bus(identity, list(range(0, 25_000 * identity, 1_000 * identity))) for identity in (1, 2)]
    matrix = write_fleet(tmp_path, *buses)
    expected = zurcher_raw(matrix, "1")
    (tmp_path / "g870.asc").write_text("\n".join(str(number) for bus in buses for number in bus))
    found = zurcher_raw(tmp_path, "1")
    assert found.bus == expected.bus == (1, 2)
    assert found.choices.equal(expected.choices)
    assert found.usage.equal(expected.usage)


@pytest.mark.parametrize(
    ("bus", "complaint"),
    [
        (a_bus(7, [5, 6, 4]), "runs backwards in month 3"),
        (a_bus(7, [5, 6, 8], first=9), "do not pass"),
        (a_bus(7, [5, 6, 8], first=4), "do not pass"),
        (a_bus(7, [5, 9, 19], first=10, second=7), "do not pass in order"),
        (a_bus(7, [5, -6, 8]), "negative"),
        (a_bus(7, [5]), "12 rows"),
    ],
)
def test_a_malformed_bus_is_named(tmp_path: Path, bus: list[int], complaint: str) -> None:
    other = a_bus(8, [1] * (len(bus) - 11))
    with pytest.raises(DataError, match=complaint) as refusal:
        zurcher_raw(write_fleet(tmp_path, bus, other), "1")
    assert "g870.asc" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "0 lines"),
        ("1\n2\n3\n", "multiple of 36"),
        ("1 2\n3\n", "not a matrix"),
        ("one\n", "not a matrix"),
        ("1.5\n" * 36, "fraction"),
        ("1e300\n" * 36, r"above 1e\+09"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "g870.asc").write_text(text)
    with pytest.raises(DataError, match=complaint) as refusal:
        zurcher_raw(tmp_path, "1")
    assert "g870.asc" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rt50\.asc cannot be read"):
        zurcher_raw(tmp_path, "2")


def test_a_bus_that_occurs_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="bus 7 occurs twice"):
        zurcher_raw(write_fleet(tmp_path, a_bus(7, [1, 2]), a_bus(7, [1, 2])), "1")


def test_transition_rows_are_distributions_and_replacing_starts_anew() -> None:
    usage = torch.tensor([2, 5, 3])
    transition = bus_transition(usage, num_states=6)
    torch.testing.assert_close(transition.sum(dim=-1), torch.ones(6, 2, dtype=torch.float64), atol=1e-15, rtol=0.0)
    torch.testing.assert_close(transition[2, 0], torch.tensor([0, 0, 0.2, 0.5, 0.3, 0], dtype=torch.float64))
    torch.testing.assert_close(transition[4, 0], torch.tensor([0, 0, 0, 0, 0.2, 0.8], dtype=torch.float64))
    assert transition[5, 0, 5].item() == pytest.approx(1.0, abs=1e-15)
    assert transition[:, 1].equal(transition[0, 0].expand(6, 6))


@pytest.mark.parametrize("usage", [[0, 0], [1, -1], [1.0, float("nan")]])
def test_impossible_usage_is_refused(usage: list[float]) -> None:
    with pytest.raises(DataError, match="usage counts"):
        bus_transition(torch.tensor(usage))


def test_table_is_independent_of_its_callers() -> None:
    fleet: BusData = zurcher_table("4")
    fleet.choices.zero_()
    assert zurcher_table("4").choices.sum() == 4292
