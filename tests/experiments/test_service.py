"""Tests of examples/service.py: it answers with the pipeline's predictions, even if requests run concurrently."""

from __future__ import annotations

import runpy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from experiment_data import write_bert

import flare
from flare.experiments.demo.corpus import make_corpus

pytest.importorskip("fastapi", reason="fastapi is not installed (examples/requirements-service.txt)")
pytest.importorskip("httpx", reason="httpx is not installed (examples/requirements-service.txt)")

SERVICE = Path(__file__).parents[2] / "examples" / "service.py"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> flare.FlarePipeline:
    root = tmp_path_factory.mktemp("service")
    write_bert(root / "bert")
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification.from_pretrained(root / "bert", num_labels=3)
    model = flare.fast_lora(base, r=4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(root / "adapter")
    return flare.FlarePipeline(root / "bert", root / "adapter", labels=["a", "b", "c"], max_length=24)


def test_concurrent_requests_get_the_answers_of_single_requests(pipeline) -> None:
    from fastapi.testclient import TestClient

    client = TestClient(runpy.run_path(str(SERVICE))["make_app"](pipeline))
    rows = [(pair.target, pair.source) for pair in make_corpus(train=48).train]
    bodies = []
    for number in range(12):
        part = rows[number * 4 : number * 4 + 1 + number % 4]  # requests of several sizes
        bodies.append({"texts": [t for t, _ in part], "source_texts": [s for _, s in part]})
    alone = [client.post("/predict", json=body) for body in bodies]
    assert [one.json()["predictions"] for one in alone] == [pipeline(b["texts"], b["source_texts"]) for b in bodies]
    barrier = threading.Barrier(len(bodies))

    def ask(body: dict) -> dict:
        barrier.wait()
        return client.post("/predict", json=body).json()

    with ThreadPoolExecutor(len(bodies)) as pool:
        assert list(pool.map(ask, bodies)) == [one.json() for one in alone]


def test_user_errors_are_responses_with_status_422(pipeline) -> None:
    from fastapi.testclient import TestClient

    client = TestClient(runpy.run_path(str(SERVICE))["make_app"](pipeline))
    for body, message in (
        ({"texts": ["a"]}, "1 of 1 texts have no source"),
        ({"texts": [{"title": "a"}], "source_texts": ["a"]}, "lacks text"),
        ({"texts": []}, "at least 1"),
    ):
        answer = client.post("/predict", json=body)
        assert answer.status_code == 422 and message in answer.text
    assert client.get("/health").json()["adapter"].endswith("adapter")


def test_the_example_is_short() -> None:
    code = SERVICE.read_text(encoding="utf-8").split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
