"""Demonstrations: ragged, padded, cut, and as other people write them."""

from __future__ import annotations

import copy
import cProfile
import pickle
import pstats
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pirl
from pirl import envs
from pirl.errors import EmptyTrajectoriesWarning, HorizonError, InvalidTrajectoriesError
from pirl.trajectories import Trajectories
from tests import oracle

STATES = [[0, 1, 2], [2, 2, 1, 0], [1]]
ACTIONS = [[1, 0], [0, 1, 0], []]
TABLE = [
    [[0, 1], [1, 0], [2, -1], [-1, -1]],
    [[2, 0], [2, 1], [1, 0], [0, -1]],
    [[1, -1], [-1, -1], [-1, -1], [-1, -1]],
]


def ragged(**options: Any) -> Trajectories:
    return Trajectories(STATES, ACTIONS, **options)


# ------------------------------------------------------------------------------------------------ one table


def test_ragged_episodes_are_padded() -> None:
    demos = ragged()
    assert demos.as_tensor().tolist() == TABLE
    assert demos.as_tensor().dtype == torch.int64
    assert demos.lengths.tolist() == [2, 3, 0]
    assert demos.starts.tolist() == [0, 2, 1]
    assert demos.ends == ("truncated",) * 3
    assert demos.states.shape == (3, 4) and demos.actions.shape == (3, 3)
    assert (len(demos), repr(demos)) == (3, "Trajectories(3 episodes, 5 decisions)")


@pytest.mark.parametrize("convert", [np.array, torch.tensor, tuple, lambda row: np.array(row, dtype=np.float64)])
def test_rows_may_be_of_any_kind(convert: Any) -> None:
    demos = Trajectories([convert(row) for row in STATES], tuple(convert(row) for row in ACTIONS))
    assert demos.as_tensor().tolist() == TABLE


def test_padded_tables_mean_the_same_as_ragged_lists() -> None:
    states = torch.tensor([[0, 1, 2, -1], [2, 2, 1, 0], [1, -1, -1, -1]])
    actions = torch.tensor([[1, 0, -1], [0, 1, 0], [-1, -1, -1]])
    assert Trajectories(states, actions).as_tensor().tolist() == TABLE
    assert Trajectories(states.numpy().astype(np.int32), actions.numpy()).as_tensor().tolist() == TABLE
    # With lengths, what follows an episode may be anything.
    junk = Trajectories(states.masked_fill(states < 0, 9), actions.masked_fill(actions < 0, 9), lengths=[2, 3, 0])
    assert junk.as_tensor().tolist() == TABLE
    # A padding wider than the longest episode is dropped.
    wide = Trajectories(torch.nn.functional.pad(states, (0, 3)), torch.nn.functional.pad(actions, (0, 3), value=-1))
    assert wide.as_tensor().tolist() == TABLE


def test_without_last_states_the_last_state_is_not_observed() -> None:
    demos = Trajectories(torch.tensor([[0, 1], [2, 2]]), torch.tensor([[1, 0], [0, -1]]))
    # The second episode has one decision, so its second state is the one after it.
    assert demos.as_tensor().tolist() == [[[0, 1], [1, 0], [-1, -1]], [[2, 0], [2, -1], [-1, -1]]]
    assert Trajectories([[0, 1], [2]], [[1, 0], [0]]).states.tolist() == [[0, 1, -1], [2, -1, -1]]


def test_the_tensor_is_always_the_same_object() -> None:
    demos = ragged()
    assert demos.as_tensor() is demos.as_tensor()
    assert demos.to("cpu") is demos and demos.to(dtype=torch.float32) is demos
    assert demos.unobserved().as_tensor() is None
    first = demos[:2]
    assert first.as_tensor() is first.as_tensor()


def test_a_pickle_keeps_everything() -> None:
    demos = ragged(ends=["truncated", "horizon", "truncated"], subjects=[0, 1, 1], subject_names=["ann", "bob"])
    for other in (pickle.loads(pickle.dumps(demos)), copy.deepcopy(demos)):
        assert other.as_tensor().equal(demos.as_tensor()) and other.lengths.equal(demos.lengths)
        assert other.horizons.equal(demos.horizons) and other.subjects.equal(demos.subjects)
        assert (other.ends, other.subject_names) == (demos.ends, demos.subject_names)


def test_unobserved_episodes_keep_what_was_designed_and_nothing_that_was_seen() -> None:
    demos = ragged(horizons=[4, 3, 1], subjects=[0, 1, 1])
    blind = demos.unobserved()
    assert blind.lengths.equal(demos.lengths) and blind.starts.equal(demos.starts)
    assert blind.horizons.equal(demos.horizons) and blind.subjects.equal(demos.subjects)
    assert len(blind) == 3 and repr(blind) == repr(demos)
    for seen in ("states", "actions"):
        with pytest.raises(InvalidTrajectoriesError, match="unobserved"):
            getattr(blind, seen)
    assert blind[1:].as_tensor() is None
    assert demos.as_tensor() is not None


# ------------------------------------------------------------------------------------------------ subsets


@pytest.mark.parametrize(
    ("index", "chosen"),
    [
        (slice(1, None), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([2, 0], [2, 0]),
        ([True, False, True], [0, 2]),
        (torch.tensor([False, True, True]), [1, 2]),
        (np.array([2, 2]), [2, 2]),
        (1, [1]),
        (-1, [2]),
    ],
)
def test_a_subset_is_what_those_episodes_alone_would_be(index: Any, chosen: list[int]) -> None:
    ends = ["horizon", "truncated", "terminated"]
    subset = ragged(ends=ends, horizons=[5, -1, -1], subjects=[0, 1, 2])[index]
    alone = Trajectories(
        [STATES[i] for i in chosen], [ACTIONS[i] for i in chosen], ends=[ends[i] for i in chosen],
        horizons=[[5, -1, -1][i] for i in chosen], subjects=chosen,
    )  # fmt: skip
    assert subset.as_tensor().equal(alone.as_tensor())
    assert subset.as_tensor().is_contiguous()
    assert subset.ends == alone.ends and subset.starts.equal(alone.starts)
    assert subset.lengths.equal(alone.lengths) and subset.subjects.equal(alone.subjects)
    assert subset.horizons.tolist() == [[5, -1, -1][i] for i in chosen]
    assert subset.limits.equal(alone.limits) and subset.unobserved().lengths.equal(alone.unobserved().lengths)


def test_limits_that_were_given_stay() -> None:
    demos = ragged(ends=["truncated", "truncated", "terminated"], limits=[7, 8, 9])
    for other in (demos[1:], demos.unobserved()[1:], pickle.loads(pickle.dumps(demos))[1:]):
        assert other.limits.tolist() == other.unobserved().lengths.tolist() == [8, 9]
    with pytest.raises(InvalidTrajectoriesError, match="trajectory 1 has 3 decisions, more than its limit 2"):
        ragged(limits=[7, 2, 9])


@pytest.mark.parametrize("index", [slice(0), [], torch.zeros(3, dtype=torch.bool)])
def test_an_empty_subset_is_blank_and_warns(index: Any) -> None:
    with pytest.warns(EmptyTrajectoriesWarning, match="prior"):
        blank = ragged()[index]
    assert blank.as_tensor().tolist() == [[[-1, -1]]]
    assert blank.lengths.tolist() == [0]


# ------------------------------------------------------------------------------------------------ how episodes end


def test_an_end_may_be_given_for_all_or_for_each() -> None:
    assert ragged(ends="terminated").ends == ("terminated",) * 3
    assert ragged().horizons is None
    known = ragged(ends=["truncated", "horizon", "horizon"])
    assert known.horizons.tolist() == [-1, 3, 0]
    # A horizon that was known, though nobody watched to the end; -1 where the problem's own counts.
    assert ragged(horizons=[6, -1, 2]).horizons.tolist() == [6, -1, 2]
    assert ragged(ends=["horizon"] * 3, horizons=[6, -1, -1]).horizons.tolist() == [6, 3, 0]
    assert ragged(horizons=[-1, -1, -1]).horizons is None


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"ends": ["truncated"] * 2}, InvalidTrajectoriesError, "one for each episode"),
        ({"horizons": [6, 2, 2]}, HorizonError, "trajectory 1 has 3 decisions, more than its horizon 2"),
        ({"horizons": [6, 6]}, InvalidTrajectoriesError, "horizons has 2 entries for 3 episodes"),
        ({"subjects": [0, -3, 0]}, InvalidTrajectoriesError, "trajectory 1 has subject -3: .* 0, 1"),
        ({"subjects": [0, 0, 7], "subject_names": ["ann"]}, InvalidTrajectoriesError, "has subject 7: .* 1 sub"),
        ({"subjects": [0]}, InvalidTrajectoriesError, "subjects has 1 entries for 3 episodes"),
        ({"lengths": [2, 3, 1, 0]}, InvalidTrajectoriesError, "lengths has 4 entries"),
        ({"lengths": [2, 4, 0]}, InvalidTrajectoriesError, "between 0 and 3"),
        ({"lengths": [2, 3, -1]}, InvalidTrajectoriesError, "between 0 and 3"),
        ({"lengths": [2, 3, 1]}, InvalidTrajectoriesError, "trajectory 2, step 0: the action"),
    ],
)
def test_ends_that_do_not_fit_are_refused(options: dict, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        ragged(**options)


def test_a_terminated_episode_shows_its_terminal_state() -> None:
    mdp = oracle.random_mdp(0, states=3, actions=2, terminal=[2])
    table = mdp.transition
    following = int(table[0, 1].argmax())
    for last, right in ((following, bool(mdp.terminal[following])), (2, True)):
        demos = Trajectories([[0, last]], [[int(table[0, :, last].argmax())]], ends="terminated")
        if right:
            demos.validate(mdp)
            continue
        with pytest.raises(InvalidTrajectoriesError, match=f"trajectory 0 ends 'terminated', .* state {last} is not"):
            demos.validate(mdp)
    with pytest.raises(InvalidTrajectoriesError, match="without its last state"):
        Trajectories([[0]], [[1]], ends="terminated").validate(mdp)


def test_constant_data_has_a_column_for_each_thing_known() -> None:
    assert set(ragged().constant_data()) == {"length"}
    data = ragged(ends="horizon", subjects=[1, 0, 0]).constant_data()
    assert {name: values.tolist() for name, (_, values) in data.items()} == {
        "length": [2, 3, 0], "own_horizon": [2, 3, 0], "subject": [1, 0, 0],
    }  # fmt: skip
    assert all(dims == ("episode",) for dims, _ in data.values())


# ------------------------------------------------------------------------------------------------ data frames


def frame(**columns: Any) -> Any:
    import pandas as pd

    return pd.DataFrame(columns)


def test_a_data_frame_in_any_order() -> None:
    rows = [("bob", 2, t, s, a) for t, (s, a) in enumerate(zip(STATES[1], [*ACTIONS[1], None], strict=True))]
    rows += [("ann", 7, t, s, a) for t, (s, a) in enumerate(zip(STATES[0], [*ACTIONS[0], None], strict=True))]
    rows += [("bob", 1, 5, 1, None)]
    order = torch.randperm(len(rows)).tolist()
    columns = ["subject", "episode", "t", "state", "action"]
    data = frame(**{name: [rows[i][k] for i in order] for k, name in enumerate(columns)})
    demos = Trajectories.from_dataframe(data)
    # Sorted by subject, then by episode.
    assert demos.as_tensor().tolist() == [TABLE[0], TABLE[2], TABLE[1]]
    assert (demos.subject_names, demos.subjects.tolist()) == (("ann", "bob"), [0, 1, 1])
    alone = Trajectories.from_dataframe(data[data.subject == "ann"], subject=None)
    assert alone.subjects is None and alone.as_tensor().tolist() == [TABLE[0][:3]]
    renamed = data.rename(columns={"subject": "who", "episode": "run", "t": "time", "state": "s", "action": "a"})
    names = {"subject": "who", "episode": "run", "t": "time", "state": "s", "action": "a"}
    other = Trajectories.from_dataframe(renamed, **names, ends="horizon")
    assert other.as_tensor().equal(demos.as_tensor()) and other.horizons.tolist() == [2, 0, 3]


def test_a_data_frame_without_last_states() -> None:
    demos = Trajectories.from_dataframe(frame(episode=[0, 0, 1], t=[0, 1, 0], state=[4, 5, 6], action=[1, 0, 1]))
    assert demos.as_tensor().tolist() == [[[4, 1], [5, 0], [-1, -1]], [[6, 1], [-1, -1], [-1, -1]]]
    assert demos.subjects is None


def test_a_long_data_frame_is_read_at_once() -> None:
    """Not by the episode: the number of calls of pandas does not grow with that of episodes."""

    def read(count: int) -> tuple[Trajectories, int]:
        rows = np.arange(count * steps)
        data = frame(
            subject=[f"s{i:04d}" for i in rows // steps], episode=rows // steps, number=rows % steps,
            state=rows % 7, action=np.where(rows % steps == steps - 1, np.nan, rows % 3),
        ).sample(frac=1.0, random_state=0)  # fmt: skip
        with cProfile.Profile() as profile:
            demos = Trajectories.from_dataframe(data, t="number")
        calls = pstats.Stats(profile).stats  # type: ignore[attr-defined]
        return demos, sum(number for (file, *_), (_, number, *_) in calls.items() if "pandas" in file)

    count, steps = 600, 6
    rows = np.arange(count * steps)
    demos, calls = read(count)
    assert calls < 1.5 * read(60)[1]
    assert demos.states.equal(torch.as_tensor(rows % 7).reshape(count, steps))
    assert demos.actions.equal(torch.as_tensor(rows % 3).reshape(count, steps)[:, :-1])
    assert demos.subjects.tolist() == list(range(count)) and demos.subject_names[-1] == f"s{count - 1:04d}"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"t": [0, 1, 1]}, r"episode .*0.* has two rows with the same 't'"),
        ({"action": [0, None, 1]}, "missing action before its last row"),
        ({"state": [0, 1.5, 2]}, r"states\[0\] must be whole numbers"),
        ({"state": [0, None, 2]}, "column 'state' has missing entries"),
        ({"state": ["a", "b", "c"]}, r"column 'state' has text \('a'\): number it first"),
        ({"episode": [0, None, 0]}, "column 'episode' has missing entries"),
        ({"t": [0, None, 2]}, "column 't' has missing entries"),
        ({"t": [0, "x", 2]}, "columns episode, t cannot be put in order"),
        ({"t": [0, 1, 3]}, r"episode \(0,\) goes from 't' = 1 to 3: split it there"),
        ({"t": [0, 0, 2], "episode": [1, 0, 0]}, r"episode \(0,\) goes from 't' = 0 to 2: split it there"),
        ({"subject": ["bob", "ann", "bob"]}, r"episode \('bob', 0\) goes from 't' = 0 to 2"),
        ({"subject": ["ann", None, "ann"]}, "column 'subject' has missing entries"),
        ({"action": [0, -1, 1]}, "trajectory 0, step 1: the action is negative or missing"),
    ],
)
def test_data_frames_that_are_not_episodes_are_refused(changes: dict, complaint: str) -> None:
    columns = {"episode": [0, 0, 0], "t": [0, 1, 2], "state": [0, 1, 2], "action": [0, 1, 1]}
    with pytest.raises(InvalidTrajectoriesError, match=complaint):
        Trajectories.from_dataframe(frame(**(columns | changes)))


def test_a_data_frame_without_a_column_says_which() -> None:
    with pytest.raises(InvalidTrajectoriesError, match="no column 'action'; it has episode, t, state"):
        Trajectories.from_dataframe(frame(episode=[0], t=[0], state=[0]))


def test_two_columns_of_one_name_are_refused() -> None:
    data = frame(episode=[0], t=[0], state=[0], action=[0], other=[1]).rename(columns={"other": "state"})
    with pytest.raises(InvalidTrajectoriesError, match="several columns 'state'"):
        Trajectories.from_dataframe(data)


# ------------------------------------------------------------------------------------------------ other libraries


def test_episodes_of_imitation_minari_and_pairs() -> None:
    of_imitation = [
        SimpleNamespace(obs=np.array(s), acts=np.array(a), terminal=done, infos=None)
        for s, a, done in zip(STATES, ACTIONS, (True, False, False), strict=True)
    ]
    of_minari = [
        SimpleNamespace(
            observations=np.array(s), actions=np.array(a, dtype=np.int64), rewards=np.zeros(len(a)),
            terminations=np.arange(len(a)) == len(a) - 1 if i == 0 else np.zeros(max(len(a), 1), dtype=bool),
            truncations=np.zeros(len(a), dtype=bool),
        )
        for i, (s, a) in enumerate(zip(STATES, ACTIONS, strict=True))
    ]  # fmt: skip
    for episodes in (of_imitation, of_minari, iter(of_minari)):
        demos = Trajectories.from_episodes(episodes)
        assert demos.as_tensor().tolist() == TABLE
        assert demos.ends == ("terminated", "truncated", "truncated")
    pairs = Trajectories.from_episodes(list(zip(STATES, ACTIONS, strict=True)))
    assert pairs.as_tensor().tolist() == TABLE and pairs.ends == ("truncated",) * 3


@pytest.mark.parametrize("episode", [3, ([0, 1],), SimpleNamespace(obs=[0, 1]), ([0], [0], [0])])
def test_what_is_no_episode_is_refused(episode: Any) -> None:
    with pytest.raises(InvalidTrajectoriesError, match="episode 1 is an? .*expected"):
        Trajectories.from_episodes([([0, 1], [0]), episode])


def test_continuous_episodes_are_refused() -> None:
    episode = SimpleNamespace(obs=np.zeros((3, 4)), acts=np.zeros(2, dtype=int), terminal=True)
    with pytest.raises(InvalidTrajectoriesError, match=r"states\[0\] must be whole numbers"):
        Trajectories.from_episodes([episode])


def test_rollouts_of_gymnasium_fit_its_own_table() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    env = gymnasium.make("FrozenLake-v1", is_slippery=True)
    env.action_space.seed(0)
    episodes, ended = [], []
    for seed in range(20):
        states, actions, done, cut = [int(env.reset(seed=seed)[0])], [], False, False
        while not (done or cut) and len(actions) < 12:
            actions.append(int(env.action_space.sample()))
            state, _, done, cut, _ = env.step(actions[-1])
            states.append(int(state))
        episodes.append(SimpleNamespace(observations=states, actions=actions, terminations=[done]))
        ended.append(done)
    env.close()
    assert any(ended) and not all(ended)
    demos = Trajectories.from_episodes(episodes)
    assert demos.ends == tuple("terminated" if done else "truncated" for done in ended)
    mdp = envs.from_gymnasium("FrozenLake-v1").mdp
    demos.validate(mdp)
    # What is not choice in their density is the table's chance.
    chance = []
    for episode in episodes:
        path = torch.tensor(episode.observations)
        chance.append(mdp.probability(path[:-1], torch.tensor(episode.actions), path[1:]).log().sum())
    density = pirl.MaxCausalEntTrajectory(mdp, -torch.rand(16, 4, dtype=torch.float64), lengths=demos.lengths)
    moved = density.log_prob(demos.as_tensor()) - density.choice_log_prob(demos.as_tensor())
    torch.testing.assert_close(moved, torch.stack(chance) + mdp.initial[demos.starts].log(), rtol=1e-12, atol=1e-12)


def test_a_minari_dataset() -> None:
    data = pytest.importorskip("minari.dataset.episode_data")
    episodes = [
        data.EpisodeData(
            id=i, observations=np.array(s), actions=np.array(a), rewards=np.zeros(len(a)),
            terminations=np.array([False, i == 0]), truncations=np.array([False, i != 0]), infos={},
        )
        for i, (s, a) in enumerate([([0, 1, 2], [1, 0]), ([2, 1, 1], [0, 1])])
    ]  # fmt: skip
    demos = Trajectories.from_episodes(episodes)
    assert demos.as_tensor().tolist() == [[[0, 1], [1, 0], [2, -1]], [[2, 0], [1, 1], [1, -1]]]
    assert demos.ends == ("terminated", "truncated")


def test_data_frames_of_text_are_told_to_be_numbered() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"episode": [0, 0], "t": [0, 1], "state": [0, 1], "action": ["stay", None]})
    with pytest.raises(InvalidTrajectoriesError, match=r"column 'action' has text \('stay'\): number it first"):
        Trajectories.from_dataframe(frame)
    with pytest.raises(InvalidTrajectoriesError, match="not a data frame"):
        Trajectories.from_dataframe([1, 2])
