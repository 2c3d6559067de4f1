"""Started by `torchrun`: train every run config of a JSON file one after another, codebooks compared at every step.

LOCAL: how many processes a machine has, as far as `hybrid` is told. COMPILER: the backend of every `torch.compile`;
graphs and their breaks are counted into `graphs.json` of the run.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import torch

from transformer_vq.config import RunConfig, validate
from transformer_vq.training import loop, run

if __name__ == "__main__":
    loop.COMPARE_EVERY = 1
    if "COMPILER" in os.environ:
        torch.compile = functools.partial(torch.compile, backend=os.environ["COMPILER"])
    os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL", os.environ["LOCAL_WORLD_SIZE"])
    with open(sys.argv[1], encoding="utf-8") as file:
        for tree, resume in json.load(file):
            if tree["train"]["compile"]:
                torch._dynamo.reset()
                torch._dynamo.utils.counters.clear()
            run(validate(tree, RunConfig), quiet=True, resume=resume)
            if os.environ["RANK"] == "0" and tree["train"]["compile"]:
                counted = torch._dynamo.utils.counters
                found = {"graphs": counted["stats"]["unique_graphs"], "breaks": list(counted["graph_break"])}
                Path(tree["run_dir"], "graphs.json").write_text(json.dumps(found), encoding="utf-8")
