"""Every study that is shipped can be planned; the -tiny forms are small."""

from __future__ import annotations

import pytest

from transformer_vq.config.load import recipes
from transformer_vq.studies.plan import load_study

STUDIES = [name for name in recipes() if name.startswith("studies/")]


@pytest.mark.parametrize("name", STUDIES)
def test_can_be_planned(name):
    study = load_study(name)
    assert study.design.arms and study.settings.question
    assert study.folder.name == name.removeprefix("studies/")
    if name.endswith("-tiny"):
        assert study.size() <= 40


def test_studies_of_language_models_have_a_tiny_form():
    whole = {name for name in STUDIES if not name.startswith(("studies/toy-", "studies/images-"))}
    assert {f"{name.removesuffix('-tiny').removesuffix('-small')}-tiny" for name in whole} <= set(STUDIES)
