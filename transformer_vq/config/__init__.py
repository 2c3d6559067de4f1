"""Every setting: type, default, bound and one-line meaning. No torch in here."""

from transformer_vq.config.base import ConfigError, Settings
from transformer_vq.config.load import load_config, save_config, validate
from transformer_vq.config.model import TransformerVQConfig
from transformer_vq.config.run import CheckpointConfig, DataConfig, EvalConfig, RunConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "RunConfig",
    "Settings",
    "TrainConfig",
    "TransformerVQConfig",
    "load_config",
    "save_config",
    "validate",
]
