"""The Ray engine on a local Ray: the same pictures from the same worker code."""

import os

import numpy as np
import pytest
from batch_forge import ROWS, SETTINGS, fast_pipe
from PIL import Image

from diffaccel.batch import BatchError, BatchSettings, plan_batch, run_batch
from diffaccel.batch.manifest import read_manifest
from diffaccel.errors import DiffaccelError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::Warning"),  # Ray's own, of many kinds
]


@pytest.fixture
def local_ray(monkeypatch):
    import ray

    here = os.path.dirname(__file__)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    environment = {"PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)]), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment}, address="local"
    )
    yield ray
    ray.shutdown()


def pictures(folder):
    return {path.name: np.asarray(Image.open(path).copy()) for path in sorted(folder.glob("*.png"))}


def no_pipe():
    raise DiffaccelError("There is no such model.")


@pytest.mark.usefixtures("local_ray")
def test_ray_makes_the_same_pictures(tmp_path):
    from diffaccel.batch.ray_engine import run_on_ray

    settings = BatchSettings(**SETTINGS)
    rows = [{**row, "name": f"{number}"} for number, row in enumerate(ROWS)]
    assert run_batch(plan_batch(rows, tmp_path / "here", settings), fast_pipe()).exit_code == 0
    plan = plan_batch(rows, tmp_path / "ray", settings)
    seen = []
    report = run_on_ray(plan, fast_pipe, actors=1, model="tiny", on_progress=seen.append)
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert len(seen) > 1  # also while it runs
    assert (seen[-1].done, seen[-1].total) == (8, 8)
    assert (report.done, report.made, report.skipped, report.exit_code) == (8, 8, 0, 0)
    here, there = pictures(tmp_path / "here"), pictures(tmp_path / "ray")
    assert set(here) == set(there)
    assert all(np.array_equal(here[name], there[name]) for name in here)
    assert {entry["model"] for entry in read_manifest(tmp_path / "ray" / "manifest.jsonl")} == {"tiny"}
    again = run_batch(plan_batch(rows, tmp_path / "ray", settings), fast_pipe())
    assert (again.made, again.skipped) == (0, 8)  # one engine continues what the other began
    wrong = [{"prompt": "x"}, {"prompt": "x", "width": 17, "height": 16}, {"prompt": "x", "clip_skip": "a"}]
    refusing = plan_batch(wrong, tmp_path / "wrong", settings)
    with pytest.raises(BatchError, match="2 problems in the list") as refused:
        run_on_ray(refusing, fast_pipe)
    assert [problem.row for problem in refused.value.problems] == [2, 3]
    with pytest.raises(BatchError, match=r"^There is no such model\.$"):
        run_on_ray(plan_batch(rows, tmp_path / "none", settings), no_pipe)


def test_a_missing_ray_is_one_sentence(tmp_path, monkeypatch):
    import sys

    from diffaccel.batch.ray_engine import run_on_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BatchError, match=r"install diffaccel\[ray\]"):
        run_on_ray(plan_batch(ROWS, tmp_path, BatchSettings()), fast_pipe)
