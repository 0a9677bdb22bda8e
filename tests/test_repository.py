"""Promises of the repository as a whole: a quiet import, rooms in order, a clean wheel, no trace of one machine."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# An absolute path into a home or a working folder.
MACHINE_PATH = re.compile(r"""(?<![\w.:/~-])/(?:home|root|work|Users|mnt|opt)/[\w.-]""")


def run(*command: str) -> str:
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


# What `import pirl` must leave as it was: what a program can see of torch, NumPy and Pyro.
STATE = """
import random, sys, warnings
import numpy, pyro, pyro.distributions, torch

def state():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "print options": str(torch._tensor_str.PRINT_OPTS),
        "torch generator": torch.random.get_rng_state().tolist(),
        "numpy generator": str(numpy.random.get_state()),
        "python generator": random.getstate(),
        "numpy errors": numpy.geterr(),
        "pyro validation": pyro.settings.get(),
        "torch validation": torch.distributions.Distribution._validate_args,
        "parameters": list(pyro.get_param_store().keys()),
        "warning filters": list(warnings.filters),
    }

before, known = state(), set(sys.modules)
import pirl
after, new = state(), set(sys.modules) - known
changed = [name for name in before if before[name] != after[name]]
heavy = sorted({
    name for name in new
    if name.split(".")[0] in {"arviz", "arviz_base", "arviz_plots", "arviz_stats", "gymnasium", "h5netcdf",
                              "matplotlib", "pandas", "rich", "scipy", "typer", "xarray"}
})
print(f"changed {changed}, heavy {heavy[:5]}")
"""


def test_importing_pirl_changes_nothing_and_stays_light() -> None:
    assert run(sys.executable, "-W", "error", "-c", STATE) == "changed [], heavy []\n"


# Every room and engine is there by its name after `import pirl`, and is imported no sooner than that.
ROOMS = """
import sys
import pirl
engines = [name for name in ("nuts", "smc", "svi", "laplace") if f"pirl.infer.{name}" in sys.modules]
loaded = {"pirl.plots", "pirl.cli", "matplotlib"} & set(sys.modules)
rooms = [name for name in dir(pirl) if not name.startswith("_")]
absent = [name for name in rooms if not hasattr(pirl, name)]
assert pirl.plots.plot_recovery and pirl.learning and pirl.datasets.simulate and pirl.linear_gaussian
print(f"too soon {engines}, {loaded}, absent {absent}, {callable(pirl.compare)}, {'grid_control' in rooms}")
print([getattr(pirl.infer, name).run.__name__ for name in pirl.infer.ENGINES if name in dir(pirl.infer)])
for module, name in ((pirl, "plot"), (pirl, "data"), (pirl, "_rooms_"), (pirl.infer, "metropolis")):
    try:
        print(getattr(module, name))
    except AttributeError as error:
        print(error)
"""


def test_rooms_and_engines_are_there_by_name_once_asked_for() -> None:
    assert run(sys.executable, "-c", ROOMS).splitlines() == [
        "too soon [], set(), absent [], True, True",
        "['run', 'run', 'run', 'run', 'run']",
        "module 'pirl' has no attribute 'plot'",
        "module 'pirl' has no attribute 'data'",
        "module 'pirl' has no attribute '_rooms_'",
        "module 'pirl.infer' has no attribute 'metropolis'",
    ]


def test_rooms_import_only_rooms_below_them() -> None:
    pytest.importorskip("importlinter")
    assert "0 broken" in run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache")


def test_the_wheel_holds_the_library_and_its_tables_only(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"pirl"}
    shipped = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "pirl").rglob("*") if path.suffix in {".py", ".csv"}
    }
    assert {"pirl/py.typed", "pirl/data/zurcher_choices.csv", "pirl/data/zurcher_usage.csv"} | shipped <= set(names)


def test_no_text_names_a_path_of_one_machine() -> None:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    paths = [ROOT / name for name in listed.split("\0") if name]
    assert len(paths) > 20
    for path in paths:
        if path.suffix in {".png", ".nc", ".npz"} or not path.is_file():
            continue
        found = MACHINE_PATH.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(ROOT)} names {found[0]}..."


def test_the_readme_has_the_two_commands_that_run() -> None:
    commands = re.findall(r"^    (make \w+)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert commands == ["make bus", "make test"]
    assert re.search(r"^make test\b", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for command in commands:
        # Prints what it would do; fails where a target is missing.
        run(*command.split(), "--dry-run")


def test_published_ranges_admit_the_constraints() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    import tomllib

    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in map(requirements.Requirement, asked):
        if requirement.name == "pirl" or (
            requirement.marker and not requirement.marker.evaluate({"python_version": "3.11"})
        ):
            continue
        pinned = pins[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(pinned), f"{requirement} does not admit {pinned}"
