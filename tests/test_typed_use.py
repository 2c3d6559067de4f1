"""The public names as a strictly typed program uses them: mypy reads this file with the package, and it runs."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.config import DataConfig, RunConfig, load_config
from transformer_vq.data import Corpus, Tokenizer, prepare
from transformer_vq.evaluation import evaluate, generate
from transformer_vq.models import ModelState, Output
from transformer_vq.ops import vq_attention
from transformer_vq.ops.attention import AttentionState, full_attention
from transformer_vq.ops.estimators import ESTIMATORS, apply
from transformer_vq.quantizers import Quantizer, build_quantizer
from transformer_vq.training import LoadedRun, load_run, run


def test_a_model_trains_by_hand() -> None:
    config = TransformerVQConfig(vocab_size=16, layers=1, width=8, key_dim=8, value_dim=8, window=4, block_len=4)
    model = TransformerVQ(config)
    tokens = torch.randint(16, (2, 13))
    out = model(tokens[:, :-1], labels=tokens[:, 1:])
    assert isinstance(out, Output) and out.loss is not None
    torch.autograd.backward(out.loss)
    model.apply_codebook_statistics()
    state: ModelState | None = out.state
    assert state is not None
    assert_type(generate(model, [[1, 2]], 3, temperature=0.0), list[list[int]])


def test_attention_estimators_and_quantizers_alone() -> None:
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    quantizer = build_quantizer(TransformerVQConfig(vocab_size=4, heads=2, key_dim=4).quantizer, heads=2, dim=4)
    assert isinstance(quantizer, Quantizer)
    codes = torch.randint(3, (1, 2, 9))
    codebook = torch.randn(2, 3, 4)
    k_hat = codebook[torch.arange(2)[:, None], codes]
    o, state = vq_attention(q, k_hat, v, codes, codebook, window=4)
    assert_type(o, Tensor)
    assert_type(state, AttentionState)
    assert_type(apply("rotation", k, k_hat), Tensor)
    assert "rotation" in ESTIMATORS and callable(full_attention)


def test_runs_are_opened_and_scored() -> None:
    def score(folder: str, text: Path) -> tuple[Corpus, dict[str, object]]:
        loaded: LoadedRun = load_run(folder)
        tokenizer: Tokenizer = loaded.tokenizer
        corpus = prepare(DataConfig(source=str(text)))
        assert tokenizer.decode(tokenizer.encode("text")) == "text"
        return corpus, evaluate(loaded.model, corpus.splits["test"], context=16)

    assert callable(score) and callable(run)
    assert_type(load_config("lm/tiny", ["train.steps=2"], RunConfig), RunConfig)
