"""Other people's trainers: they move weights and codebooks as our own step does, noise and commitment included."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from transformer_vq import TransformerVQ

transformers = pytest.importorskip("transformers")
from hub_models import SIZES, text  # noqa: E402

from transformer_vq.hub import TransformerVQForCausalLM, TransformerVQHubConfig  # noqa: E402

LR = 1e-2
COMMITTED = {"kind": "vq", "codes": 8, "commit": 1.0}


def fresh(vocab_size: int = 29, **changes) -> TransformerVQForCausalLM:
    model = {**SIZES, "quantizer": COMMITTED, **changes}
    return TransformerVQForCausalLM(TransformerVQHubConfig(model=model, vocab_size=vocab_size, seed=3)).train()


class Heard:
    """The batches that a trainer hands to a model, in groups of one optimizer step."""

    def __init__(self, net: TransformerVQForCausalLM) -> None:
        self.steps: list[list[tuple]] = [[]]
        self.net, self.after = net.model, net.model.after_optimizer_step
        net.model.after_optimizer_step = self.stepped
        net.model.register_forward_pre_hook(self.read, with_kwargs=True)

    def read(self, module, args, kwargs):
        if module.training and torch.is_grad_enabled():
            ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            self.steps[-1].append((ids.clone(), mask.bool()))

    def stepped(self):
        self.after()
        self.steps.append([])

    def replay(self, ours: TransformerVQ) -> TransformerVQ:
        """What our loop makes of the same rows (training/step.py): AdamW without decay, gradients clipped at 1."""
        trained = [p for p in ours.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
        for step, batches in enumerate(self.steps[:-1]):
            ours.set_step(step)
            labels = [F.pad(ids[:, 1:].masked_fill(~mask[:, 1:], -100), (0, 1), value=-100) for ids, mask in batches]
            total, row = sum((one >= 0).sum() for one in labels), 0
            for (ids, mask), one in zip(batches, labels, strict=True):
                ours.set_rows(row)
                row += len(ids)
                out = ours(ids, labels=one, mask=None if mask.all() else mask)
                share = (one >= 0).sum() / total
                (share * out.loss_lm + share * out.loss_quantizers).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ours.apply_codebook_statistics()
        return ours


def assert_moved_as_ours(net: TransformerVQForCausalLM, ours: TransformerVQ, least_steps: int = 3) -> None:
    """Every weight and codebook, of which none stands where it began."""
    assert int(net.model.steps) == least_steps
    theirs = {name.removeprefix("model.backbone."): x for name, x in net.state_dict().items()}
    begun = {name.removeprefix("model.backbone."): x for name, x in fresh(net.config.vocab_size).state_dict().items()}
    for name, want in ours.state_dict().items():
        name = name.replace("head.", "lm_head.")
        assert torch.allclose(theirs[name].double(), want.double(), rtol=1e-3, atol=2e-5), name
        if "ema_" in name:
            assert not torch.allclose(want, begun[name])


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        tokens = text(1, 12, seed=i)[0]
        return {"input_ids": tokens, "labels": tokens}


def settings(tmp_path, kind=transformers.TrainingArguments, accumulation: int = 1, **changes):
    return kind(
        output_dir=str(tmp_path / f"out{accumulation}"),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        learning_rate=LR,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **changes,
    )


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("estimator", ["ste", "random_rotation"])
def test_transformers_trainer(tmp_path, accumulation, estimator):
    quantizer = {**COMMITTED, "estimator": estimator}
    net = fresh(quantizer=quantizer, dropout_residual=0.1)
    heard = Heard(net)
    transformers.Trainer(model=net, args=settings(tmp_path, accumulation=accumulation), train_dataset=Texts()).train()
    assert [len(step) for step in heard.steps] == [accumulation] * 3 + [0]
    assert_moved_as_ours(net, heard.replay(TransformerVQ(net.config.settings(), seed=3).train()))


@pytest.fixture
def bytes_tokenizer(tmp_path):
    from transformer_vq.data.tokenizers import ByteTokenizer
    from transformer_vq.hub.export import write_tokenizer

    write_tokenizer(ByteTokenizer(), tmp_path / "tokenizer")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def sentences(n: int = 24):
    from datasets import Dataset

    return Dataset.from_list([{"text": f"{i} green bottles" + ", left" * (i % 3)} for i in range(n)])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trl_s_sft_which_computes_the_loss_from_hidden_states(tmp_path, bytes_tokenizer, accumulation):
    trl = pytest.importorskip("trl")
    net = fresh(256, logit_scale=0.5)
    net.model.micro_batches = accumulation
    heard = Heard(net)
    args = settings(tmp_path, trl.SFTConfig, accumulation, bf16=False, max_length=64)
    trl.SFTTrainer(model=net, args=args, train_dataset=sentences(), processing_class=bytes_tokenizer).train()
    assert any(not mask.all() for step in heard.steps for _, mask in step)  # rows of several lengths, padded
    ours = heard.replay(TransformerVQ(net.config.settings(), seed=3).train())
    if accumulation == 1:
        assert_moved_as_ours(net, ours)
    else:  # a share a micro-batch, whatever its number of labels
        for mine, theirs in zip(ours.quantizers, net.model.backbone.quantizers, strict=True):
            assert torch.allclose(mine.codebook, theirs.codebook, rtol=0.05, atol=1e-3)


def test_trl_s_packed_rows_are_documents_apart(tmp_path, bytes_tokenizer):
    trl = pytest.importorskip("trl")
    net, seen = fresh(256), []
    net.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    args = settings(tmp_path, trl.SFTConfig, 8, bf16=False, max_length=64, packing=True)
    trl.SFTTrainer(model=net, args=args, train_dataset=sentences(), processing_class=bytes_tokenizer).train()
    row = next(kwargs for kwargs in seen if (kwargs["position_ids"] == 0).sum() > 1)
    ids, places = row["input_ids"], row["position_ids"]
    assert row.get("attention_mask") is None
    first = int((places[0] == 0).nonzero()[1])
    with torch.no_grad():
        whole = net.eval()(ids, position_ids=places).logits
        assert torch.allclose(whole[:, first : first + 5], net(ids[:, first : first + 5]).logits, atol=1e-5)


def test_peft_s_lora_moves_codebooks_and_merges_into_a_folder(tmp_path):
    peft = pytest.importorskip("peft")
    net = fresh()
    lora = peft.LoraConfig(target_modules=["q_proj", "kvg_proj", "out_proj"], r=4, task_type="CAUSAL_LM")
    adapted, ours = peft.get_peft_model(net, lora), TransformerVQ(net.config.settings(), seed=3).train()
    peft.inject_adapter_in_model(lora, ours)
    ours.load_state_dict(
        {n.removeprefix("model.backbone."): x for n, x in net.state_dict().items() if ".lora_" in n}, strict=False
    )
    heard = Heard(net)
    transformers.Trainer(model=adapted, args=settings(tmp_path), train_dataset=Texts()).train()
    assert_moved_as_ours(net, heard.replay(ours))
    frozen = fresh().model.layers[0].q_proj.weight
    assert torch.equal(net.model.layers[0].q_proj.base_layer.weight, frozen)

    tokens = text(2, 20)
    with torch.no_grad():
        want = adapted.eval()(input_ids=tokens).logits
        merged = adapted.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(again(tokens).logits, want, atol=1e-4)
    for mine, theirs in zip(again.model.backbone.quantizers, ours.quantizers, strict=True):
        assert torch.allclose(mine.codebook, theirs.codebook, rtol=1e-3, atol=2e-5)


NOISY = {
    "quantizer": {"kind": "vq", "codes": 8, "estimator": "random_rotation"},
    "dropout_residual": 0.2,
    "dropout_layer": 0.2,
}


def gradients(net, parts, together: bool = False) -> dict[str, torch.Tensor]:
    """Of a step whose batch is read in these parts; together: all forward passes before the backward pass."""
    net.zero_grad()
    losses = []
    for part in parts:
        losses.append(net(part, labels=part).loss)
        if not together:
            losses.pop().backward()
    if losses:
        sum(losses).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def test_noise_differs_between_micro_batches_of_a_step_and_repeats_for_the_same_rows():
    tokens = text(4, 12)
    name = "model.backbone.layers.0.kvg_proj.weight"
    net = fresh(**NOISY)
    first, second = gradients(net, [tokens])[name], gradients(net, [tokens])[name]  # rows 0 to 3, then rows 4 to 7
    assert not torch.allclose(first, second, rtol=1e-3)
    assert torch.equal(gradients(fresh(**NOISY), [tokens])[name], first)
    whole = {n: 2 * g for n, g in gradients(fresh(**NOISY), [tokens]).items()}  # a part's loss is its own mean
    for n, g in gradients(fresh(**NOISY), tokens.split(2)).items():
        assert torch.allclose(g, whole[n], rtol=1e-3, atol=1e-5), n


def test_recomputed_layers_repeat_their_noise_when_several_passes_precede_the_backward_pass():
    parts = text(4, 12).split(2)
    want = gradients(fresh(**NOISY), parts)
    for enable in (False, True):
        net = fresh(**NOISY)
        if enable:
            net.activation_checkpointing_enable()
        for name, g in gradients(net, parts, together=True).items():
            assert torch.allclose(g, want[name], rtol=1e-4, atol=1e-6), name
