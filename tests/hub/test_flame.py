"""A stand-in for the platforms of this field (flame on torchtitan): what they do with a model of somebody else.

They build it on the meta device, wrap its layers, allocate, draw the weights by `post_init`, and train on documents
packed into one row, with hooks on the optimizer.
"""

from __future__ import annotations

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

transformers = pytest.importorskip("transformers")
from hub_models import SIZES, text  # noqa: E402

from transformer_vq.hub import TransformerVQForCausalLM, TransformerVQHubConfig  # noqa: E402

VARIANTS = {
    "gau": {"quantizer": {"kind": "vq", "codes": 8, "estimator": "random_rotation", "commit": 0.1}},
    "transformer": {
        "block": "transformer",
        "heads": 4,
        "kv_heads": 2,
        "position": "rotary",
        "conv": 3,
        "tied_embedding": True,
        "quantizer": {"kind": "vq", "codes": 8, "dead_code_threshold": 1.0, "ema": 0.5},
    },
}
WRAPS = {
    "bare": lambda block: block,
    "checkpointed": lambda block: checkpoint_wrapper(block, preserve_rng_state=False),
    "compiled": lambda block: torch.compile(block, backend="eager"),
}


def built(config: TransformerVQHubConfig, wrap) -> TransformerVQForCausalLM:
    """In the platform's order; what `to_empty` allocates holds anything."""
    with torch.device("meta"):
        net = transformers.AutoModelForCausalLM.from_config(config)
    base = getattr(net, net.base_model_prefix)
    assert base.embeddings is net.get_input_embeddings() and base.norm is not None and net.lm_head is not None
    for name, block in list(base.layers.named_children()):
        base.layers.register_module(name, wrap(block))
    net.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 10**9)
        net.post_init()
    return net.train()


def packed(seed: int, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Documents in one row, as the platform's loader hands them on."""
    tokens = text(1, sum(lengths), seed=seed)
    return {
        "input_ids": tokens,
        "labels": tokens,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
    }


def trained(net: TransformerVQForCausalLM, steps: int = 3, accumulation: int = 2) -> list[float]:
    """Losses of some steps by the platform's loop; weights and codebooks have moved."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    before = [quantizer.codebook.clone() for quantizer in net.model.backbone.quantizers]
    seen, losses = [], []
    optimizer.register_step_pre_hook(lambda *_: seen.append(int(net.model.steps)))
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulation):
            loss = net(**packed(10 * step + part, (9, 3, 12))).loss / accumulation
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    assert seen == list(range(steps)) and int(net.model.steps) == steps
    for quantizer, was in zip(net.model.backbone.quantizers, before, strict=True):
        assert not torch.allclose(quantizer.codebook, was)
    return losses


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("wrap", ["bare", "checkpointed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_it_trains_as_the_model_that_is_built_directly(changes, wrap):
    config = TransformerVQHubConfig(model={**SIZES, **changes}, vocab_size=29, seed=3)
    theirs, directly = built(config, WRAPS[wrap]), TransformerVQForCausalLM(config).train()
    want = directly.state_dict()
    begun = {plain(name): tensor.clone() for name, tensor in theirs.state_dict().items()}
    assert begun.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(begun[name], tensor), name
    got, wanted = trained(theirs), trained(directly)
    assert got == pytest.approx(wanted, rel=1e-5)
    for name, tensor in theirs.state_dict().items():
        assert torch.allclose(tensor.double(), want[plain(name)].double(), rtol=1e-4, atol=1e-6), name


def plain(name: str) -> str:
    """A compiled block's tensors have another name."""
    return name.replace("_orig_mod.", "")


def test_documents_of_a_row_and_documents_in_rows_have_one_loss():
    config = TransformerVQHubConfig(model={**SIZES, **VARIANTS["gau"]}, vocab_size=29, seed=3)
    net, row = TransformerVQForCausalLM(config).eval(), packed(0, (8, 8, 8))
    row["labels"] = row["labels"].masked_fill(row["position_ids"] == 0, -100)  # none follows from another document
    rows = row["input_ids"].view(3, 8)
    with torch.no_grad():
        assert net(**row).loss.item() == pytest.approx(net(rows, labels=rows).loss.item(), rel=1e-5)
