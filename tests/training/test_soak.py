"""A run that goes on and on keeps neither memory nor files: steps, evaluations and checkpoints, for SOAK minutes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from tiny_run import tiny_run

from transformer_vq.config import save_config

MINUTES = float(os.environ.get("SOAK", "5"))
WARM_UP = 0.3  # of the time: allocators and caches grow to what they need
SLOPE = 1.0  # MB a minute and process


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
@pytest.mark.parametrize(("order", "processes"), [("windows", 1), ("streams", 1), ("streams", 2)])
def test_memory_and_files_are_flat(tmp_path, order, processes):
    """Of all processes together; two share parameters and the evaluation's text."""
    config = tiny_run(
        tmp_path,
        data__order=order,
        train__steps=10**7,
        train__log_every=20,
        eval__every=100,
        eval__max_tokens=600,
        eval__batch_size=1,
        train__shard="full",
        checkpoint__every=50,
        model__quantizer={"codes": 8, "init": "kmeans", "dead_code_threshold": 1.0},
    )
    save_config(config, tmp_path / "config.yaml")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
    command = [sys.executable, *launcher, "-m", "transformer_vq", "train", str(tmp_path / "config.yaml"), "--quiet"]
    found: list[tuple[float, float, int]] = []
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as run:
        try:
            process, began = psutil.Process(run.pid), time.monotonic()
            while len(workers := process.children() or [process]) < processes:
                time.sleep(0.1)
            while (minutes := (time.monotonic() - began) / 60) < MINUTES:
                assert run.poll() is None
                held = sum(worker.memory_info().rss for worker in workers) / 1e6
                found.append((minutes, held, sum(worker.num_fds() for worker in workers)))
                time.sleep(0.5)
        finally:
            run.terminate()
    minutes, megabytes, files = np.array([one for one in found if one[0] > WARM_UP * MINUTES]).T
    slope = np.polyfit(minutes, megabytes, 1)[0]
    size, least, most = megabytes.mean(), files.min(), files.max()
    print(f"{order}, {processes}: {slope:+.2f} MB a minute at {size:.0f} MB, {least:.0f} to {most:.0f} files")
    assert slope < SLOPE * processes
    half = len(files) // 2
    assert files[half:].max() <= files[:half].max(), "files that are open"
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size > 10_000
