"""A corpus of TEXT gigabytes, and a streamed dataset of a fifth of that, under a limit of 2 GiB of memory, by a process
that is killed and one that goes on."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest

from transformer_vq.config import DataConfig
from transformer_vq.data import prepare

TEXT = float(os.environ.get("TEXT", "5")) * 1e9
LIMIT = 2 << 30

LIMITED = """
import os, resource, signal, sys
source, cache, tokenizer, stop = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))
from transformer_vq.config import DataConfig
from transformer_vq.data import prepare, tokenizing
tokenizing.OFTEN = 1.0
peak = 0
def progress(name, size):
    global peak
    with open("/proc/self/status") as file:
        peak = max(peak, *(int(line.split()[1]) for line in file if line.startswith("RssAnon")))
    if name == "train" and size > float(stop):
        os.kill(os.getpid(), signal.SIGKILL)
streaming = source.startswith("hf:")
prepare(
    DataConfig(source=source, streaming=streaming, cache=cache, tokenizer=tokenizer, document_separator="\\\\n\\\\n"),
    progress,
)
print(peak // 1024)
"""


def write(path, size: float) -> str:
    """Made text of about so many bytes; its sha256."""
    draw, total = random.Random(0), hashlib.sha256()
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    lines = (" ".join(draw.choices(words, k=12)) + "\n" * (1 + (i % 20 == 0)) for i in range(40_000))
    block = "".join(lines).encode()
    with path.open("wb") as file:
        for chapter in itertools.count():
            if file.tell() >= size:
                return total.hexdigest()
            text = b"chapter %d\n" % chapter + block
            total.update(text)
            file.write(text)
    raise AssertionError


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(sys.platform != "linux", reason="limits and memory as Linux tells them")
@pytest.mark.parametrize(("tokenizer", "share"), [("bytes", 1.0), ("bpe:2000", 0.02)])
def test_memory_is_flat_and_a_kill_costs_what_was_not_noted(tmp_path, tokenizer, share):
    text, cache = tmp_path / "text.txt", tmp_path / "cache"
    try:
        sha256 = write(text, TEXT * share)
        found = []
        for stop in (TEXT * share / 3, TEXT * share * 2):
            command = [sys.executable, "-c", LIMITED, str(text), str(cache), tokenizer, str(stop)]
            found.append(subprocess.run(command, capture_output=True, text=True, check=False))
        assert found[0].returncode == -signal.SIGKILL and found[1].returncode == 0, found[1].stderr[-2000:]
        megabytes = int(found[1].stdout)
        print(f"{tokenizer}: {text.stat().st_size / 1e9:.1f} GB of text, {megabytes} MB of memory")
        assert megabytes < 800  # of the process's own; what is mapped belongs to the disk
        corpus = prepare(
            DataConfig(source=str(text), cache=str(cache), tokenizer=tokenizer, document_separator="\\n\\n")
        )
        assert corpus.sha256 == sha256
        total = hashlib.sha256()
        for file in corpus.splits.values():
            for at in range(0, len(file), 1 << 22):
                part = file.tokens[at : at + (1 << 22)]
                total.update(part.tobytes() if tokenizer == "bytes" else corpus.tokenizer.decode_bytes(part.tolist()))
        assert total.hexdigest() == sha256
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        text.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="limits and memory as Linux tells them")
def test_a_streamed_dataset_too(tmp_path):
    """Rows of a file, from which splits are carved by position."""
    plain, rows, cache = tmp_path / "text.txt", tmp_path / "rows.jsonl", tmp_path / "cache"
    try:
        write(plain, TEXT / 5)
        total = hashlib.sha256()
        with plain.open(encoding="utf-8") as text, rows.open("w", encoding="utf-8") as file:
            while row := text.read(1500):
                total.update(row.encode())
                file.write(json.dumps({"text": row}) + "\n")
        found = []
        for stop in (TEXT / 10, TEXT):
            command = [sys.executable, "-c", LIMITED, f"hf:{rows}", str(cache), "bytes", str(stop)]
            found.append(subprocess.run(command, capture_output=True, text=True, check=False))
        assert found[0].returncode == -signal.SIGKILL and found[1].returncode == 0, found[1].stderr[-2000:]
        megabytes = int(found[1].stdout)
        print(f"{rows.stat().st_size / 1e9:.1f} GB of rows, {megabytes} MB of memory")
        assert megabytes < 800
        config = DataConfig(source=f"hf:{rows}", streaming=True, cache=str(cache), document_separator="\\n\\n")
        again = hashlib.sha256()
        for file in prepare(config).splits.values():
            for at in range(0, len(file), 1 << 22):
                again.update(file.tokens[at : at + (1 << 22)].tobytes())
        assert again.hexdigest() == total.hexdigest()
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        rows.unlink(missing_ok=True)
        plain.unlink(missing_ok=True)
