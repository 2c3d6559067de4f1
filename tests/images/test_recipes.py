"""What is shipped is valid: a recipe or study that is renamed or mistyped is noticed here."""

from __future__ import annotations

import pytest

from transformer_vq.config import load_config
from transformer_vq.config.images import ImageRunConfig
from transformer_vq.config.load import recipes
from transformer_vq.studies.plan import load_study


@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("images/")])
def test_recipes_load_and_write_to_folders_of_their_own(name):
    config = load_config(name, [], ImageRunConfig)
    assert config.run_dir.startswith("runs/")


def test_recipes_have_the_papers_grids():
    for name, grid, codes in (("imagenet256-1024x32", (16, 32), 1024), ("imagenet256-8192x3", (64, 3), 8192)):
        images = load_config(f"images/{name}", [], ImageRunConfig).images
        assert (256 // images.factor, images.code_dim) == grid and images.quantizer.size == codes
        assert images.quantizer.commit * images.code_dim == pytest.approx(1)


@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("studies/images-")])
def test_studies_plan(name):
    assert len(load_study(f"configs/{name}.yaml").design.arms) >= 4
