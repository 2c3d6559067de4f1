"""Settings of an image run: `images:` in place of `model:`, with the same `quantizer:` block.

Loss conventions. The reconstruction loss is the mean over images, channels and pixels in [-1, 1]. `quantizer.commit`
weighs a *sum* over the code's width, as everywhere in this package; most VQ-VAE code (the rotation paper's included)
takes the mean, so that their commitment weight 1.0 at width K is `commit: 1/K` here.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field, model_validator

from transformer_vq.config.base import Settings
from transformer_vq.config.extras import MissingPackage, lack
from transformer_vq.config.quantizer import KeyQuantizer, QuantizerConfig, SimVQConfig, VQConfig
from transformer_vq.config.run import CheckpointConfig, OptimizationConfig

TWICE_DECODED = ("exact", "hessian")
OFF_CODEBOOK = ("nsvq", "diveq_noise", "sf_diveq")
IMAGE_ESTIMATORS = (*OFF_CODEBOOK, *TWICE_DECODED)
ONE_CODEBOOK = (*OFF_CODEBOOK, "rotation_centred", "gumbel", "reinmax", "ibq")


class ImageDataConfig(Settings):
    """Where pictures come from and how they are made alike."""

    source: str = Field(
        "builtin",
        min_length=1,
        description="builtin: Fashion-MNIST where Debian's dataset-fashion-mnist put it, else scikit-learn's digits | "
        "fashion-mnist | digits | a folder of pictures or of idx files | a .npz file of arrays train, train_images or "
        "x_train, ... | "
        "cifar10, imagenet, celeba-hq, ffhq | hf:NAME[/CONFIG]",
    )
    size: int | None = Field(
        None,
        ge=1,
        description="shorter side is resized to it and the centre cut out; null: as they are, all alike",
    )
    channels: Literal[1, 3] | None = Field(
        None, description="1: grey | 3: colour, others are converted; null: as they are, all alike"
    )
    flip: bool = Field(False, description="mirror half of the training pictures")
    shift: int = Field(0, ge=0, description="move training pictures by up to this many pixels, reflected at the edges")
    max_images: int | None = Field(None, ge=1, description="keep at most this many pictures of each split")
    max_eval_images: int | None = Field(None, ge=1, description="the same of valid and of test alone")
    cache: str | None = Field(
        None, description="folder of the trained metric classifiers; null: the user's cache folder"
    )


class GANConfig(Settings):
    """A PatchGAN discriminator beside the autoencoder: the VQ-GAN  [Esser 2012.09841]."""

    start: int = Field(0, ge=0, description="optimizer step from which the discriminator learns and is listened to")
    weight: float = Field(0.75, ge=0, description="weight of the generator's term, times the adaptive weight")
    adaptive: bool = Field(
        True, description="scale the term by ‖∇rec‖/‖∇gan‖ at the decoder's last layer; false: by weight alone"
    )
    loss: Literal["hinge", "vanilla"] = Field("hinge", description="of the discriminator")
    width: int = Field(64, ge=1, description="channels of the discriminator's first layer")
    layers: int = Field(3, ge=1, description="halvings; each patch sees about 2^(layers+2) pixels a side")


class ImagesConfig(Settings):
    """A convolutional VQ-VAE  [van den Oord 1711.00937; blocks of Esser 2012.09841]: the keys of `images:`."""

    patch: int = Field(1, ge=1, description="squares of patch x patch pixels become channels first: cheaper by patch²")
    width: int = Field(64, ge=1, description="channels at the highest resolution")
    multipliers: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 2, 2],
        min_length=1,
        description="factor on width per resolution; each after the first halves the picture",
    )
    blocks: int = Field(1, ge=1, description="residual blocks per resolution; the decoder has one more")
    attention: Literal["none", "middle", "lowest"] = Field(
        "none", description="self-attention: none | middle: between the two middle blocks | lowest: there too"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="inside the residual blocks")
    latent_channels: int | None = Field(
        None, ge=1, description="channels around the quantizer, projected to code_dim and back; null: code_dim"
    )
    code_dim: int = Field(32, ge=1, description="width of what is quantized, over all products (K)")
    product: int = Field(1, ge=1, description="code_dim is cut into this many parts with a codebook each")
    residual: int = Field(1, ge=1, description="codebooks one after another, each on what the ones before left over")
    reconstruction: Literal["mse", "l1"] = Field("mse", description="reconstruction loss, a mean over everything")
    perceptual_weight: float = Field(
        0.0, ge=0, description="of LPIPS, where torchvision and its weights are at hand; the run says where they aren't"
    )
    gan: GANConfig | None = Field(None, description="VQ-GAN: a discriminator; null: a plain VQ-VAE")
    quantizer: QuantizerConfig = Field(
        VQConfig(codes=256, commit=1 / 32), description="what a grid cell becomes; the block of the language model"
    )

    @model_validator(mode="after")
    def _fits(self) -> ImagesConfig:
        if self.code_dim % self.product:
            raise ValueError(f"product = {self.product}: must divide code_dim = {self.code_dim}")
        if self.residual > 1 and not isinstance(self.quantizer, VQConfig | SimVQConfig):
            raise ValueError(f"residual = {self.residual}: needs quantizer.kind vq or simvq, not {self.quantizer.kind}")
        return self

    @model_validator(mode="after")
    def _estimator_has_what_it_needs(self) -> ImagesConfig:
        name = getattr(self.quantizer, "estimator", None)
        if name in OFF_CODEBOOK:
            if not isinstance(self.quantizer, VQConfig) or self.quantizer.codebook != "gradient":
                raise ValueError(f"quantizer.estimator = {name}: needs kind: vq with codebook: gradient")
            if name == "sf_diveq" and self.quantizer.codes < 2:
                raise ValueError("quantizer.estimator = sf_diveq: needs at least 2 codes")
        if self.residual > 1 and name in ONE_CODEBOOK:
            raise ValueError(f"quantizer.estimator = {name}: needs residual: 1, it looks at one codebook")
        if name in TWICE_DECODED and (self.gan is not None or self.perceptual_weight):
            raise ValueError(f"quantizer.estimator = {name}: needs gan: null and perceptual_weight: 0.0")
        if isinstance(self.quantizer, KeyQuantizer) and self.quantizer.start_step and self.residual > 1:
            raise ValueError(f"quantizer.start_step = {self.quantizer.start_step}: needs residual: 1")
        return self

    @property
    def factor(self) -> int:
        """Pixels of a picture's side per cell of the grid."""
        return self.patch << (len(self.multipliers) - 1)


class ImageEvalConfig(Settings):
    """Evaluation during training and after it."""

    every: int | None = Field(
        200, ge=1, description="steps between evaluations on the valid split; null: only at the end"
    )
    batch_size: int = Field(100, ge=1, description="pictures per forward pass; usage per batch is counted over these")
    max_images: int | None = Field(None, ge=1, description="during training, only this many; null: the whole split")
    frechet: Literal["auto", "inception", "classifier", "none"] = Field(
        "auto",
        description="inception: FID and Inception score, weights must be at hand | classifier: distance on the "
        "features of a classifier trained here on the same data | auto: the first that can be had",
    )
    classifier_steps: int = Field(600, ge=1, description="training steps of that classifier (256 pictures each)")
    lpips: bool = Field(False, description="LPIPS too; needs torchvision and its weights at hand")


class ImageRunConfig(Settings):
    """An image run, the whole config file."""

    seed: int = Field(0, ge=0, lt=2**63, description="of everything random: weights, batches, noise")
    run_dir: str = Field("runs/images", min_length=1, description="the one folder that a run writes to")
    data: ImageDataConfig = ImageDataConfig()
    images: ImagesConfig = ImagesConfig()
    train: OptimizationConfig = OptimizationConfig()
    eval: ImageEvalConfig = ImageEvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _pictures_make_a_grid(self) -> ImageRunConfig:
        if self.data.size is not None:
            check_grid(self.images, self.data.size, self.data.size)
        return self


def check_packages() -> None:
    """Raises MissingPackage where the package of the extra `images` that every run needs is not installed."""
    if find_spec("torchmetrics") is None:
        raise MissingPackage(lack("torchmetrics", "images"))


def check_grid(images: ImagesConfig, height: int, width: int) -> None:
    """Raises ValueError when pictures of that size do not come out as a grid of whole cells."""
    if height % images.factor or width % images.factor:
        raise ValueError(
            f"images.multipliers = {images.multipliers} with patch = {images.patch}: a cell is {images.factor} pixels "
            f"wide, {height}x{width} pictures make no whole grid"
        )
