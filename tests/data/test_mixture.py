import json

import numpy as np
import pytest
import torch

from transformer_vq.config import ConfigError, DataConfig, RunConfig, validate
from transformer_vq.data import check_sources, mixed_batch, mixture, prepare, prepare_sources, window_batch


@pytest.fixture
def texts(tmp_path):
    """Two sources: letters and digits."""
    rng = np.random.default_rng(0)
    (tmp_path / "letters.txt").write_text("".join(rng.choice([*"abcdefgh \n"], 6000)))
    (tmp_path / "digits.txt").write_text("".join(rng.choice([*"01234567.;"], 3000)))
    return tmp_path


def settings(folder, tokenizer="bytes", weights=(3, 1), **more):
    mix = {
        name: {"source": str(folder / f"{name}.txt"), "weight": weight}
        for name, weight in zip(("letters", "digits"), weights, strict=True)
    }
    return DataConfig.model_validate({"mix": mix, "cache": str(folder / "cache"), "tokenizer": tokenizer, **more})


def test_windows_are_shared_out_by_weight_and_never_cross(texts):
    found = prepare_sources(settings(texts))
    files, shares = found.files("train"), found.shares
    assert shares == {"letters": 0.75, "digits": 0.25}
    batch = mixed_batch(files, shares, 0, 0, range(2000), 2000, 16)
    digits = (
        (batch.tokens >= ord("0")) & (batch.tokens <= ord("9"))
        | (batch.tokens == ord("."))
        | (batch.tokens == ord(";"))
    )
    of_digits = digits.all(1)
    assert bool((of_digits | ~digits.any(1)).all())  # a row is of one source
    assert abs(of_digits.float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    text = bytes(files["digits"].tokens)
    starts = [text.index(bytes(row.tolist())) for row in batch.tokens[of_digits].byte()]
    assert abs(np.mean(starts) / len(text) - 0.5) < 0.06  # uniform in its source, whichever was chosen


def test_rows_depend_on_seed_and_number_alone(texts):
    found = prepare_sources(settings(texts))
    args = (found.files("train"), found.shares)
    whole = mixed_batch(*args, 7, 3, range(8), 8, 16, True)
    parts = [mixed_batch(*args, 7, 3, rows, 8, 16, True) for rows in (range(0, 3), range(3, 8))]
    for field in ("tokens", "labels", "segments", "fresh"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))
    assert whole.tokens.tolist() != mixed_batch(*args, 8, 3, range(8), 8, 16).tokens.tolist()


def test_one_source_in_a_mix_is_that_source(texts):
    config = settings(texts).model_dump()
    config["mix"].pop("digits")
    found = prepare_sources(DataConfig.model_validate(config))
    single = prepare(DataConfig(source=str(texts / "letters.txt"), cache=config["cache"]))
    assert found.sources["letters"].folder == single.folder
    got = mixed_batch(found.files("train"), found.shares, 1, 2, range(4), 4, 16)
    assert got.tokens.tolist() == window_batch(single.splits["train"], 1, 2, range(4), 4, 16).tokens.tolist()


def test_a_bpe_is_shared_and_trained_by_weights(texts, monkeypatch):
    found = prepare_sources(settings(texts, "bpe:300"))
    assert len({corpus.tokenizer.sha256 for corpus in found.sources.values()}) == 1
    again = prepare_sources(settings(texts, "bpe:300"))
    assert [c.folder for c in again.sources.values()] == [c.folder for c in found.sources.values()]
    read = {}

    def record(spec, pieces):
        for piece in pieces:
            read[piece.where] = read.get(piece.where, 0) + len(piece.text)
        raise ConfigError("seen")

    monkeypatch.setattr(mixture, "make_tokenizer", record)
    monkeypatch.setattr("transformer_vq.data.documents.PIECE", 64)
    with pytest.raises(ConfigError, match="seen"):
        prepare_sources(settings(texts, "bpe:300", weights=(1, 3)))
    letters, digits = (read[str(texts / f"{name}.txt")] for name in ("letters", "digits"))
    assert abs(digits / (letters + digits) - 0.75) < 0.02  # though its text is half as long: it is read again


def test_a_sample_reads_hardly_more_than_it_takes(texts, monkeypatch):
    """However long the sources are: the text that is there is counted up to the size of a sample."""
    monkeypatch.setattr(mixture, "SAMPLE", 500)
    monkeypatch.setattr("transformer_vq.data.documents.PIECE", 64)
    read, read_split = [], mixture.read_split

    def count(*arguments):
        for piece in read_split(*arguments):
            read.append(len(piece.text))
            yield piece

    monkeypatch.setattr(mixture, "read_split", count)
    prepare_sources(settings(texts, "bpe:300"))
    assert 1000 <= sum(read) < 1000 + 6 * 64


def test_each_source_has_settings_of_its_own(texts):
    config = settings(texts, max_bytes=1000).model_dump()
    config["mix"]["digits"] |= {"document_separator": ";", "max_bytes": 200}
    found = prepare_sources(DataConfig.model_validate(config))
    assert found.sources["letters"].splits["train"].bytes == 1000
    assert found.sources["digits"].splits["train"].bytes == 200
    assert len(found.sources["letters"].splits["train"].documents) == 1
    assert len(found.sources["digits"].splits["train"].documents) > 5
    with pytest.raises(ConfigError, match=r"train of .*digits\.txt has 200 tokens; at least 301"):
        check_sources(found, 300)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mix": {}}, r"data\.mix = {}: must name at least one source"),
        ({"mix": {"a": {"source": "x", "weight": 0}}}, r"data\.mix\.a\.weight = 0: must be greater than 0"),
        ({"mix": {"a": {"source": "x", "weight": -1}}}, r"data\.mix\.a\.weight = -1: must be greater than 0"),
        ({"mix": {"a": {"weight": 1}}}, r"data\.mix\.a\.source: is missing"),
        ({"mix": {"a": {"source": "x", "wieght": 1}}}, r"data\.mix\.a\.wieght: no such key"),
        ({"mix": {"a": {"source": "x"}}, "source": "y"}, r"data\.source = y: must be left out, or builtin, beside mix"),
        ({"mix": {"a": {"source": "x"}}, "order": "streams"}, r"data\.order = streams: must be windows with mix"),
        ({"mix": {"layer0": {"source": "x"}}}, r"data\.mix\.layer0: a name begins with a letter"),
        ({"mix": {"a/b": {"source": "x"}}}, r"mix\.a/b: a name begins with a letter"),
        ({"mix": {"a": "x"}}, r"data\.mix\.a = x: must be keys and values"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(data, message):
    with pytest.raises(ConfigError, match=message) as error:
        validate({"data": data}, RunConfig)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_source_that_is_not_there_is_named(texts, tokenizer):
    (texts / "digits.txt").unlink()
    with pytest.raises(ConfigError, match=r"data\.mix\.digits: data\.source = .*digits\.txt: no such file"):
        prepare_sources(settings(texts, tokenizer))


def test_what_reads_one_source_refuses_a_mix(texts):
    with pytest.raises(ConfigError, match=r"data\.mix: here one source is read"):
        prepare(settings(texts))


def test_a_config_of_a_mix_is_read_as_it_was_saved(texts):
    config = validate({"data": json.loads(settings(texts).model_dump_json())}, RunConfig)
    assert validate(config.model_dump(mode="json"), RunConfig) == config
