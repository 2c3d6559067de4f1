"""Memory and traffic on paper, held against what two real processes keep and send."""

from __future__ import annotations

import json

import pytest
from many_processes import TESTS, torchrun
from tiny_run import tiny_run

from transformer_vq.bench import scaling
from transformer_vq.bench.scaling import Layout, Line, Numbers, kept, layouts, needed, numbers, sent
from transformer_vq.config import RunConfig, load_config
from transformer_vq.models import footprint

SHAPE = {"train__steps": 3, "train__batch_size": 2, "model__width": 32, "model__layers": 3}
CASES = {"none": {}, "full": {"train__shard": "full"}}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run each way, by two processes in one launch: what each process found."""
    folder = tmp_path_factory.mktemp("two")
    configs = {name: tiny_run(folder, name, **SHAPE, **settings) for name, settings in CASES.items()}
    todo = folder / "configs.json"
    todo.write_text(json.dumps([config.model_dump(mode="json") for config in configs.values()]), encoding="utf-8")
    torchrun(2, str(TESTS / "bench" / "scaling_processes.py"), str(todo))
    found = {n: [json.loads((folder / n / f"traffic-{r}.json").read_text()) for r in (0, 1)] for n in configs}
    return configs["none"].model.model_copy(update={"vocab_size": 256}), found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("shard", CASES)
def test_two_processes_keep_and_send_what_the_formulas_say(two, shard):
    config, found = two
    of, layout = numbers(config), Layout(2, shard)
    for mine in found[shard]:
        for name, size in kept(of, layout).items():
            if name != "exchange":
                assert mine[name] == size, name
        moved, ours = sent(of, layout), mine["sent"]
        ring = {"allreduce_": 2 * 1 / 2, "_allgather_base_": 1 / 2, "_reduce_scatter_base_": 1 / 2}
        floats = {name: n * ring[name.split()[0]] for name, n in ours.items() if name.endswith(" float32")}
        assert sum(floats.values()) == moved["parameters"] + moved["statistics"]
        others = sum(ours.values()) - sum(n for name, n in ours.items() if name.endswith(" float32"))
        assert 0 < others < 1000  # counts of tokens, and the numbers of the record
        gathers = {name for name in ours if "base" in name}
        assert gathers == ({"_allgather_base_ float32", "_reduce_scatter_base_ float32"} if shard == "full" else set())


@pytest.mark.slow
@pytest.mark.distributed
def test_two_machines_of_two_keep_and_send_what_the_formulas_say(tmp_path, monkeypatch):
    """What is handed to collectives, since rings of a machine and between machines have another share of it each."""
    config = tiny_run(tmp_path, "hybrid", **{**SHAPE, "train__batch_size": 4, "train__shard": "hybrid"})
    (tmp_path / "configs.json").write_text(json.dumps([config.model_dump(mode="json")]), encoding="utf-8")
    monkeypatch.setenv("LOCAL", "2")
    monkeypatch.setattr(scaling, "MACHINE", 2)
    torchrun(4, str(TESTS / "bench" / "scaling_processes.py"), str(tmp_path / "configs.json"))
    of, layout = numbers(config.model.model_copy(update={"vocab_size": 256})), Layout(4, "hybrid")
    P, n, N = of.parameters, 2, 4
    for rank in range(4):
        mine = json.loads((tmp_path / "hybrid" / f"traffic-{rank}.json").read_text())
        for name in ("weights", "gradients", "optimizer", "codebooks"):
            assert mine[name] == kept(of, layout)[name], name
        gathered, scattered = (mine["sent"][f"_{what}_base_ float32"] for what in ("allgather", "reduce_scatter"))
        assert (gathered, scattered) == (4 * (2 * P - of.outside), 4 * P)
        assert mine["sent"]["allreduce_ float32"] == 4 * P / n + 4 * of.statistics
        inside, between = (n - 1) / n * (gathered + scattered), 2 * (1 - n / N) * 4 * P / n
        assert sent(of, layout)["parameters"] == inside + between


def test_formulas_at_their_edges():
    of = Numbers(parameters=1000, layer=100, outside=200, codebooks=7, statistics=10)
    one = Layout(1)
    assert sum(kept(of, one).values()) == 16 * 1000 + 7 and sum(sent(of, one).values()) == 0
    ddp, full, hybrid = (Layout(64, shard) for shard in ("none", "full", "hybrid"))
    assert sum(kept(of, ddp).values()) == 20 * 1000 + 7
    assert (
        kept(of, full)["weights"] == 4000 / 64 and kept(of, hybrid)["weights"] == kept(of, Layout(8, "full"))["weights"]
    )
    assert kept(of, full)["exchange"] == 4 * (400 + 400)
    assert sent(of, ddp)["parameters"] == 2 * 63 / 64 * 4000
    assert sent(of, full)["parameters"] == 63 / 64 * 4 * 2800
    assert sent(of, hybrid)["parameters"] == pytest.approx(7 / 8 * 4 * 2800 + 2 * 7 / 8 * 4 * 1000 / 8)
    assert sent(of, Layout(8, "hybrid")) == sent(of, Layout(8, "full")), "one machine"


def test_the_cheapest_layout_that_fits(monkeypatch):
    """A model of 16 bytes a parameter that are one billion, and activations that checkpointing makes a tenth."""
    of = Numbers(10**9, 10**7, 10**7, 0, 0)
    monkeypatch.setattr(scaling, "_numbers", lambda name: of)
    monkeypatch.setattr(scaling, "activations", lambda name, checkpoint: Line(0, 10**5 if checkpoint else 10**6))
    for tokens, memory, layout in [
        (8192, 80e9, "DDP"),
        (8192, 24e9, "hybrid"),
        (65_536, 80e9, "hybrid"),
        (131_072, 80e9, "DDP, checkpointing"),
        (1_048_576, 80e9, "hybrid, context 2, checkpointing"),
        (1_048_576, 1e9, None),
    ]:
        (row,) = scaling.run(["125M"], [tokens], [64], memory)
        assert row["layout"] == layout, tokens
        assert (row["bytes"] <= scaling.USED * memory) is (layout is not None)
        assert bool(row["sent"]["context"]) is ((layout or "context").count("context") == 1)
    assert [one.context for one in layouts(1024, 8) if not one.checkpoint] == [1, 1, 2, 2], "a piece holds a window"


@pytest.mark.slow
def test_activations_are_a_line_in_the_length():
    """What `footprint` finds at a third length lies on the line through the two that are looked at."""
    line = scaling.activations("125M", True)
    config = scaling.model("125M", True)
    found = footprint.training(config, 1, 32_768, precision="bf16", device="cuda")
    kept = found.embedded + sum(part.kept for part in found.layers)
    beside = [max(part.forward, part.backward) - part.kept for part in found.layers]
    most = kept + max(*beside, found.loss.forward, found.loss.backward)
    assert line.a + line.b * 32_768 == pytest.approx(most, rel=0.02)


def test_what_a_recipe_takes():
    row = scaling.cost(load_config("lm/enwik8", [], RunConfig), flops=1e15, mfu=0.5)
    assert row["tokens"] == 125_000 * 128 * 2048 and row["flops"] == row["flops_per_token"] * row["tokens"]
    assert 6 * row["parameters"] < row["flops_per_token"] < 10 * row["parameters"]
    assert row["gpu_days"] == pytest.approx(row["flops"] / 1e15 / 0.5 / 86_400)


def test_a_row_adds_up():
    row = needed("125M", 8192, Layout(16, "full", 4, True))
    assert row["bytes"] == sum(row["memory"].values()) and row["sent_bytes"] == sum(row["sent"].values())
    assert 120e6 < row["parameters"] < 135e6


@pytest.mark.slow
def test_the_page_is_what_the_command_says():
    page = (TESTS.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.markdown(scaling.run()) in page
    for name in ("enwik8", "imagenet64", "pg19"):
        config = load_config(f"lm/{name}", [], RunConfig)
        days = [scaling.cost(config, 989.4e12, mfu)["gpu_days"] for mfu in (0.2, 0.4)]
        (line,) = (line for line in page.splitlines() if line.startswith(f"| `lm/{name}`"))
        assert [float(cell) for cell in line.split("|")[-3:-1]] == [float(f"{d:.2g}") for d in days]
