"""Tests of model names: a wrong path is refused without a request to the hub, an unknown hub id after one request."""

from __future__ import annotations

import huggingface_hub
import pytest

from flare.cli import main
from flare.experiments.translation.model import TranslationError, TranslationModel
from flare.experiments.utils.errors import UserError
from flare.experiments.utils.model_names import find_model


@pytest.fixture
def requests(monkeypatch):
    """Make every request to the hub fail, and return the list of requests as (name, timeout)."""
    queried = []

    def model_info(self, name, timeout):
        queried.append((name, timeout))
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return queried


def test_a_path_is_never_requested_from_the_hub(requests, tmp_path):
    (tmp_path / "file").touch()
    for name, message in (
        (str(tmp_path / "nothing"), "no such folder"),
        ("./nothing", "no such folder"),
        ("~nobody-of-this-name/x", "no such folder"),
        ("models/xlmr/base", "no such folder"),
        ("models\\xlmr", "no such folder"),
        (str(tmp_path / "file"), "the folder that holds config.json"),
        ("a\0b", "NUL"),
        ("a\ud800", "surrogate"),
    ):
        with pytest.raises(UserError, match=message):
            find_model(name, "--model")
    assert requests == []
    assert find_model(str(tmp_path), "--model") == str(tmp_path)


def test_an_unknown_hub_id_is_requested_once_per_use(requests, tmp_path, capsys):
    words = ("finetune", "--task", "nusax", "--model", "owner/mistyped", "--output", tmp_path / "runs")
    data = tmp_path / "data" / "english"
    data.mkdir(parents=True)
    assert main([str(word) for word in (*words, "--data", tmp_path / "data", "--no-progress")]) == 2
    err = capsys.readouterr().err
    assert "owner/mistyped: there is no such folder here" in err and "(ConnectionError: no network more)" in err
    with pytest.raises(TranslationError, match="there is no such folder here"):
        TranslationModel("owner/mistyped")
    assert requests == [("owner/mistyped", 10)] * 2
