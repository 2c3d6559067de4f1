"""What a run is said to take is what it takes: peaks of real steps, by PyTorch's own record of what it allocates."""

from __future__ import annotations

import json

import pytest
import torch
from peaks import allocated, peaks_of_steps, sizes
from tiny_run import tiny_run

from transformer_vq.cli import run as command
from transformer_vq.config import TransformerVQConfig
from transformer_vq.models import TransformerVQ
from transformer_vq.models.decoding import Decoder
from transformer_vq.models.footprint import DTYPES, decoding, training
from transformer_vq.ops.inside import kernels_run
from transformer_vq.training import memory, run

SHAPE = {
    "train.seq_len": 256, "train.batch_size": 8, "train.steps": 2, "data.document_separator": None,
    "model.width": 96, "model.key_dim": 32, "model.value_dim": 128, "model.window": 32, "model.block_len": 32,
    "model.quantizer": {"kind": "vq", "codes": 64, "estimator": "rotation", "init": "data"},
}  # fmt: skip
CASES = {
    "gau, xl": {"model.heads": 1},
    "transformer, grouped, bf16": {
        "model.block": "transformer", "model.heads": 4, "model.value_dim": 32, "model.position": "rotary",
        "train.precision": "bf16",
    },
    "streams in micro-batches, recomputed": {
        "data.order": "streams", "train.micro_batch": 4, "model.checkpoint_activations": True, "model.conv": 4,
    },
    "full attention, dropout": {"model.quantizer": {"kind": "none"}, "model.dropout_residual": 0.1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Each thread of attention's has scratch memory of its own, which cannot be cleared from here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SOON = ("gau, xl", "full attention, dropout")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in SOON else pytest.mark.slow) for c in CASES])
def test_a_step_takes_what_is_said(case, tmp_path, monkeypatch):
    settings = tiny_run(tmp_path, **{key.replace(".", "__"): value for key, value in (SHAPE | CASES[case]).items()})
    model = settings.model.model_copy(update={"vocab_size": 256})
    said = memory.training_memory(settings.model_copy(update={"model": model}), "cpu")
    found = peaks_of_steps(monkeypatch)
    run(settings, quiet=True)
    print(f"{case}: {said.total / 2**20:.2f} MiB said, {found[-1] / 2**20:.2f} measured, at {said.peak}")
    assert said.total == pytest.approx(found[-1], rel=0.2)
    parts = (said.parameters, said.optimizer, said.state, said.gradients, said.activations, said.working)
    assert said.total == sum(parts)


READERS = {
    "vq": {},
    "mixed, grouped": {"layers": 3, "heads": 4, "kv_heads": 2, "value_dim": 32, "per_layer": {"1": {"kind": "none"}}},
    "transformer, rotary": {"block": "transformer", "position": "rotary", "heads": 2, "value_dim": 48},
}


TYPED = [(name, dtype) for name in READERS for dtype in ("fp32", "bf16") if (name, dtype) != ("mixed, grouped", "bf16")]
"""Full attention in bf16 on a CPU takes a copy of its mask inside of PyTorch's kernel, which nobody sees."""


@pytest.mark.parametrize(("name", "dtype"), TYPED)
def test_a_token_and_a_prompt_take_what_is_said(name, dtype):
    settings = reader(**READERS[name])
    said = decoding(settings, 3, 200, 64, dtype=dtype)
    model = TransformerVQ(settings).to(DTYPES[dtype]).eval()
    with torch.no_grad(), model.frozen():
        tokens = torch.zeros(3, 200, dtype=torch.int64)
        state = model(tokens).state
        kept = allocated(lambda: model.decoder(tokens[:, :1]))  # what depends on weights alone
        for part, n, logits in ((said.token, 1, True), (said.prompt, 64, False)):
            took = allocated(lambda n=n, logits=logits: model(tokens[:, :n], state=state, logits=logits))
            assert part == pytest.approx(took, rel=0.2)
        assert said.state == pytest.approx(sum(sizes(layer) for layer in state.layers), rel=0.02)
    own = sizes(model.parameters()) + sizes(model.buffers())
    assert said.parameters == pytest.approx(own + kept, rel=0.1)
    assert said.total == said.parameters + said.state + max(said.token, said.prompt)


@pytest.mark.skipif(not kernels_run(), reason="needs triton, and no GPU that is too old")
@pytest.mark.parametrize("name", ["vq", "transformer, rotary"])
def test_on_a_gpu_a_ring_is_counted(name):
    """It can be opened anywhere; the kernels that write it run on GPUs."""
    settings = reader(**READERS[name])
    said, copied = (decoding(settings, 3, 200, 64, device=device) for device in ("cuda", "cpu"))
    model = TransformerVQ(settings).eval()
    tokens = torch.zeros(3, 200, dtype=torch.int64)
    with torch.no_grad():
        state = model(tokens).state
        decoder = Decoder(model.embedding, None, model.layers, model.norm, in_place=True)
        ring = allocated(lambda: decoder.open(state, tokens[:, :1]))
    assert ring < said.token < 1.2 * ring < copied.token


def reader(**more):
    sizes = {"layers": 2, "width": 64, "key_dim": 32, "value_dim": 96, "window": 32, "quantizer": {"codes": 64}}
    return TransformerVQConfig(vocab_size=256, **{**sizes, **more})


class TestWarning:
    @pytest.fixture
    def settings(self, tmp_path):
        return tiny_run(tmp_path, model__vocab_size=256)

    def test_silent_where_it_fits(self, settings, monkeypatch):
        assert memory.complaint(settings, "cpu") is None
        needed = memory.training_memory(settings, "cpu").total
        monkeypatch.setattr(memory, "available", lambda device: needed)
        assert memory.complaint(settings, "cpu") is None
        monkeypatch.setattr(memory, "available", lambda device: needed - 1)
        assert "may not fit" in memory.complaint(settings, "cpu")

    def test_processes_share_a_machine(self, settings, monkeypatch):
        alone = memory.training_memory(settings, "cpu", 2).total
        monkeypatch.setattr(memory, "available", lambda device: alone + 1)
        assert memory.complaint(settings, "cpu", 2) is not None
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        assert memory.complaint(settings, "cpu", 2) is None

    def test_dry_run_and_train_say_it_and_go_on(self, tmp_path, monkeypatch, capsys):
        settings = tiny_run(tmp_path, train__steps=1)
        monkeypatch.setattr(memory, "available", lambda device: 1000)
        run(settings)
        assert "warning" in (told := capsys.readouterr().err) and "a step takes about" in told
        assert command(["train", settings.run_dir, "run_dir=" + str(tmp_path / "other"), "--dry-run", "--json"]) == 0
        assert "a step takes about" in json.loads(capsys.readouterr().out)["short_of_memory"]

    def test_rough_is_more_than_what_it_stands_for(self, tmp_path):
        for case in CASES.values():
            changes = {key.replace(".", "__"): value for key, value in (SHAPE | case).items()}
            settings = tiny_run(tmp_path, model__vocab_size=256, **changes)
            needed = memory.training_memory(settings, "cpu").total
            assert memory.roughly(settings, 1) * memory.CLEARLY_FITS > needed

    def test_warming_up_needs_full_attention(self, tmp_path):
        late = {"kind": "vq", "codes": 8, "start_step": 5}
        settings = tiny_run(tmp_path, model__vocab_size=256, train__seq_len=512, model__quantizer=late)
        full = tiny_run(tmp_path, model__vocab_size=256, train__seq_len=512, model__quantizer={"kind": "none"})
        at_least = memory.training_memory(full, "cpu").activations
        assert memory.training_memory(settings, "cpu").activations >= at_least

    def test_somebodys_module_that_reads_numbers_does_not_stop_a_run(self, settings, monkeypatch):
        def fails(*_, **__):
            raise RuntimeError("data-dependent")

        monkeypatch.setattr(memory, "training_memory", fails)
        monkeypatch.setattr(memory, "available", lambda device: 1)
        assert memory.complaint(settings, "cpu") is None


@pytest.mark.parametrize(("value_dim", "precision"), [(192, "fp32"), (384, "bf16")], ids=["blockwise", "wide"])
def test_on_a_gpu_more_is_worked_on_at_once(value_dim, precision):
    """65,536 queries in place of 4,096 (`wide`: 16,384), whether there is one here or not."""
    config = TransformerVQConfig(vocab_size=64, layers=1, width=32, key_dim=96, value_dim=value_dim, window=128)
    cpu, gpu = (training(config, 4, 16_384, precision=precision, device=device) for device in ("cpu", "cuda"))
    assert gpu.layers[0].kept == pytest.approx(cpu.layers[0].kept, rel=0.5)  # notes of chunks differ
    logits = 4 * (config.window + 128 + 128)  # bytes a query
    more = (65_536 if precision == "fp32" else 16_384) - 4096
    assert gpu.layers[0].backward - cpu.layers[0].backward > more * logits
