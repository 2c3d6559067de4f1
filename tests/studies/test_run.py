"""Running a study on this machine: everything that can happen to a run, and to the study."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest
import toy_runs
import yaml
from forked import python

from transformer_vq import files
from transformer_vq.cli import run as command
from transformer_vq.config import ConfigError
from transformer_vq.files import lock
from transformer_vq.studies.engines import Slot, _environment, slots
from transformer_vq.studies.execute import ending
from transformer_vq.studies.folder import read_status
from transformer_vq.studies.plan import load_study
from transformer_vq.studies.run import choose, metric_of, run_study, state_of
from transformer_vq.studies.trial import estimate

ESTIMATOR = "model.quantizer.estimator"


def runs_of(study):
    return study.final_runs({arm.name: {} for arm in study.design.arms})


def calls(run):
    path = run.folder / "calls.txt"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_runs_everything_once_and_then_nothing(write_toy):
    study, said = load_study(write_toy()), []
    assert run_study(study, say=said.append) == {"done": 4}
    assert [line.partition(":")[0] for line in said[:1]] == ["runs"] and len(said) == 5
    assert run_study(study, say=said.append) == {"done": 4}
    assert [calls(run) for run in runs_of(study)] == [1, 1, 1, 1]
    assert said[-1] == "runs: 4, of which 4 are finished"
    status = read_status(runs_of(study)[0].folder)
    assert {"state", "seconds", "started", "versions", "hardware", "commit", "command"} <= status.keys()
    assert "a toy run" in (runs_of(study)[0].folder / "log.txt").read_text()


def test_every_way_to_fail_is_recorded_and_the_rest_goes_on(write_toy):
    study = load_study(write_toy("ste", "diverges", "eats_memory", "is_broken", "dies", seeds=[0]))
    states = run_study(study, at_once=2, say=lambda text: None)
    assert states == {"done": 1, "diverged": 1, "out_of_memory": 1, "failed": 1, "killed": 1}
    errors = {run.arm: read_status(run.folder)["error"] for run in runs_of(study)}
    assert errors["diverges"] == "TrainingDiverged: loss is nan at step 7"
    assert errors["is_broken"] == "RuntimeError: a bug of two lines"
    assert errors["dies"] == "the worker was killed by signal 9; out of memory?"
    assert (
        "Traceback"
        in next(run.folder for run in runs_of(study) if run.arm == "is_broken").joinpath("log.txt").read_text()
    )


def test_a_diverged_run_is_a_result_and_others_are_tried_again(write_toy):
    study = load_study(write_toy("diverges", "is_broken", "dies_once", seeds=[0]))
    assert run_study(study, say=lambda text: None) == {"diverged": 1, "failed": 1, "killed": 1}
    assert run_study(study, say=lambda text: None) == {"diverged": 1, "failed": 1, "done": 1}
    assert [calls(run) for run in runs_of(study)] == [1, 2, 2]


def test_one_configuration_of_two_levels_runs_once(write_toy):
    each = {"model.per_layer": {"all": {"estimator": "rotation"}}}
    variants = {"default": {"model.quantizer.estimator": "rotation"}, "each": each}
    study = load_study(write_toy(factors={}, variants=variants, seeds=[0]))
    assert run_study(study, at_once=2, say=lambda text: None) == {"done": 1}
    assert sum(calls(run) for run in runs_of(study)[:1]) == 1
    assert len(list(study.folder.glob("*/summary.json"))) == 1


def test_more_seeds_later_run_only_what_is_new(write_toy):
    run_study(load_study(write_toy()), say=lambda text: None)
    study = load_study(write_toy("ste", "rotation", "scale", seeds=[0, 1, 2]))
    assert run_study(study, say=lambda text: None) == {"done": 9}
    assert {calls(run) for run in runs_of(study)} == {1}


def test_tuning_chooses_on_valid_and_compares_with_fresh_seeds(write_toy):
    path = write_toy("ste", "diverges", tune={"train.lr": [0.001, 0.01, 0.013]}, tune_seeds=[7, 8], seeds=[0, 1])
    study, said = load_study(path), []
    assert run_study(study, say=said.append) == {"done": 6 + 2, "diverged": 6}
    chosen = choose(study, study.tuning_runs())
    assert chosen == {"ste": {"train.lr": 0.013}, "diverges": None}
    final = study.final_runs(chosen)
    assert [(run.seed, run.settings.train.lr) for run in final] == [(0, 0.013), (1, 0.013)]
    assert any("diverges: no tuned value" in line for line in said)


def test_another_study_in_the_folder_is_refused(write_toy):
    run_study(load_study(write_toy(seeds=[0])), say=lambda text: None)
    with pytest.raises(ConfigError, match=r"holds another study.*factors"):
        run_study(load_study(write_toy(factors={"train.lr": [0.1, 0.2]})))


def test_the_primary_comparison_is_fixed_once_runs_exist(write_toy):
    def primary(estimator):
        return write_toy("ste", "rotation", "scale", seeds=[0], primary={"levels": {ESTIMATOR: estimator}})

    run_study(load_study(primary("rotation")), say=lambda text: None)
    with pytest.raises(ConfigError, match=r"primary\.levels\.model\.quantizer\.estimator: rotation -> scale"):
        run_study(load_study(primary("scale")))


def test_a_folder_in_use_is_refused_by_name(write_toy):
    study = load_study(write_toy())
    with lock(study.folder / ".lock"):
        (study.folder / ".holder").write_text("123 on here")
        with pytest.raises(ConfigError, match="a study is being run there, by process 123 on here"):
            run_study(study)


def test_a_folder_that_is_a_run_is_refused(write_toy, tmp_path):
    toy_runs.run(load_study(write_toy()).final_runs({"ste": {}, "rotation": {}})[0].settings)
    run_dir = next((tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match="is the folder of a run"):
        run_study(load_study(write_toy(run_dir=str(run_dir))))


def test_a_tampered_run_is_refused(write_toy):
    study = load_study(write_toy(seeds=[0]))
    run_study(study, say=lambda text: None)
    path = runs_of(study)[0].folder / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.01", "lr: 0.02"))
    with pytest.raises(ConfigError, match="holds another configuration than its name says"):
        run_study(study)


SCRIPT = """
import sys
from transformer_vq.studies import kinds
from transformer_vq.studies.plan import load_study
from transformer_vq.studies.run import run_study
if __name__ == "__main__":
    kinds.KINDS["model"] = kinds.Kind("transformer_vq.config:RunConfig", "toy_runs:run", "train")
    run_study(load_study(sys.argv[1]), at_once=2)
"""


def start(path, tmp_path, **environment):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = f"{Path(toy_runs.__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return python(str(script), str(path), output=tmp_path / "output", PYTHONPATH=paths, **environment)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.05)


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_a_killed_study_takes_its_workers_along_and_goes_on_later(write_toy, tmp_path):
    path = write_toy("sleeps", "ste", seeds=[0])
    study = load_study(path)
    sleeping, quick = runs_of(study)
    process = start(path, tmp_path)
    wait_until(lambda: calls(sleeping) and (quick.folder / "summary.json").is_file())
    worker = int((sleeping.folder / "calls.txt").read_text())
    process.kill()
    process.join()
    assert state_of(sleeping) == "running"
    second = start(path, tmp_path, TOY_SLEEP="0")
    second.join(60)
    assert second.exitcode == 0
    assert not alive(worker)
    assert (state_of(sleeping), calls(sleeping), calls(quick)) == ("done", 2, 1)


def test_endings_of_a_run():
    from torch import OutOfMemoryError

    from transformer_vq.training.loop import TrainingDiverged, TrainingInterrupted

    allocator = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    errors = [None, TrainingDiverged(), TrainingInterrupted(), MemoryError(), OutOfMemoryError(), allocator]
    assert [ending(e) for e in errors] == ["done", "diverged", "interrupted", *["out_of_memory"] * 3]
    assert [ending(e) for e in (ValueError(), ConfigError(), KeyboardInterrupt())] == [
        "failed",
        "failed",
        "interrupted",
    ]


def test_submitit_runs_here_where_there_is_no_slurm(write_toy):
    submitit = {"cluster": "local", "timeout_min": 5}
    study = load_study(write_toy("ste", "is_broken", "diverges", seeds=[0], engine={"submitit": submitit}))
    assert run_study(study, at_once=3, engine="submitit", say=lambda text: None) == {
        "done": 1, "failed": 1, "diverged": 1
    }  # fmt: skip


@pytest.mark.slow
def test_eight_tiny_runs_on_a_local_ray_cluster(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("HOME", str(tmp_path))  # ray writes a token there
    study = {
        "question": "Which?",
        "base": "lm/study-tiny",
        "run_dir": str(tmp_path / "out"),
        "overrides": {"data.cache": str(tmp_path / "cache"), "train.steps": 4, "eval.every": None},
        "factors": {ESTIMATOR: ["ste", "rotation"]},
        "seeds": [0, 1, 2, 3],
        "engine": {"ray": {"num_cpus": 1}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    loaded = load_study(tmp_path / "study.yaml")
    assert run_study(loaded, at_once=2, engine="ray") == {"done": 8}
    assert all(math.isfinite(metric_of(run, "test", "bits_per_byte")) for run in runs_of(loaded))


def test_cores_are_shared_out():
    cores = len(os.sched_getaffinity(0))
    assert sorted(core for slot in slots(cores) for core in slot.cores) == sorted(os.sched_getaffinity(0))
    assert len(slots(cores + 3)) == cores + 3 and all(slot.cores for slot in slots(cores + 3))


def test_a_trial_measures_and_leaves_nothing(write_toy):
    study = load_study(write_toy())
    result = estimate(study)
    assert result.tried == ["ste", "rotation"] and result.seconds > 0
    assert not study.folder.exists()
    run_study(study, say=lambda text: None)
    assert estimate(study).seconds == 0


def test_a_trial_that_fails_says_why(write_toy):
    study = load_study(write_toy("is_broken"))
    with pytest.raises(ConfigError, match="a trial of is_broken ended: failed; RuntimeError: a bug"):
        estimate(study)


def test_a_metric_that_is_missing_or_not_finite_is_nan(write_toy):
    study = load_study(write_toy(seeds=[0]))
    run_study(study, say=lambda text: None)
    run = runs_of(study)[0]
    assert metric_of(run, "test", "bits_per_byte") == pytest.approx(2, abs=0.2)
    by_layer = [metric_of(run, "test", f"layer{i}/usage") for i in (0, 1)]
    assert metric_of(run, "test", "layers/usage") == pytest.approx(sum(by_layer) / 2)
    assert math.isnan(metric_of(run, "test", "layers/nothing"))
    (run.folder / "summary.json").write_text(json.dumps({"test": {"bits_per_byte": None}}))
    assert math.isnan(metric_of(run, "test", "bits_per_byte"))


@pytest.mark.parametrize(("wish", "threads"), [(None, "3"), ("1", "1")])
def test_a_worker_has_a_thread_a_core_unless_the_user_says_otherwise(monkeypatch, wish, threads):
    if wish is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
    with _environment(Slot([0, 1, 2], None)):
        assert os.environ["OMP_NUM_THREADS"] == threads
    assert os.environ.get("OMP_NUM_THREADS") == wish


def test_a_full_disk_is_one_line(write_toy, monkeypatch, capsys):
    """Of the study's own files, and of a report's tables and pictures."""
    path = str(write_toy(seeds=[0]))
    assert command(["study", "run", path, "--jobs", "1"]) == 0
    flush = files.flush
    for name, verb in (("study.yaml", "run"), ("runs.parquet", "report"), (".png", "report"), ("report.md", "report")):
        capsys.readouterr()
        with monkeypatch.context() as patched:
            patched.setattr(files, "flush", lambda place, name=name: full(place, name) or flush(place))
            assert command(["study", verb, path]) == 1
        assert f"{name}: cannot be written: No space left on device" in one_line(capsys)


def test_a_worker_on_a_full_disk_is_one_line(write_toy, full_disk, capfd):
    """Not even the status of a run can be kept."""
    path = str(write_toy(seeds=[0], run_dir=str(full_disk / "out")))
    (full_disk / "out").mkdir()
    (full_disk / "rest").write_bytes(bytes(3 * 2**20 - 4 * 4096))
    assert command(["study", "run", path, "--jobs", "1"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and "No space left on device" in line


def full(place: Path, name: str) -> None:
    if place.name.endswith(name):
        raise OSError(28, "No space left on device")


def one_line(capsys) -> str:
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    return line
