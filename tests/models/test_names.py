"""Names in a config that stand for code."""

from __future__ import annotations

import pytest

from transformer_vq.config import ConfigError, TransformerVQConfig
from transformer_vq.models.names import check_names


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantizer": {"estimator": "rotatoin"}}, "model.quantizer.estimator = rotatoin: .*did you mean 'rotation'"),
        ({"per_layer": {"1-2": {"estimator": "exact"}}}, "model.per_layer.1-2.estimator = exact: .*for images only"),
        ({"backend": "blockwize"}, "model.backend = blockwize: .*did you mean 'blockwise'"),
        ({"quantizer": {"kind": "nowhere:Thing", "codes": 4}}, "model.quantizer.kind = nowhere:Thing: .*no module"),
    ],
)
def test_a_name_that_stands_for_nothing_is_named_with_its_key(settings, words):
    with pytest.raises(ConfigError, match=words):
        check_names(TransformerVQConfig(**settings))


def test_a_default_that_every_layer_overrides_is_not_asked_for():
    check_names(TransformerVQConfig(quantizer={"estimator": "nonsense"}, per_layer={"all": {"estimator": "ste"}}))


def test_known_names_and_the_users_own_functions_pass():
    check_names(
        TransformerVQConfig(backend="quadratic", per_layer={"0": {"estimator": "transformer_vq.ops.estimators:apply"}})
    )
