import tomllib

import pytest

from pipeline.config import TrainSettings
from pipeline.settings import check, dump_toml, merge, override
from shards.errors import UserError
from tests.pipeline.minimal import MINIMAL, MIXED, settings


def test_training_data_is_one_set_or_several_with_weights():
    assert [source.url for source in settings().data.sources] == ["somewhere"]
    assert [source.exclude for source in settings(data={"exclude": "v2"}).data.sources] == ["v2"]
    assert [source.subset for source in settings(data={"subset": 9}).data.sources] == [9]
    mixed = settings(data={"train": MIXED})
    assert [(s.url, s.weight, s.exclude) for s in mixed.data.sources] == [("a", 3, None), ("b", 1, "v1")]
    by_size = settings(data={"train": [{"url": "a"}, {"url": "b", "exclude": "v1"}]})
    assert [(s.url, s.weight, s.exclude) for s in by_size.data.sources] == [("a", None, None), ("b", None, "v1")]
    assert check(TrainSettings, tomllib.loads(dump_toml(by_size.model_dump(mode="json"))), "again.toml") == by_size
    text = ["data.train=[{url='a', weight=3}, {url='b', weight=1, exclude='v1'}]"]
    assert check(TrainSettings, override(MINIMAL, text), "here.toml") == mixed
    assert (
        check(TrainSettings, override(merge(MINIMAL, {"data": {"train": MIXED}}), ["data.train=c"]), "x").data.train
        == "c"
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": []}, r"data\.train = \[\] .*give the URL of a data set, or \[\[data\.train\]\] tables"),
        ({"train": ["a", "b"]}, r"data\.train = \['a', 'b'\] .*tables with the url of each"),
        ({"train": {"url": "a"}}, r"data\.train in .*tables with the url"),
        (
            {"train": [*MIXED, {"url": "c"}]},
            r"data\.train = .*: c without weight, and others with one; set it in all tables, or in none",
        ),
        (
            {"train": [{"url": "c", "weihgt": 2}]},
            r"unknown setting data\.train\.0\.weihgt .*did you mean 'weight'.*: url, ",
        ),
        ({"train": [{"url": "c", "weight": 0}]}, r"data\.train\.0\.weight = 0 "),
        ({"train": MIXED, "exclude": "v1"}, "train lists several; set exclude in their tables"),
        ({"train": MIXED, "subset": 9}, "train lists several; set subset in their tables"),
        ({"train": [{"url": "a", "weight": 1, "subset": 0}]}, r"data\.train\.0\.subset = 0 .* greater than 0"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(data, words):
    with pytest.raises(UserError, match=words) as raised:
        settings(data=data)
    assert "\n" not in str(raised.value)


def test_scaled_decoding_is_for_crops():
    assert settings(data={"augment": "light1", "scaled_decoding": True}).data.scaled_decoding
    with pytest.raises(UserError, match="scaled_decoding is for crops, and augment 'resize' takes the whole image"):
        settings(data={"augment": "resize", "scaled_decoding": True})


def test_a_cache_has_a_size_as_people_write_it():
    for text, size in [("200 GB", 200 * 10**9), ("1.5TB", 1500 * 10**9), ("8GiB", 8 << 30), (5000, 5000)]:
        data = settings(data={"cache": "here", "cache_bytes": text}).data
        assert data.cache_bytes == size
        assert tomllib.loads(dump_toml(data.model_dump(mode="json")))["cache_bytes"] == size
    for wrong in ({"cache": "here"}, {"cache_bytes": "1 GB"}):
        with pytest.raises(UserError, match="cache and cache_bytes go together"):
            settings(data=wrong)
    for text in ("much", "3 apples", "0 GB", "-1 GB"):
        with pytest.raises(UserError, match=r"data\.cache_bytes = "):
            settings(data={"cache": "here", "cache_bytes": text})


def test_how_stores_are_reached_is_a_table_of_its_own(monkeypatch):
    base = {"duration": "1 epoch", "global_batch": 8, "model": {"name": "vit_b16"}}
    monkeypatch.setenv("PATCHMILL_STORE_REGION", "eu-test-1")
    monkeypatch.setenv("PATCHMILL_STORE_TIMEOUT_SECONDS", "7")
    settings = check(TrainSettings, {**base, "data": {"train": "a", "store": {"timeout_seconds": 9}}}, "c.toml")
    assert (settings.data.store.region, settings.data.store.timeout_seconds) == ("eu-test-1", 9)
    again = check(TrainSettings, tomllib.loads(dump_toml(settings.model_dump(mode="json"))), "resolved.toml")
    assert again == settings
    for table, message in [
        ({"endpiont": "x"}, r"unknown setting data\.store\.endpiont .*did you mean 'endpoint'"),
        ({"endpoint": "x"}, r"setting data\.store\.endpoint = 'x' in c\.toml does not fit: give the URL"),
        ({"concurrency": 0}, r"setting data\.store\.concurrency = 0 in c\.toml does not fit"),
    ]:
        with pytest.raises(UserError, match=message):
            check(TrainSettings, {**base, "data": {"train": "a", "store": table}}, "c.toml")
    for url, what in [("https://me:hunter2@h/x", "password"), ("https://h/x?sig=hunter2", "user or a query")]:
        message = rf"^the URL of h carries a {what}; put secrets into the environment"
        for data in (
            {"train": url},
            {"train": [{"url": url, "weight": 1}]},
            {"train": "a", "store": {"endpoint": url}},
        ):
            with pytest.raises(UserError, match=message):
                check(TrainSettings, {**base, "data": data}, "c.toml")
    monkeypatch.setenv("PATCHMILL_STORE_TIMEOUT_SECONDS", "soon")
    with pytest.raises(UserError, match="environment variable PATCHMILL_STORE_TIMEOUT_SECONDS=soon does not fit"):
        check(TrainSettings, {**base, "data": {"train": "a"}}, "c.toml")
