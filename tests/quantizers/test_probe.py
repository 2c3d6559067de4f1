"""The gradients at the keys, seen from outside the layers."""

import pytest
import torch

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.quantizers import build_quantizer
from transformer_vq.quantizers.probe import KeyProbe


def test_the_share_is_the_ratio_of_both_gradients():
    quantizer = build_quantizer({"kind": "vq", "codes": 5, "commit": 0.25}, 2, 4)
    k = torch.randn(3, 2, 7, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    g = torch.randn(k.shape, generator=torch.Generator().manual_seed(1))
    with KeyProbe({3: quantizer}) as probe:
        result = quantizer(k)
    shares = probe.task_shares((result.quantized * g).sum(), result.loss)
    own = 0.25 * 2 * (k - result.quantized) / (3 * 7)  # ste hands g on as it is
    assert shares == {"layer3/task_share": pytest.approx((g.norm() / own.norm()).item(), rel=1e-5)}
    assert k.grad is None


@pytest.mark.parametrize("checkpointed", [False, True])
def test_looking_changes_nothing(checkpointed):
    config = TransformerVQConfig(
        vocab_size=16,
        layers=2,
        width=16,
        key_dim=8,
        value_dim=16,
        window=4,
        block_len=4,
        quantizer={"kind": "vq", "codes": 4},
        per_layer={"1": {"kind": "none"}},
        checkpoint_activations=checkpointed,
    )
    tokens = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(0))
    outcome = []
    for look in (False, True):
        model = TransformerVQ(config).train()
        with KeyProbe({0: model.layers[0].quantizer}) as probe:
            out = model(tokens[:, :-1], labels=tokens[:, 1:])
        if look:
            assert probe.task_shares(out.loss_lm, out.loss_quantizers)["layer0/task_share"] > 0
        out.loss.backward()
        outcome.append([p.grad for p in model.parameters()] + list(model.layers[0].quantizer.pending()))
    assert all(torch.equal(a, b) for a, b in zip(*outcome, strict=True))


def test_a_layer_without_a_loss_of_its_own_has_no_share():
    quantizer = build_quantizer({"kind": "vq", "codes": 5, "commit": 0.0}, 1, 4)
    k = torch.randn(1, 1, 7, 4, requires_grad=True)
    with KeyProbe({0: quantizer}) as probe:
        result = quantizer(k)
    assert probe.task_shares(result.quantized.sum(), result.loss) == {}
