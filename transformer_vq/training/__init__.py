"""One training loop for every task: a model, batches, a loss and an evaluation."""

from transformer_vq.training.checkpoints import CheckpointError
from transformer_vq.training.language import LanguageTask, LoadedRun, load_run, run
from transformer_vq.training.loop import TrainingDiverged, TrainingInterrupted, train
from transformer_vq.training.task import Losses, MicroBatch, Player, Task

__all__ = [
    "CheckpointError",
    "LanguageTask",
    "LoadedRun",
    "Losses",
    "MicroBatch",
    "Player",
    "Task",
    "TrainingDiverged",
    "TrainingInterrupted",
    "load_run",
    "run",
    "train",
]
