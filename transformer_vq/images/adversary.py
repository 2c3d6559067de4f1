"""The adversarial part of a VQ-GAN  [Esser 2012.09841; hinge loss of Lim 1705.02894].

The autoencoder's turn sees the discriminator's weights as constants; the discriminator's turn sees the reconstructions
of the same batch, detached. Before `gan.start` the discriminator sits out and is not listened to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from transformer_vq.config.images import GANConfig

LARGEST_BALANCE = 1e4


def frozen(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) with its parameters as constants: the gradient reaches x alone."""
    constants = {name: p.detach() for name, p in module.named_parameters()}
    out: Tensor = functional_call(module, constants, (x,))
    return out


def generator_term(
    discriminator: nn.Module, fake: Tensor, reconstruction: Tensor, last_layer: Tensor, config: GANConfig
) -> tuple[Tensor, Tensor]:
    """The autoencoder's term, weights included, and the weight that was used; scalars.

    fake (B, C, h, w) with gradient; `reconstruction` the scalar loss whose gradient at `last_layer`, the weight of the
    decoder's last convolution, the adaptive weight is measured against.
    """
    term = -frozen(discriminator, fake).mean()
    weight = term.new_tensor(config.weight)
    if config.adaptive:
        (a,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        (b,) = torch.autograd.grad(term, last_layer, retain_graph=True)
        weight = weight * (a.norm() / (b.norm() + 1e-4)).clamp(0, LARGEST_BALANCE).detach()
    return weight * term, weight


def discriminator_term(on_real: Tensor, on_fake: Tensor, loss: str) -> Tensor:
    """Logits of real and reconstructed pictures -> the discriminator's loss, hinge or vanilla."""
    if loss == "hinge":
        return 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())
    return 0.5 * (F.softplus(-on_real).mean() + F.softplus(on_fake).mean())
