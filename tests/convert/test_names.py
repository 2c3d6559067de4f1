"""The paper's own implementation, number by number: golden files hold its inputs, results, gradients and states."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.convert.names import from_reference, reference_config, state_to_reference, to_reference

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "golden"
FILES = sorted((SHARED if SHARED.is_dir() else REPOSITORY / "tests" / "golden").glob("*.npz"))
FILE = pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)


class Golden:
    """One file: `config`, `params`, and per window what goes in and what came out."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as arrays:
            self.arrays = dict(arrays)
        self.config = json.loads(bytes(self.arrays["config_json"]).decode())
        self.params = self.below("params/")
        self.windows = range(self.config["windows"])

    def below(self, prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): a for name, a in self.arrays.items() if name.startswith(prefix)}

    def model(self, **changes) -> TransformerVQ:
        """The file's model with some of our settings changed."""
        model = from_reference(self.params, self.config)
        changed = TransformerVQ(model.config.model_copy(update=changes)).double()
        changed.load_state_dict(model.state_dict())
        return changed

    def run(self, model: TransformerVQ):
        """Every window in turn, the state carried: (window's prefix, Output), with gradients of that window alone."""
        state = None
        for window in self.windows:
            model.zero_grad()
            model.discard_codebook_statistics()
            tokens, labels = (torch.from_numpy(self.arrays[f"window{window}/tokens_{way}"]) for way in ("in", "out"))
            out = model(tokens, state=state, labels=labels)
            out.loss.backward()
            yield f"window{window}/", out
            state = out.state


def tensors(arrays) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(a).double() for name, a in arrays.items()}


def check_forward(golden: Golden, prefix: str, out) -> None:
    got = {
        "logprobs": out.logits.log_softmax(-1),
        "loss_lm": out.loss_lm,
        "loss_commit": out.loss_commit,
        "loss_total": out.loss,
    }
    want = {name: golden.arrays[prefix + name] for name in got}
    assert_same(tensors({name: x.detach() for name, x in got.items()}), tensors(want), rtol=1e-5)
    assert_same(tensors(state_to_reference(out.state)), tensors(golden.below(f"{prefix}state/")), rtol=1e-5)


def check_gradients(golden: Golden, prefix: str, model: TransformerVQ) -> None:
    """A gradient that is zero in the file (bias_out of an untied model) must be zero here."""
    assert_same(tensors(to_reference(model, "grads")), tensors(golden.below(f"{prefix}grad/")), rtol=1e-5)


def test_golden_files_are_there():
    assert len(FILES) >= 2


@FILE
@pytest.mark.parametrize("backend", ["quadratic", "blockwise", "recurrent"])
def test_everything_equals_the_reference(file, backend):
    golden = Golden(file)
    model = golden.model(backend=backend)
    for prefix, out in golden.run(model):
        check_forward(golden, prefix, out)
        check_gradients(golden, prefix, model)


@FILE
@pytest.mark.parametrize("block_len", [1, 3, 8, 64])
def test_forward_does_not_depend_on_block_length(file, block_len):
    golden = Golden(file)
    model = golden.model(backend="blockwise", block_len=block_len)
    for prefix, out in golden.run(model):
        check_forward(golden, prefix, out)
        names = [name for name in golden.params if "/quantizer/" in name]  # EMA targets do not depend on it either
        got, want = to_reference(model, "grads"), golden.below(f"{prefix}grad/")
        assert_same(tensors({n: got[n] for n in names}), tensors({n: want[n] for n in names}), rtol=1e-5)


@FILE
def test_parameters_come_out_as_they_went_in(file):
    golden = Golden(file)
    got = to_reference(from_reference(golden.params, golden.config))
    assert got.keys() == golden.params.keys()
    for name, array in got.items():
        assert array.dtype == golden.params[name].dtype
        np.testing.assert_array_equal(array, golden.params[name], err_msg=name)


def test_one_step_of_statistics_is_the_reference_step():
    """c_new = old − grad: applying what is pending moves the buffers to the EMA targets of the file."""
    golden = Golden(FILES[0])
    model = golden.model()
    prefix, _ = next(golden.run(model))
    model.apply_codebook_statistics()
    got, gradients = to_reference(model), golden.below(f"{prefix}grad/")
    for name in (n for n in golden.params if "/quantizer/" in n):
        want = golden.params[name] - gradients[name]
        assert_same(tensors({name: got[name]}), tensors({name: want}), rtol=1e-6)


def test_dtype_of_the_arrays_is_the_model_s():
    golden = Golden(FILES[0])
    model = from_reference({name: a.astype(np.float32) for name, a in golden.params.items()}, golden.config)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_missing_unknown_and_misshapen_parameters_are_named():
    golden = Golden(FILES[0])
    first = "transformer_layers_0/scanned_attn1/u"
    with pytest.raises(ValueError, match=f"missing: {first};"):
        from_reference({n: a for n, a in golden.params.items() if n != first}, golden.config)
    with pytest.raises(ValueError, match="unknown with this config: spare"):
        from_reference({**golden.params, "spare": np.zeros(1)}, golden.config)
    with pytest.raises(ValueError, match=f"{first} has shape \\(3,\\)"):
        from_reference({**golden.params, first: np.zeros(3)}, golden.config)
    with pytest.raises(ValueError, match="lack 'd_model'"):
        reference_config({n: x for n, x in golden.config.items() if n != "d_model"})


def test_a_model_the_reference_cannot_hold_is_refused():
    config = TransformerVQConfig(vocab_size=5, layers=1, width=8, key_dim=4, value_dim=4, position="none", window=2)
    with pytest.raises(ValueError, match="position: none, an odd number of layers, 1"):
        to_reference(TransformerVQ(config))


def test_codebooks_of_several_sizes_are_refused():
    sizes = {
        "layers": 2,
        "width": 8,
        "key_dim": 4,
        "value_dim": 4,
        "window": 2,
        "quantizer": {"kind": "vq", "codes": 3},
    }
    model = TransformerVQ(TransformerVQConfig(vocab_size=5, per_layer={"1": {"codes": 4}}, **sizes))
    with pytest.raises(ValueError, match="codes that differ from layer to layer"):
        to_reference(model)
