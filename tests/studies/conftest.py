"""A study in a temporary folder, whose runs are the toy's."""

from __future__ import annotations

import pytest
import yaml

from transformer_vq.studies import kinds

BASE = {"model": {"layers": 2, "width": 32, "key_dim": 8, "value_dim": 16}, "train": {"steps": 20, "lr": 0.01}}


@pytest.fixture
def write_toy(tmp_path, monkeypatch):
    kind = kinds.Kind("transformer_vq.config:RunConfig", "toy_runs:run", "train")
    monkeypatch.setitem(kinds.KINDS, "model", kind)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))

    def write_study(*estimators, **settings):
        study = {
            "question": "Which?",
            "base": str(tmp_path / "base.yaml"),
            "run_dir": str(tmp_path / "out"),
            "seeds": [0, 1],
            "factors": {"model.quantizer.estimator": list(estimators or ["ste", "rotation"])},
            **settings,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(study, sort_keys=False))
        return path

    return write_study
