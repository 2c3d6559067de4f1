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
SLOPE = 1.0  # MB a minute


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
@pytest.mark.parametrize("order", ["windows", "streams"])
def test_memory_and_files_are_flat(tmp_path, order):
    config = tiny_run(
        tmp_path,
        data__order=order,
        train__steps=10**7,
        train__log_every=20,
        eval__every=100,
        eval__max_tokens=500,
        checkpoint__every=50,
        model__quantizer={"codes": 8, "init": "kmeans", "dead_code_threshold": 1.0},
    )
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "transformer_vq", "train", str(tmp_path / "config.yaml"), "--quiet"]
    found: list[tuple[float, float, int]] = []
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as run:
        try:
            process, began = psutil.Process(run.pid), time.monotonic()
            while (minutes := (time.monotonic() - began) / 60) < MINUTES:
                assert run.poll() is None
                found.append((minutes, process.memory_info().rss / 1e6, process.num_fds()))
                time.sleep(0.5)
        finally:
            run.terminate()
    minutes, megabytes, files = np.array([one for one in found if one[0] > WARM_UP * MINUTES]).T
    slope = np.polyfit(minutes, megabytes, 1)[0]
    print(
        f"{order}: {slope:+.2f} MB a minute at {megabytes.mean():.0f} MB, {files.min():.0f} to {files.max():.0f} files"
    )
    assert slope < SLOPE
    half = len(files) // 2
    assert files[half:].max() <= files[:half].max(), "files that are open"
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size > 10_000
