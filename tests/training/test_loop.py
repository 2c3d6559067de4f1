"""The loop on a task that is not a language model: exact resume, stops, records, and what may be written where."""

import signal

import accelerate.state
import pytest
import torch
from helpers import assert_same
from toy_task import ToyTask, interrupt_at, records, toy_config, train_toy, weights

from transformer_vq.config import ConfigError
from transformer_vq.training import CheckpointError, Losses, Player, TrainingDiverged, TrainingInterrupted, train


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_resumed_equals_straight_bit_for_bit(tmp_path, monkeypatch, optimizer):
    settings = {"optimizer": optimizer, "micro_batch": 2, "weight_decay": 0.1, "eval": {"every": 5}}
    straight, stopped = toy_config(tmp_path / "straight", **settings), toy_config(tmp_path / "stopped", **settings)
    want = train_toy(straight, dropout=0.5)
    interrupt_at(monkeypatch, 9)
    with pytest.raises(TrainingInterrupted, match=r"after step 10 of 20.*step-00000010.*--resume"):
        train_toy(stopped, dropout=0.5)
    tasks = []
    got = train_toy(stopped, tasks, dropout=0.5, resume=True)
    assert min(tasks[0].steps) == 10
    assert records(tmp_path / "stopped") == records(tmp_path / "straight")
    for name, w in weights(tmp_path / "straight", 20).items():
        assert torch.equal(weights(tmp_path / "stopped", 20)[name], w), name
    assert got["valid"] == want["valid"] and got["images"] == want["images"] == 80


def test_records_after_the_checkpoint_are_written_once(tmp_path, monkeypatch):
    """A kill -9 between checkpoints leaves later records and a torn line; a resumed run drops both."""
    config = toy_config(tmp_path / "run", checkpoint={"every": 5}, eval={"every": 5})
    train_toy(config)
    want = records(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for step in (15, 20):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "manifest.json").unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "spl')
    train_toy(config, resume=True)
    assert records(tmp_path / "run") == want


def test_micro_batches_give_the_gradient_of_one_large_batch(tmp_path):
    """Rows count differently, so that a mean of means would be another number."""
    runs = {size: tmp_path / str(size) for size in (1, 2, 3, 6)}
    for size, run_dir in runs.items():
        train_toy(toy_config(run_dir, batch_size=6, micro_batch=size, precision="fp64"))
    want = weights(runs[6], 20)
    for size in (1, 2, 3):
        assert_same(weights(runs[size], 20), want, rtol=1e-12)


def test_metrics_are_one_json_object_a_record(tmp_path):
    train_toy(toy_config(tmp_path / "run", log_every=8, eval={"every": 10}))
    got = [(r["step"], r["split"]) for r in records(tmp_path / "run")]
    train_steps = [1, 8, 16, 20]
    assert [step for step, split in got if split == "train"] == train_steps
    assert [step for step, split in got if split == "valid"] == [10, 20]
    first = records(tmp_path / "run")[0]
    assert first.keys() == {"step", "images", "split", "loss", "loss_squares", "lr", "grad_norm", "mean_x"}
    assert first["images"] == 4 and first["lr"] == 5e-4


def test_the_best_checkpoint_outlives_the_later_ones(tmp_path, monkeypatch):
    marks = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(ToyTask, "evaluate", lambda self, split, final: {"mse": next(marks)})
    summary = train_toy(toy_config(tmp_path / "run", eval={"every": 5}, checkpoint={"every": 2, "keep": 1}))
    assert summary["best"] == {"step": 10, "mse": 1.0}
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")) == [
        "step-00000010",
        "step-00000020",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_the_handlers_as_they_were(tmp_path, monkeypatch, number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    interrupt_at(monkeypatch, 3, number)
    with pytest.raises(TrainingInterrupted, match="after step 4 of 20"):
        train_toy(toy_config(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").is_file()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_nan_stops_before_the_update(tmp_path):
    config = toy_config(tmp_path / "run", micro_batch=2, checkpoint={"every": 6})
    tasks = []
    with pytest.raises(TrainingDiverged, match=r"step 8: model has loss nan .*rows 0-1 of step 8; rows 2-3 of step 8"):
        train_toy(config, tasks, poison=8)
    clean = train_toy(toy_config(tmp_path / "clean", micro_batch=2, checkpoint={"every": 8}))
    assert clean["steps"] == 20
    stopped = tasks[0].model.state_dict()
    with pytest.raises(TrainingDiverged, match=r"Last good checkpoint: .*step-00000006"):
        train_toy(config, resume=True, poison=8)
    reference = []
    with pytest.raises(TrainingDiverged, match="No checkpoint was written yet"):
        train_toy(toy_config(tmp_path / "other", micro_batch=2, checkpoint={"every": None}), reference, poison=8)
    assert all(torch.isfinite(w).all() for w in stopped.values())
    assert records(tmp_path / "run")[-1]["step"] == 8  # eight updates were made, of steps 0 to 7


def test_an_infinite_gradient_stops_too(tmp_path, monkeypatch):
    def losses(self, player, module, batch):
        y = module(batch.inputs[0])
        return Losses({"squares": (y - y.detach()).abs().sqrt().mean()})  # loss 0, gradient infinite

    monkeypatch.setattr(ToyTask, "losses", losses)
    with pytest.raises(TrainingDiverged, match=r"step 0: model has loss 0 and gradient norm (nan|inf) in rows 0-3"):
        train_toy(toy_config(tmp_path / "run"))


def test_a_run_is_not_overwritten(tmp_path, monkeypatch):
    config = toy_config(tmp_path / "run")
    interrupt_at(monkeypatch, 3)
    with pytest.raises(TrainingInterrupted):
        train_toy(config)
    with pytest.raises(ConfigError, match=r"unfinished run, with a checkpoint of step 4; --resume .* --overwrite"):
        train_toy(config)
    other = toy_config(tmp_path / "run", lr=0.5)
    for flags in ({}, {"resume": True}):
        with pytest.raises(ConfigError, match=r"another config \(train\.lr: 0\.001 -> 0\.5\)"):
            train_toy(other, **flags)
    assert train_toy(other, overwrite=True)["steps"] == 20
    assert len(records(tmp_path / "run")) == 21


@pytest.mark.parametrize("flags", [{}, {"resume": True}])
def test_a_finished_run_returns_its_summary(tmp_path, flags):
    config, tasks = toy_config(tmp_path / "run"), []
    summary = train_toy(config, tasks)
    assert train_toy(config, tasks, **flags) == summary
    assert len(tasks) == 1


def test_resume_of_nothing_starts(tmp_path):
    assert train_toy(toy_config(tmp_path / "run"), resume=True)["steps"] == 20


def test_overwrite_leaves_what_is_not_ours(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train_toy(toy_config(tmp_path / "run"))
    train_toy(toy_config(tmp_path / "run", lr=0.5), overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_task_that_cannot_be_made_leaves_no_run(tmp_path):
    def fail(_):
        raise ConfigError("data.source = nowhere: there is no such file")

    with pytest.raises(ConfigError, match="nowhere"):
        train(toy_config(tmp_path / "run"), fail, quiet=True)
    assert not (tmp_path / "run").exists()


def test_two_processes_do_not_share_a_folder(tmp_path):
    config = toy_config(tmp_path / "run")

    def make(accelerator):
        (tmp_path / "run").mkdir()
        holder = (tmp_path / "run" / ".lock").open("a")
        import fcntl

        fcntl.flock(holder, fcntl.LOCK_EX)
        make.holder = holder
        return ToyTask(config, accelerator.device)

    with pytest.raises(ConfigError, match="another process is writing there"):
        train(config, make, quiet=True)


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)


def stopped_at_8(tmp_path, monkeypatch):
    """A run with checkpoints of steps 5 and 8 (an interruption writes one)."""
    config = toy_config(tmp_path / "run", checkpoint={"every": 5})
    interrupt_at(monkeypatch, 7)
    with pytest.raises(TrainingInterrupted):
        train_toy(config)
    monkeypatch.undo()
    return config, tmp_path / "run" / "checkpoints"


@pytest.mark.parametrize("name", ["model-optimizer.safetensors", "trainer.json", "manifest.json"])
def test_a_damaged_last_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(tmp_path, monkeypatch, capfd, name):
    config, checkpoints = stopped_at_8(tmp_path, monkeypatch)
    want = train_toy(toy_config(tmp_path / "straight", checkpoint={"every": 5}))
    flip_a_bit(checkpoints / "step-00000008" / name)
    got = train_toy(config, resume=True, quiet=False)
    shown = capfd.readouterr()
    assert f"{name} is damaged" in shown.err + shown.out and "set aside as damaged-00000008" in shown.err + shown.out
    assert got["valid"] == want["valid"] and got["steps"] == 20
    assert (checkpoints / "damaged-00000008" / name).is_file()
    assert not (checkpoints / "step-00000008").exists()


def test_without_a_whole_checkpoint_nothing_is_touched(tmp_path, monkeypatch):
    config, checkpoints = stopped_at_8(tmp_path, monkeypatch)
    for step in (5, 8):
        flip_a_bit(checkpoints / f"step-{step:08d}" / "model.safetensors")
    before = sorted(checkpoints.rglob("*"))
    with pytest.raises(CheckpointError, match=r"step-00000008/model.* damaged.*no earlier .* whole, --overwrite"):
        train_toy(config, resume=True)
    assert sorted(checkpoints.rglob("*")) == before
    assert train_toy(config, overwrite=True)["steps"] == 20


def test_nothing_global_is_left(tmp_path):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # other people's trainers leave theirs
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_toy(toy_config(tmp_path / "run"), dropout=0.5)
    assert torch.equal(torch.get_rng_state(), before)
    assert accelerate.state.AcceleratorState._shared_state == {} == accelerate.state.PartialState._shared_state
    assert torch.get_default_dtype() == torch.float32


def test_a_launcher_that_started_fewer_processes_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("transformer_vq.training.distributed.asked_for", lambda: 2)
    with pytest.raises(ConfigError, match="asked for 2 processes and this run has 1"):
        train_toy(toy_config(tmp_path / "run"))


def test_precisions(tmp_path):
    tasks = []
    for precision in ("fp32", "fp64", "bf16"):
        train_toy(toy_config(tmp_path / precision, precision=precision), tasks)
    assert [next(t.model.parameters()).dtype for t in tasks] == [torch.float32, torch.float64, torch.float32]
    fp32, fp64, bf16 = (records(tmp_path / p)[-1]["mse"] for p in ("fp32", "fp64", "bf16"))
    assert fp32 == pytest.approx(fp64, rel=1e-5) and fp32 != bf16 == pytest.approx(fp32, rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_compiled_equals_eager(tmp_path):
    for on in (False, True):
        train_toy(toy_config(tmp_path / str(on), compile=on, precision="fp64"))
    assert_same(weights(tmp_path / "True", 20), weights(tmp_path / "False", 20), rtol=1e-12)


def test_tensorboard_gets_the_records(tmp_path):
    train_toy(toy_config(tmp_path / "run", trackers=["tensorboard"]))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(tmp_path / "run" / "trackers" / "run")).Reload()
    assert [e.step for e in reader.Scalars("train/loss")] == list(range(1, 21))


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("transformer_vq.training.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.trackers = wandb: needs wandb"):
        train_toy(toy_config(tmp_path / "run", trackers=["wandb"]))


class Duel(ToyTask):
    """Two players: the second learns what the first predicts, from step 5 on."""

    def __init__(self, config, device):
        super().__init__(config, device)
        self.critic = torch.nn.Linear(3, 1)
        torch.nn.init.zeros_(self.critic.weight)
        torch.nn.init.zeros_(self.critic.bias)
        slow = config.train.model_copy(update={"lr": 0.01, "betas": (0.5, 0.9)})
        self.players = {**self.players, "critic": Player(self.critic, slow)}
        self.now = 0

    def set_step(self, step):
        self.now = step

    def losses(self, player, module, batch):
        if player == "model":
            return super().losses(player, module, batch)
        if self.now < 5:
            return Losses({})
        x, _, _ = batch.inputs
        return Losses({"squares": (module(x) - self.model(x).detach()).square().mean()})


def test_players_take_turns_and_resume(tmp_path, monkeypatch):
    config, alone = toy_config(tmp_path / "duel"), toy_config(tmp_path / "alone")
    interrupt_at(monkeypatch, 9)
    with pytest.raises(TrainingInterrupted):
        train(config, lambda a: Duel(config, a.device), quiet=True)
    train(config, lambda a: Duel(config, a.device), quiet=True, resume=True)
    straight = toy_config(tmp_path / "straight")
    train(straight, lambda a: Duel(straight, a.device), quiet=True)
    train_toy(alone)
    assert records(tmp_path / "duel") == records(tmp_path / "straight")
    got, want = records(tmp_path / "duel"), records(tmp_path / "alone")
    assert [r.get("loss") for r in got] == [r.get("loss") for r in want]  # the first player does not notice the second
    assert len({r["critic/loss"] for r in got[5:20]}) == 15
    assert ["critic/loss" in r for r in got] == [False] * 5 + [True] * 15 + [False]
    assert got[19]["critic/lr"] == pytest.approx(got[19]["lr"] * 10)
