"""lm-evaluation-harness on an exported folder, without a network and on tasks made here, against our own numbers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_run

from transformer_vq.cli import run as command
from transformer_vq.evaluation.generation import generate
from transformer_vq.training import load_run, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed (extra `harness`)"),
]
PAGE = "".join(f"{i} green bottles, {i * i % 97} left\n" for i in range(40, 90)) + "é, ü and ß\n"
LONG = "".join(f"{i} green bottles, {i * i % 97} left\n" for i in range(200))

DOCUMENTS = {
    "own_choice": [
        {"question": f"{i} green", "choices": [" bottles", " wottles", " b", ", 13 left\n"], "label": 0}
        for i in range(8)
    ],
    "own_rolling": [{"page": PAGE}],
    "own_long": [{"context": LONG.rstrip(), "answer": "\n200 green bottles"}],  # white space goes to the answer anyway
    "own_generate": [{"context": f"{i} gre", "answer": "en bottles"} for i in range(3)],
}
TASKS = {
    "own_choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: label\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n",
    "own_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{page}}'\n"
    "metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]\n",
    "own_long": "output_type: loglikelihood\ndoc_to_text: '{{context}}'\ndoc_to_target: '{{answer}}'\n"
    "target_delimiter: ''\nmetric_list: [{metric: perplexity}, {metric: acc}]\n",
    "own_generate": "output_type: generate_until\ndoc_to_text: '{{context}}'\ndoc_to_target: '{{answer}}'\n"
    "target_delimiter: ''\ngeneration_kwargs: {until: [\"\\n\"], max_gen_toks: 24, do_sample: false}\n"
    "metric_list: [{metric: exact_match}]\n",
}


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCUMENTS[name]), encoding="utf-8")
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + task, encoding="utf-8")


def harness(folder: Path, exported: str, tasks: str, **arguments) -> tuple[dict, dict]:
    """The command line as a user writes it: results and samples by task."""
    model = ",".join([f"pretrained={exported}", "trust_remote_code=True", *(f"{k}={v}" for k, v in arguments.items())])
    out = folder / f"results-{len(list(folder.glob('results-*')))}"
    asked = ["--model", "hf", "--model_args", model, "--tasks", tasks, "--include_path", str(folder / "tasks")]
    asked += ["--device", "cpu", "--batch_size", "2", "--output_path", str(out), "--log_samples"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *asked], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    samples = {
        name: [json.loads(line) for line in next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()]
        for name in tasks.split(",")
    }
    return json.loads(results.read_text())["results"], samples


def log_probability(model, context: bytes, continuation: bytes, piece: int = 512) -> float:
    """Of a continuation, read piece by piece with the state carried: our own way through a long text."""
    tokens, state, total = torch.tensor([list(context + continuation)]), None, 0.0
    with torch.no_grad():
        for first in range(0, tokens.shape[1] - 1, piece):
            now = tokens[:, first : min(first + piece, tokens.shape[1] - 1)]
            out = model(now, state=state)
            state = out.state
            following = tokens[0, first + 1 : first + 1 + now.shape[1]]
            each = out.logits[0].double().log_softmax(-1).gather(1, following[:, None])[:, 0]
            total += each[max(len(context) - 1 - first, 0) :].sum().item()
    return total


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A trained run, its export, and the tasks."""
    folder = tmp_path_factory.mktemp("harness")
    config = tiny_run(folder, train__steps=60)
    run(config, quiet=True)
    assert command(["export", config.run_dir, str(folder / "out")]) == 0
    write_tasks(folder / "tasks")
    return folder, config.run_dir, str(folder / "out")


def test_it_asks_what_we_ask_and_gets_the_same_numbers(exported, capsys):
    folder, run_dir, out = exported
    results, samples = harness(folder, out, ",".join(TASKS))
    loaded = load_run(run_dir)
    model = loaded.model

    right = 0
    for sample in samples["own_choice"]:
        document = sample["doc"]
        got = [float(pair[0]) for pair in sample["filtered_resps"]]
        want = [log_probability(model, document["question"].encode(), c.encode()) for c in document["choices"]]
        assert got == pytest.approx(want, abs=1e-4)
        right += max(range(4), key=want.__getitem__) == document["label"]
    assert results["own_choice"]["acc,none"] == right / 8

    # all of the page after the token for padding, the zero byte: a file that begins with it asks our `eval` the same
    (folder / "text").mkdir()
    for split, content in (("train", LONG), ("valid", LONG), ("test", "\0" + PAGE)):
        (folder / "text" / f"{split}.txt").write_text(content, encoding="utf-8", newline="")
    asked = [f"data.source={folder / 'text'}", f"data.cache={folder / 'cache'}", "data.document_separator=null"]
    assert command(["eval", run_dir, *asked, "--split", "test", "--context", "full", "--json"]) == 0
    (ours,) = json.loads(capsys.readouterr().out)["contexts"]
    assert ours["bytes"] == len(PAGE.encode())
    assert results["own_rolling"]["bits_per_byte,none"] == pytest.approx(ours["bits_per_byte"], rel=1e-5)

    want = log_probability(model, LONG.rstrip().encode(), b"\n200 green bottles", piece=100)
    assert float(samples["own_long"][0]["filtered_resps"][0][0]) == pytest.approx(want, abs=1e-3)
    assert results["own_long"]["perplexity,none"] == pytest.approx(math.exp(-want), rel=1e-3)

    for sample in samples["own_generate"]:
        prompt = list(sample["doc"]["context"].encode())
        text = loaded.tokenizer.decode(generate(model, [prompt], 24, temperature=0.0)[0]).split("\n")[0]
        assert sample["resps"][0][0] == text
