"""Settings of a toy run: an autoencoder of synthetic vectors with one quantizer, for questions about estimators."""

from __future__ import annotations

from pydantic import Field

from transformer_vq.config.base import Settings
from transformer_vq.config.quantizer import QuantizerConfig, VQConfig
from transformer_vq.config.run import CheckpointConfig, EvalConfig, OptimizationConfig


class ToyConfig(Settings):
    """Points of a Gaussian mixture -> encoder -> key -> quantizer -> decoder -> points; the loss is their MSE."""

    clusters: int = Field(256, ge=1, description="components of the mixture, centres from a standard normal")
    dim: int = Field(16, ge=1, description="width of a point")
    noise: float = Field(0.1, ge=0, description="standard deviation of a point about its centre")
    train_points: int = Field(32768, ge=1, description="points that training draws from")
    test_points: int = Field(8192, ge=1, description="points of each of valid and test")
    hidden: int = Field(64, ge=1, description="hidden units of encoder and decoder")
    key_dim: int = Field(16, ge=1, description="width of a key (K)")
    key_scale: float = Field(
        1.0, gt=0, description="keys are multiplied by it, so that codes are short or long beside them"
    )
    shift: float = Field(0.0, description="added to every entry of a key before the quantizer, taken off after it")
    quantizer: QuantizerConfig = Field(VQConfig(codes=64), description="as in `model.quantizer`")


class ToyRunConfig(Settings):
    """A toy run, the whole config file."""

    seed: int = Field(0, ge=0, lt=2**63, description="of everything random: mixture, weights, batches")
    run_dir: str = Field("runs/toy", min_length=1, description="the one folder that a run writes to")
    toy: ToyConfig = ToyConfig()
    train: OptimizationConfig = OptimizationConfig(steps=600, batch_size=256, lr=2e-3, warmup=20, log_every=20)
    eval: EvalConfig = EvalConfig(every=None)
    checkpoint: CheckpointConfig = CheckpointConfig(every=None, keep=1)
