"""The VQ-VAE and VQ-GAN benchmark of estimators and quantizers: models and batches for the one training loop."""

from transformer_vq.images.model import ImageModel, Reconstruction
from transformer_vq.images.sources import ImageCorpus, open_corpus
from transformer_vq.images.task import ImageTask, run

__all__ = ["ImageCorpus", "ImageModel", "ImageTask", "Reconstruction", "open_corpus", "run"]
