"""The README's example runs as it stands, and its two commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

from tests.readme import ROOT, python_blocks


def test_the_example_runs(tmp_path: Path) -> None:
    example = next(block for block in python_blocks() if "pirl.fit" in block)
    done = subprocess.run([sys.executable, "-W", "error", "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "posterior.nc").exists()
    assert len(done.stdout.strip("[]\n").split()) == 3


def test_the_comparison_runs(tmp_path: Path) -> None:
    example = next(block for block in python_blocks() if "pirl.fit" in block).replace(
        "num_samples=200", "num_samples=40"
    )
    comparison = next(block for block in python_blocks() if "pirl.compare" in block)
    program = f"{example}\nheld_out = demos[:5]\n{comparison}\nprint(list(table.index))"
    # Of so few draws leave-one-out says that it is not to be trusted.
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "posterior: mean policy" in done.stdout and "truth" in done.stdout


def test_the_example_of_unknown_dynamics_runs(tmp_path: Path) -> None:
    example = next(block for block in python_blocks() if "bayesian_guided_cost" in block)
    program = f"import pirl, pirl.envs, pyro, pyro.distributions as dist, torch\ntorch.manual_seed(0)\n{example}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'partition_trusted': 1" in done.stdout


def test_the_example_of_ones_own_finite_simulator_runs(tmp_path: Path) -> None:
    blocks = python_blocks()
    before = next(block for block in blocks if "def sampled_model" in block).split("# Only reset and step")[0]
    example = next(block for block in blocks if "class Machine" in block)
    imports = "import pirl, pirl.envs, pyro, pyro.distributions as dist, torch\ntorch.manual_seed(0)"
    program = f"{imports}\n{before}\n{example}".replace("num_samples=200", "num_samples=40")
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "weights[1]" in done.stdout and "GuidedPosterior(trusted: " in done.stdout


def test_the_examples_of_vectors_run(tmp_path: Path) -> None:
    wanted = ("GymSimulator", "class Cart", "class Released")
    examples = "\n".join(block for block in python_blocks() if any(word in block for word in wanted))
    imports = "import pirl, pyro, pyro.distributions as dist, torch\ntorch.manual_seed(0)"
    learning = "from pirl.learning import bayesian_guided_cost"
    program = f"{imports}\n{learning}\n{examples}".replace("num_samples=200", "num_samples=40")
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PointEstimate(guided cost: weights[2]" in done.stdout
    assert done.stdout.count("GuidedPosterior(trusted: ") == 2


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    commands = re.findall(r"^    make (\w+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert commands == ["bus", "test"]
    for command in commands:
        subprocess.run(["make", "--dry-run", command], cwd=ROOT, check=True, capture_output=True)


def test_the_example_of_several_subjects_runs() -> None:
    import pandas as pd
    import pyro
    import pyro.distributions as dist

    import pirl
    from pirl.envs import gridworld, gridworld_features
    from pirl.errors import ConvergenceWarning

    example = next(block for block in python_blocks() if "from_dataframe" in block and "pirl.fit" in block)
    mdp, features = gridworld(3, 3, discount=0.9), gridworld_features(3, 3, 3)
    rows = [(s, e, t, 0, 4) for s in ("anna", "bob") for e in range(3) for t in range(4)]
    frame = pd.DataFrame(rows, columns=["subject", "episode", "t", "state", "action"])
    quick = "pirl.fit(model, demos, mdp, features, engine='laplace', num_samples=50, num_prior=20, progress=False, "
    assert "pirl.fit(model, demos, mdp, features, " in example
    names = {"pirl": pirl, "pyro": pyro, "dist": dist, "frame": frame, "mdp": mdp, "features": features}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a Gaussian cannot follow a scale near 0
        exec(example.replace("pirl.fit(model, demos, mdp, features, ", quick), names)
    assert names["posterior"].posterior["offset"].dims == ("chain", "draw", "subject", "feature")


# So short that nothing converges, of which warnings tell.
QUICKLY = """
import pirl

fit = pirl.fit
quick = {"num_chains": 2, "num_warmup": 10, "num_samples": 8, "num_prior": 10, "num_posterior_predictive": 10}
pirl.fit = lambda *args, **options: fit(*args, **{**options, **quick, "progress": False, "device": "cpu"})
"""
LOOK = """
assert repr(machine) == "TabularMDP(states=4, actions=2, discount=0.95, terminal=1)"
assert {"dry", "wet"} <= set(both.log_likelihood.data_vars)
assert lifted.posterior["reward"].shape == last.posterior["reward"].shape == (2, 8, 25)
assert "network_0_weight" in lifted.posterior and "network_0_weight" not in last.posterior
assert posterior.posterior["offset"].dims == ("chain", "draw", "subject", "feature")
"""


def test_the_examples_of_ones_own_problem_network_and_data_run(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    titles = ["An example", "My own decision problem", "My own reward network", "My own demonstrations (a data frame)"]
    blocks = []
    for title in [*titles, "Many GPUs"]:
        (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)^## ", text, flags=re.DOTALL | re.MULTILINE)
        blocks += python_blocks(section)
    program = "\n".join([QUICKLY, *blocks, LOOK])
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Trajectories(2 episodes, 5 decisions) ('anna', 'bob')" in done.stdout
    assert (tmp_path / "posterior.nc").exists()
