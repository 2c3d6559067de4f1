"""Runs go out, and other people's trainers move codebooks as ours does."""

from __future__ import annotations

import pytest
import torch
from tiny_run import tiny_run

from transformer_vq.evaluation.generation import generate
from transformer_vq.training import load_run, run

transformers = pytest.importorskip("transformers")
from transformer_vq.hub import TransformerVQForCausalLM, TransformerVQHubConfig  # noqa: E402
from transformer_vq.hub.runs import from_run  # noqa: E402

SIZES = {"layers": 2, "width": 16, "key_dim": 8, "value_dim": 8, "window": 3, "block_len": 4}


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_continues_text_token_for_token(tmp_path, tied):
    config = tiny_run(tmp_path, model__tied_embedding=tied)
    run(config, quiet=True)
    ours, theirs = load_run(config.run_dir), from_run(config.run_dir)
    tokens = torch.tensor([ours.tokenizer.encode("def f(")])
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours.model(tokens).logits)
    got = theirs.generate(tokens, max_new_tokens=20, do_sample=False)[0, tokens.shape[1] :]
    want = generate(ours.model, tokens.tolist(), 20, temperature=0.0)
    assert got.tolist() == list(want[0])
    assert int(theirs.model.steps) == ours.step == 20


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        tokens = torch.randint(29, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


def trained(tmp_path, accumulation: int, **arguments) -> TransformerVQForCausalLM:
    quantizer = {"kind": "vq", "codes": 8, "commit": 0.1}
    net = TransformerVQForCausalLM(TransformerVQHubConfig(model={**SIZES, "quantizer": quantizer}, vocab_size=29))
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / f"out{accumulation}"),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    transformers.Trainer(model=net, args=settings, train_dataset=Texts()).train()
    return net


def test_transformers_trainer_moves_codebooks_once_a_step_whatever_the_accumulation(tmp_path):
    whole, cut = trained(tmp_path, 1), trained(tmp_path, 4)
    fresh = TransformerVQForCausalLM(whole.config)
    assert int(whole.model.steps) == int(cut.model.steps) == 3
    for i, quantizer in enumerate(whole.model.backbone.quantizers):
        assert not torch.allclose(quantizer.codebook, fresh.model.backbone.quantizers[i].codebook)
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(tensor.double(), cut.state_dict()[name].double(), rtol=1e-3, atol=1e-5), name
