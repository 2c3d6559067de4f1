"""The door to Transformers: config, models and cache under its names, registered with its Auto classes.

Needs `pip install 'transformer-vq[hub]'`. After `import transformer_vq.hub`, `AutoModelForCausalLM.from_pretrained`
reads what `save_pretrained` wrote.
"""

from transformer_vq.config.extras import need

need("transformers", "transformer_vq.hub")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402  # without it, one line says so

from transformer_vq.hub.cache import TransformerVQCache  # noqa: E402
from transformer_vq.hub.config import TransformerVQHubConfig  # noqa: E402
from transformer_vq.hub.models import TransformerVQForCausalLM, TransformerVQModel  # noqa: E402

__all__ = ["TransformerVQCache", "TransformerVQForCausalLM", "TransformerVQHubConfig", "TransformerVQModel"]

AutoConfig.register(TransformerVQHubConfig.model_type, TransformerVQHubConfig, exist_ok=True)
AutoModel.register(TransformerVQHubConfig, TransformerVQModel, exist_ok=True)
AutoModelForCausalLM.register(TransformerVQHubConfig, TransformerVQForCausalLM, exist_ok=True)
