import datasets
import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Datasets are read from local files only, and their copies go with the test."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
