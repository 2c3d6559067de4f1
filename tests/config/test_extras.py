"""A package of an extra that is missing is named, with the pip command that brings it, wherever it is wanted."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from transformer_vq.bench import images as bench_images
from transformer_vq.bench import llama, quantize
from transformer_vq.bench.rivals import Heads, flash, gla
from transformer_vq.config import ConfigError, TransformerVQConfig
from transformer_vq.config.extras import ALONE, EXTRAS, MissingPackage, lack, need, wanted
from transformer_vq.config.images import ImageDataConfig, check_packages
from transformer_vq.config.study import EngineConfig
from transformer_vq.convert import files
from transformer_vq.data.tokenizers import sentencepiece, tiktoken
from transformer_vq.images.sources import arrays
from transformer_vq.ops.attention import resolve_backend
from transformer_vq.studies import engines
from transformer_vq.training.trackers import check_trackers

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "backports": "backports.zstd"}
GUARDED = {"flash_attn_interface", "compression", "fsspec"}
"""A kernel that is looked for before; a part of newer Pythons; what datasets brings."""


def names(requirements):
    return {r.replace("[", " ").replace(">", " ").replace("=", " ").replace(";", " ").split()[0] for r in requirements}


def distribution(module):
    return DISTRIBUTIONS.get(module, module.replace("_", "-"))


def imported(path):
    """Top-level modules that a file imports, through `need` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "need":
            yield node.args[0].value.partition(".")[0]


def test_every_import_is_of_a_dependency_or_has_a_command_that_brings_it():
    core = names(PROJECT["dependencies"])
    for path in (ROOT / "transformer_vq").rglob("*.py"):
        for module in imported(path):
            known = module in sys.stdlib_module_names or module in {"transformer_vq", *GUARDED}
            assert known or distribution(module) in core or wanted(module), f"{path.name}: {module}"


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_it_is_said_to_bring(extra):
    found = names(PROJECT["optional-dependencies"][extra])
    for module in set(EXTRAS[extra]) - {"torch_fidelity"}:  # comes with torchmetrics[image]
        assert distribution(module) in found or f"{module}-checkpoint" in found, module


WANTED = {
    "sklearn.datasets": lambda: arrays.digits(ImageDataConfig(source="digits")),
    "sentencepiece": lambda: sentencepiece.SentencePieceTokenizer(b"", "a.model"),
    "tiktoken": lambda: tiktoken.from_package("gpt2"),
    "submitit": lambda: next(iter(engines.submitit_([], 1, EngineConfig()))),
    "ray": lambda: next(iter(engines.ray_([], 1, EngineConfig()))),
    "transformers": lambda: llama.llama(TransformerVQConfig(vocab_size=8)),
    "vector_quantize_pytorch": lambda: bench_images.run(),
}


@pytest.mark.parametrize("module", WANTED)
def test_what_wants_a_package_names_the_command(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage) as caught:
        WANTED[module]()
    assert str(caught.value).endswith(f"pip install {wanted(module)}") and "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError) and isinstance(caught.value, ImportError)


def test_the_quantizers_bench_orbax_trackers_and_pictures_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(MissingPackage, match=r"vector-quantize-pytorch==1.32.0"):
        quantize.run()
    (tmp_path / files.ABOUT).write_text("{}")
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(MissingPackage, match=r"pip install 'transformer-vq\[orbax\]'"):
        files._restore(tmp_path)
    monkeypatch.setattr("transformer_vq.training.trackers.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"trackers = wandb.*pip install 'transformer-vq\[tracking\]'"):
        check_trackers(["wandb"])
    monkeypatch.setattr("transformer_vq.config.images.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"torchmetrics: pip install 'transformer-vq\[images\]'"):
        check_packages()


def test_backends_and_rivals_say_it_in_the_same_words(monkeypatch):
    hidden = {"triton": "gpu", "flash_attn": "flash"}
    for name in (*hidden, "flash_attn_interface", "fla"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: False)
    for backend, (module, extra) in zip(("triton", "flash"), hidden.items(), strict=True):
        with pytest.raises(ValueError, match=f"^backend {backend}: needs {module}: pip install") as caught:
            resolve_backend(backend, "cuda", 9, 4, 3)
        assert lack(module) in str(caught.value) and f"'transformer-vq[{extra}]'" in lack(module)
    heads = Heads(*[torch.zeros(1, 1, 2, 4)] * 4)
    assert flash(heads) == lack("flash_attn") and gla(heads) == lack("fla")


def test_the_command_line_says_it_in_one_line():
    script = (
        "import sys; sys.modules['statsmodels'] = sys.modules['transformers'] = None\n"
        "from transformer_vq.cli import run\n"
        "sys.exit(run(['study', 'report', 'studies/estimators-tiny', 'run_dir=/nowhere']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=False, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().endswith("pip install 'transformer-vq[studies]'") and "Traceback" not in done.stderr
    script = "import sys; sys.modules['transformers'] = None; import transformer_vq.hub"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=False, cwd=ROOT)
    assert done.stderr.strip().endswith("transformer_vq.hub: needs transformers: pip install 'transformer-vq[hub]'")


def test_an_import_that_fails_for_another_reason_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_package.py").write_text("import no_such_module_at_all")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        need("broken_package", "a test")
    assert not ALONE.keys() & {module for modules in EXTRAS.values() for module in modules}
