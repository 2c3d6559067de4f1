"""Started by `torchrun`: train every run config of a JSON file one after another, codebooks compared at every step.

LOCAL: how many processes a machine has, as far as `hybrid` is told.
"""

from __future__ import annotations

import json
import os
import sys

from transformer_vq.config import RunConfig, validate
from transformer_vq.training import loop, run

if __name__ == "__main__":
    loop.COMPARE_EVERY = 1
    os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL", os.environ["LOCAL_WORLD_SIZE"])
    with open(sys.argv[1], encoding="utf-8") as file:
        for tree, resume in json.load(file):
            run(validate(tree, RunConfig), quiet=True, resume=resume)
