"""pyproject.toml, the requirements files, the checks before a commit and the workflow agree with each other."""

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest installs it where Python has no tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]


def requirements(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return sorted(line for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize(
    "name, groups",
    [("requirements.txt", ["test"]), ("requirements-extra.txt", ["tensorboard", "bpe", "hf", "plot", "play", "dev"])],
)
def test_requirements_mirror_pyproject(name, groups):
    wanted = PROJECT["dependencies"] if name == "requirements.txt" else []
    wanted = wanted + [line for group in groups for line in PROJECT["optional-dependencies"][group]]
    assert requirements(name) == sorted(wanted)


def test_every_extra_is_in_a_requirements_file():
    assert set(PROJECT["optional-dependencies"]) == {"test", "tensorboard", "bpe", "hf", "plot", "play", "dev"}


def test_the_oldest_python_is_the_same_everywhere():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert PYPROJECT["tool"]["basedpyright"]["pythonVersion"] == oldest


def test_the_commit_checks_are_among_ci_s():
    """What passes in CI passes before a commit, and the other way round."""
    yaml = pytest.importorskip("yaml")
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repo["repo"] == "local"  # no code from elsewhere runs before a commit
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for hook in repo["hooks"]:
        command = hook["entry"].removesuffix(" --force-exclude")
        assert any(line.startswith(command) for line in script), command


def test_the_workflow_tries_the_oldest_python_and_torch():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert all(job["timeout-minutes"] <= 30 for job in workflow["jobs"].values())
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    (torch,) = [line for line in PROJECT["dependencies"] if line.startswith("torch")]
    assert f"torch=={re.search(r'>=([0-9.]+)', torch)[1]}.*" in matrix["torch"]
    assert "torch" in matrix["torch"]  # and the newest, whatever the upper bound says
    assert PROJECT["requires-python"].removeprefix(">=") in matrix["python"]
    steps = workflow["jobs"]["style"]["steps"]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert all(step["run"] in script for step in steps if "run" in step and "pip" not in step["run"])
