"""Started by `torchrun`: every kind of evaluation by as many processes as there are, its numbers into a JSON file each.

FOLDER: where `numbers-RANK.json` go, and `numbers-RANK-cut.json` with parameters cut over the processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from models_for_evaluation import tiny_model, tiny_split

from transformer_vq.config import validate
from transformer_vq.config.recall import RecallRunConfig
from transformer_vq.evaluation import evaluate, evaluate_sources, language
from transformer_vq.evaluation.crew import Crew
from transformer_vq.evaluation.histograms import KeyHistograms
from transformer_vq.evaluation.length import score_texts
from transformer_vq.training.context import ProcessLine
from transformer_vq.training.recall import RecallTask
from transformer_vq.training.sharding import make_mesh, shard_model

PIECE = 5  # tokens of a call, so that the state is carried many times


def numbers(crew: Crew) -> dict[str, dict[str, object]]:
    """By the kind of evaluation. Windows do not share out evenly, and of some there are fewer than processes."""
    model, split = tiny_model(), tiny_split(201, documents=(0, 20, 37, 90, 91, 170))
    if crew.in_step:
        shard_model(model, make_mesh("full", torch.device("cpu"), crew.size))
    sources = {"a": tiny_split(60), "b": tiny_split(90).head(20)}
    mixture = SimpleNamespace(files=lambda split: sources, alone=None, shares={"a": 0.25, "b": 0.75})
    found = {
        "windows": evaluate(model, split, 16, batch_size=3, recurrence=2, crew=crew),
        "few": evaluate(model, split, 150, batch_size=16, crew=crew),
        "full": evaluate(model, split, "full", batch_size=2, recurrence=2, crew=crew),
        "documents": evaluate(model, split, "full", 2, reset_documents=True, recurrence=2, crew=crew),
        "mixture": evaluate_sources(model, mixture, "valid", "full", batch_size=2, crew=crew),
        "position": {
            str(b.start): b._asdict() for b in score_texts(model, split, 40, batch_size=2, crew=crew).by_position()
        },
    }
    with KeyHistograms({"layer0": model.layers[0].quantizer}) as heard:
        evaluate(model, split, 16, batch_size=3, crew=crew)
    shown = heard.shared(crew).histograms()
    found["histograms"] = {name: histogram.counts.tolist() for name, histogram in shown.items()}
    recall = {"task": "mqar", "vocab": 64, "pairs": 4, "examples": 7}
    tree = {"model": {"layers": 1, "width": 16, "key_dim": 8, "value_dim": 8, "window": 8, "quantizer": {"codes": 8}}}
    config = validate({**tree, "recall": recall, "train": {"seq_len": 32}, "eval": {"batch_size": 2}}, RecallRunConfig)
    task = RecallTask(config, torch.device("cpu"))
    if crew.in_step:
        shard_model(task.model, make_mesh("full", torch.device("cpu"), crew.size))
    task.crew = crew
    found["recall"] = task.evaluate("valid", final=True)
    return found


def texts(crew: Crew) -> dict[str, dict[str, object]]:
    """Texts of full context that are longer than a process's share; calls do not share out evenly."""
    split, long = tiny_split(93, documents=(0, 20, 37, 80, 81)), tiny_split(93, documents=(0, 3, 85))
    settings = {"position": "rotary", "block": "transformer", "conv": 3, "kv_heads": 1}
    models = {
        "plain": tiny_model(),
        "window of many calls": tiny_model(window=12),
        "no cache": tiny_model(cache=False),
        "all": tiny_model(**settings),
        "every key": tiny_model("none"),
    }
    if crew.in_step:
        models = {name: models[name] for name in ("plain", "all")}
        for model in models.values():
            shard_model(model, make_mesh("full", torch.device("cpu"), crew.size))
    else:
        models["places"] = tiny_model(absolute_positions=True)
        torch.nn.init.constant_(models["places"].absolute_scale, 0.7)
    found = {name: evaluate(model, split, "full", 1, recurrence=2, crew=crew) for name, model in models.items()}
    for name in ("plain", "all"):
        found[f"{name}, documents"] = evaluate(models[name], long, "full", 1, reset_documents=True, crew=crew)
    sources = {"a": split, "b": tiny_split(40)}
    mixture = SimpleNamespace(files=lambda split: sources, alone=None, shares={"a": 0.25, "b": 0.75})
    return {**found, "mixture": evaluate_sources(models["plain"], mixture, "valid", "full", 2, crew=crew)}


if __name__ == "__main__":
    language.PIECE = PIECE
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    for cut in (False, True):
        found = numbers(Crew(rank, size, in_step=cut))
        (folder / f"numbers-{rank}{'-cut' if cut else ''}.json").write_text(json.dumps(found))
        lines = {n: ProcessLine(None, closes=True, size=n) for n in range(2, size + 1)}
        found = texts(Crew(rank, size, in_step=cut, lines=lines))
        sent = {n: line.sent for n, line in lines.items()}
        (folder / f"texts-{rank}{'-cut' if cut else ''}.json").write_text(json.dumps([found, sent]))

    def stop(done: int, total: int) -> None:
        """Process 1 is asked to stop."""
        if rank == 1:
            raise KeyError("stop")

    try:
        evaluate(tiny_model(), tiny_split(200), 16, 3, progress=stop, crew=Crew(rank, size))
    except KeyError:
        (folder / f"stopped-{rank}").touch()
    dist.destroy_process_group()
