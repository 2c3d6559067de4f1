"""Started by `torchrun`: train every run config of a JSON file one after another, comparing codebooks at every step."""

from __future__ import annotations

import json
import sys

from transformer_vq.config import RunConfig, validate
from transformer_vq.training import loop, run

if __name__ == "__main__":
    loop.COMPARE_EVERY = 1
    with open(sys.argv[1]) as file:
        for tree in json.load(file):
            run(validate(tree, RunConfig), quiet=True)
