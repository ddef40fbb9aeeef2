"""Run PEFT's own tests with FlareConfig(fusion=None) instead of LoraConfig. CONTRIBUTING.md says how to start this.

Failed tests run again with LoraConfig. A test that also fails with LoraConfig is ignored, because it needs a model from
the hub, a network or a GPU. The remaining failures must be the ones listed in `KNOWN`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_hub

HERE = Path(__file__).parent
FILES = {  # by file: how many tests must pass at least, which detects a run that collects too few
    "test_feature_extraction_models.py": 100,
    "test_token_classification_qa.py": 6,
    "test_seq_classifier.py": 50,
    "test_encoder_decoder_models.py": 100,
    "test_decoder_models.py": 500,
    "test_custom_models.py": 2000,
}
# Intended failures and their reasons, by the names that the tests have with LoraConfig.
KNOWN = {
    "test_custom_models.py::TestPeftCustomModel::test_add_adapter_rejects_duplicate_name_without_mutation[True]": (
        "PeftMixedModel refuses types that are not PEFT's (docs/peft.md)"
    ),
    "test_custom_models.py::TestPeftCustomModel::test_non_existing_model_card": (
        "the model card is filled in, so it is shorter than PEFT's template of 1,000 characters"
    ),
    "test_custom_models.py::TestLayerRepr::test_repr_lora_linear": "the layer is printed as lora.FlareLinear",
    "test_custom_models.py::TestLayerRepr::test_repr_lora_conv1d": "the layer is printed as lora.FlareLinear",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """Return a folder with a hub cache and PEFT's tests as the package ``tests`` (some tests expect this name)."""
    source = os.environ.get("FLARE_PEFT_TESTS", "")
    if not (Path(source) / "testing_common.py").is_file():
        pytest.skip("FLARE_PEFT_TESTS does not name the folder of PEFT's tests (see CONTRIBUTING.md)")
    folder = tmp_path_factory.mktemp("peft")
    shutil.copytree(source, folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests" / "__init__.py").touch()
    tiny_hub.build(folder / "hub")
    return folder


def run(place: Path, file: str, adapter: str, only: list[str] | None = None) -> dict[str, list[str]]:
    """Run one file of PEFT's tests; return each test's outcome and the last line of its error."""
    outcomes = place / f"{adapter}-{file}.json"
    chosen = place / "only.json"
    chosen.write_text(json.dumps(only))
    variables = {
        "FLARE_PEFT_ADAPTER": adapter,
        "FLARE_PEFT_OUTCOMES": str(outcomes),
        "FLARE_PEFT_ONLY": "" if only is None else str(chosen),
        "HF_HUB_CACHE": str(place / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    # no configuration file is used, because PEFT's configuration file requires coverage
    options = ("-p", "peft_plugin", "-c", os.devnull, "--rootdir", str(place), "-q", "-W", "ignore", f"tests/{file}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=place,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, list[str]] = json.loads(outcomes.read_text())
    return result


@pytest.mark.parametrize("file", FILES)
def test_only_known_tests_fail(place, file) -> None:
    outcomes = run(place, file, "flare")
    failed = [name for name, (outcome, _) in outcomes.items() if outcome == "failed"]
    stock = run(place, file, "lora", failed) if failed else {}
    assert set(stock) == set(failed), "the same tests must run with LoraConfig"
    new = {name: outcomes[name][1] for name in failed if stock[name][0] == "passed"}
    assert {name: new[name] for name in set(new) - set(KNOWN)} == {}
    assert {name for name in KNOWN if name.startswith(file)} - set(new) == set(), "these pass: remove them from KNOWN"
    assert sum(outcome == "passed" for outcome, _ in outcomes.values()) >= FILES[file]
