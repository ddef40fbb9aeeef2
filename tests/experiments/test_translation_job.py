"""Tests of `flare translate`: files, directions, resuming after a kill, provenance and messages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_mt

from flare.cli import main
from flare.experiments.tasks import DataError, get_task, load_pairs, read_split
from flare.experiments.translation import Translator
from flare.experiments.translation.provenance import FILE

ROOT = Path(__file__).resolve().parents[2]
LABELS = ("negative", "neutral", "positive")


@pytest.fixture(scope="module")
def nllb(tmp_path_factory) -> Path:
    return tiny_mt.save_nllb(tmp_path_factory.mktemp("mt") / "nllb")


@pytest.fixture
def data(tmp_path) -> Path:
    """Return a folder with English, Acehnese and Javanese rows of a sentiment task."""
    for language in ("english", "acehnese", "javanese"):
        for split, count in (("train", 12), ("valid", 4), ("test", 5)):
            path = tmp_path / "data" / language / f"{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                f"{split}{number},{language[0]} {tiny_mt.SENTENCES[number]},{LABELS[number % 3]}"
                for number in range(count)
            ]
            path.write_text("\n".join(["id,text,label", *lines]) + "\n")
    return tmp_path / "data"


def options(data: Path, nllb: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a flare translate command. The options in `more` replace the defaults set here."""
    chosen = {
        "--task": "nusax",
        "--data": str(data),
        "--source": "english",
        "--target": "acehnese",
        "--model": str(nllb),
        "--output": str(output),
        "--max-new-tokens": "6",
        "--batch-size": "3",
    }
    flags = list(more)
    for name, value in chosen.items():
        if name not in flags:
            flags += [name, value]
    return ["translate", "--no-progress", *flags]


def fails(arguments: list[str], capsys) -> str:
    """Run a command that must fail, and return its error message, which must be one line."""
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flare translate: error: ")]
    assert len(lines) == 1
    return lines[0]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def counted(monkeypatch) -> list[int]:
    """Return a list that collects the sizes of the batches translated from now on."""
    sizes: list[int] = []
    original = Translator.translate_batch
    monkeypatch.setattr(
        Translator, "translate_batch", lambda self, pieces: (sizes.append(len(pieces)), original(self, pieces))[1]
    )
    return sizes


# --- written files ----------------------------------------------------------------------------------------------------


def test_train_and_valid_are_translated_to_the_target_and_test_to_the_source(data, nllb, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(options(data, nllb, out, "--target", "acehnese", "javanese")) == 0
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == sorted(
        [
            *(
                f"english-{target}/{name}"
                for target in ("acehnese", "javanese")
                for name in ("train.jsonl", "valid.jsonl")
            ),
            *(f"{target}-english/test.jsonl" for target in ("acehnese", "javanese")),
            *(
                f"{pair}/{FILE}"
                for pair in ("english-acehnese", "english-javanese", "acehnese-english", "javanese-english")
            ),
        ]
    )
    task = get_task("nusax")
    for folder, origin, split in (("english-acehnese", "english", "train"), ("javanese-english", "javanese", "test")):
        before, after = read_split(task, data, origin, split), read_split(task, out, folder, split)
        assert [(row.id, row.label) for row in before] == [(row.id, row.label) for row in after]
        assert all(one.texts["text"] and one.texts != two.texts for one, two in zip(before, after, strict=True))
    assert "english-acehnese/train: 12 of 12 rows in" in capsys.readouterr().out


def test_provenance_records_settings_and_counts(data, nllb, tmp_path):
    import hashlib

    out = tmp_path / "out"
    assert main(options(data, nllb, out, "--splits", "train")) == 0
    provenance = json.loads((out / "english-acehnese" / FILE).read_text())
    assert (provenance["task"], provenance["from"], provenance["to"]) == ("nusax", "english", "acehnese")
    assert (provenance["settings"]["source_tag"], provenance["settings"]["target_tag"]) == ("eng_Latn", "ace_Latn")
    assert provenance["settings"]["decoding"] == {"num_beams": 1, "do_sample": False, "max_new_tokens": 6}
    assert (
        provenance["settings"]["model"]["name"] == str(nllb)
        and len(provenance["settings"]["model"]["fingerprint"]) == 64
    )
    entry = provenance["splits"]["train"]
    written = (out / "english-acehnese" / "train.jsonl").read_bytes()
    assert entry["output_sha256"] == hashlib.sha256(written).hexdigest()
    assert entry["status"] == "done" and entry["data"] == str(data)
    assert (entry["counts"]["rows"], entry["counts"]["written"], entry["counts"]["dropped"]) == (12, 12, {})
    assert entry["counts"]["unfinished"] > 0  # a random model rarely generates the end token
    assert {"torch", "transformers"} <= set(entry["environment"]["versions"])


def test_direction_to_source_translates_the_target_rows(data, nllb, tmp_path):
    out = tmp_path / "out"
    assert main(options(data, nllb, out, "--splits", "train", "--direction", "to-source", "--limit", "3")) == 0
    assert [row["id"] for row in rows_of(out / "acehnese-english" / "train.jsonl")] == ["train0", "train1", "train2"]
    assert not (out / "english-acehnese").exists()


def test_equal_texts_are_translated_once(nllb, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "english"
    folder.mkdir(parents=True)
    lines = [
        {"id": str(n), "premise": "the sea", "hypothesis": tiny_mt.SENTENCES[n], "label": LABELS[0]} for n in range(3)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = counted(monkeypatch)
    two_columns = ["--task", "classification", "--text-columns", "premise", "hypothesis", "--splits", "train"]
    assert main(options(folder.parent, nllb, tmp_path / "out", *two_columns)) == 0
    assert sum(sizes) == 4
    rows = rows_of(tmp_path / "out" / "english-acehnese" / "train.jsonl")
    assert len({row["premise"] for row in rows}) == 1 and len({row["hypothesis"] for row in rows}) == 3


# --- resuming ---------------------------------------------------------------------------------------------------------


def kill_midway(arguments: list[str], partial: Path, lines: int) -> None:
    """Start the command in its own process, and kill it as soon as the progress file has ``lines`` lines or more."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "flare", *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        end = time.monotonic() + 120
        while not partial.exists() or partial.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < end, f"{partial} did not grow"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_killed_run_resumes_to_the_same_bytes(data, nllb, tmp_path, capsys, monkeypatch):
    slow = ["--splits", "train", "--batch-size", "1", "--max-new-tokens", "63", "--threads", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    partial = broken / "english-acehnese" / "train.partial.jsonl"
    finished = partial.with_name("train.jsonl")
    kill_midway(options(data, nllb, broken, *slow), partial, lines=4)
    done = partial.read_bytes().count(b"\n") - 1
    assert 3 <= done < 12 and not finished.exists()
    with partial.open("ab") as file:
        file.write(b'{"batch": 11, "transl')  # a line that a kill interrupted
    sizes = counted(monkeypatch)
    assert main(options(data, nllb, broken, *slow)) == 0
    assert f"resuming after {done} of 12 batches" in capsys.readouterr().out
    assert len(sizes) == 12 - done
    assert main(options(data, nllb, whole, *slow)) == 0
    assert finished.read_bytes() == (whole / "english-acehnese" / "train.jsonl").read_bytes()
    provenances = [json.loads((out / "english-acehnese" / FILE).read_text()) for out in (whole, broken)]
    for one in provenances:
        one["splits"]["train"].pop("date")
    assert provenances[0] == provenances[1]
    assert not partial.exists() and not list(finished.parent.glob(".*"))


def test_an_interrupt_between_the_last_writes_loses_nothing(data, nllb, tmp_path, monkeypatch):
    """The split is written first, then the provenance; the progress file is removed last."""
    from flare.experiments.translation import job

    out = tmp_path / "out"
    arguments = options(data, nllb, out, "--splits", "valid")
    finished = out / "english-acehnese" / "valid.jsonl"
    expected = None
    original = job.write_provenance

    def stop(*_, **__):
        raise KeyboardInterrupt

    def stop_at_the_final_record(folder, content):
        if content["splits"]["valid"]["status"] == "done":
            raise KeyboardInterrupt
        original(folder, content)

    for place, name, broken in (
        (job, "write_split", stop),
        (job, "write_provenance", stop_at_the_final_record),
        (Path, "unlink", stop),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, broken)
            assert main(arguments) == 130
        expected = expected or (finished.read_bytes() if finished.exists() else None)
    sizes = counted(monkeypatch)
    assert main(arguments) == 0
    assert sizes == [] and finished.read_bytes() == expected
    assert not (finished.parent / "valid.partial.jsonl").exists()


def test_a_finished_split_is_not_changed(data, nllb, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = options(data, nllb, out, "--splits", "valid")
    assert main(arguments) == 0
    path = out / "english-acehnese" / "valid.jsonl"
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    sizes = counted(monkeypatch)
    assert main(arguments) == 0
    assert sizes == [] and (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert "already finished" in capsys.readouterr().out
    path.write_text(path.read_text().replace("valid0", "mended"))
    assert main(arguments) == 0
    assert "mended" in path.read_text() and "was changed after it was translated" in capsys.readouterr().out


# --- refused commands -------------------------------------------------------------------------------------------------


def test_changed_settings_are_refused_and_named(data, nllb, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(options(data, nllb, out, "--splits", "valid")) == 0
    error = fails(options(data, nllb, out, "--splits", "valid", "--beams", "2", "--max-new-tokens", "7"), capsys)
    assert "settings.decoding.num_beams: 1 then, 2 now" in error and "max_new_tokens: 6 then, 7 now" in error
    assert "--output" in error and "batch" not in error
    other = tiny_mt.save_nllb(tmp_path / "other", seed=1)
    assert "settings.model.fingerprint" in fails(options(data, other, out, "--splits", "valid"), capsys)


def test_changed_rows_are_refused(data, nllb, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(options(data, nllb, out, "--splits", "valid")) == 0
    assert "finished with other rows" in fails(options(data, nllb, out, "--splits", "valid", "--limit", "2"), capsys)
    path = data / "english" / "valid.csv"
    path.write_text(path.read_text().replace("positive", "neutral"))
    assert "english/valid has changed" in fails(options(data, nllb, out, "--splits", "valid"), capsys)


def test_rows_without_ids_must_be_the_translated_rows(data, nllb, tmp_path):
    out, path = tmp_path / "out", data / "acehnese" / "train.csv"
    lines = [line.partition(",")[2] for line in path.read_text().splitlines()]
    head, rows = lines[0], lines[1:9]

    def pairs(rows: list[str], **options) -> int:
        path.write_text("\n".join([head, *rows]) + "\n")
        mt = {"translations": out, "source_text": "mt", **options}
        return len(load_pairs(get_task("nusax"), data, "english", "acehnese", "train", **mt)[0])

    path.write_text("\n".join(lines) + "\n")
    assert main(options(data, nllb, out, "--splits", "train", "--direction", "to-source", "--limit", "8")) == 0
    assert pairs(rows) == pairs([*rows, *lines[9:]]) == 8, "more rows than --limit keep their positions"
    other_label = rows[0].rpartition(",")[0] + ",positive"
    assert pairs([other_label, *rows[1:]]) == 7, "a corrected label does not need a new translation"
    with pytest.raises(DataError, match="from 8 rows without ids, and the data now has only 7 rows, so rows and"):
        pairs(rows[1:])
    with pytest.raises(DataError, match="the data now has other texts in its first 8 rows"):
        pairs([*rows[1:], rows[0]])
    provenance = out / "acehnese-english" / FILE
    content = json.loads(provenance.read_text())
    del content["splits"]["train"]["texts_sha256"]  # written by an earlier version
    provenance.write_text(json.dumps(content))
    assert pairs(rows) == 8
    with pytest.raises(DataError, match="the data now has only 7 rows"):
        pairs(rows[1:])
    provenance.write_text("{")
    with pytest.raises(DataError, match="does not say which rows the train split was translated from"):
        pairs(rows)
    provenance.unlink()
    assert pairs(rows[3:]) == 5, "translations of another program have no provenance"


def test_files_of_other_programs_are_not_overwritten(data, nllb, tmp_path, capsys):
    file = tmp_path / "out" / "english-acehnese" / "valid.csv"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    assert "has no record that this command wrote it" in fails(
        options(data, nllb, tmp_path / "out", "--splits", "valid"), capsys
    )
    assert file.read_text() == "mine" and list(file.parent.iterdir()) == [file]
    assert "cannot be written to" in fails(options(data, nllb, file, "--splits", "valid"), capsys)


def test_a_folder_in_use_is_refused(data, nllb, tmp_path, capsys):
    import fcntl

    folder = tmp_path / "out" / "english-acehnese"
    folder.mkdir(parents=True)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "is in use by another flare translate" in fails(options(data, nllb, tmp_path / "out"), capsys)
    os.close(handle)
    assert main(options(data, nllb, tmp_path / "out", "--splits", "valid")) == 0


def test_unknown_names_are_errors_before_weights_are_loaded(data, tmp_path, capsys):
    model = tiny_mt.save_nllb(tmp_path / "nllb")
    (model / "model.safetensors").unlink()
    out = tmp_path / "out"
    wrong = fails(options(data, model, out, "--target", "acehnes"), capsys)
    assert "Acehnese (ace_Latn)" in wrong and "--target-code" in wrong  # this error is from the table of languages
    assert "did you mean ace_Latn" in fails(options(data, model, out, "--target-code", "ace_Lat"), capsys)
    unknown_tag = fails(
        options(data, model, out, "--target", "swahili"), capsys
    )  # a tag of NLLB that this tokenizer does not have
    assert "swh_Latn" in unknown_tag and "--target-code" in unknown_tag
    one_file = ["--data", str(data / "english" / "train.csv")]
    message = fails(options(data, model, out, *one_file), capsys)
    assert "this is one file; give a folder" in message and "--source-column" not in message
    (data / "english" / "valid.csv").unlink()
    missing = fails(options(data, model, out), capsys)
    assert "valid.csv is missing" in missing and "test.csv, train.csv" in missing
    assert not out.exists()


def test_a_model_without_tags_needs_one_direction_or_a_prefix(data, tmp_path, capsys):
    model = tiny_mt.save_t5(tmp_path / "t5")
    assert "one language only" in fails(options(data, model, tmp_path / "out"), capsys)
    one_way = ["--direction", "to-target", "--splits", "valid"]
    assert main(options(data, model, tmp_path / "one", *one_way)) == 0
    with_prefix = [
        "--target",
        "acehnese",
        "javanese",
        "--prefix",
        "{source} to {target} : ",
        "--splits",
        "valid",
        "test",
    ]
    assert main(options(data, model, tmp_path / "prefix", *with_prefix)) == 0
    provenance = json.loads((tmp_path / "prefix" / "javanese-english" / FILE).read_text())
    assert provenance["settings"]["prefix"] == "javanese to english : " and provenance["settings"]["source_tag"] is None


def test_flags_override_the_config_file(data, nllb, tmp_path, capsys):
    config = tmp_path / "mt.yaml"
    config.write_text(
        f"task: nusax\ndata: {data}\nsource: english\ntarget: acehnese\nmodel: {nllb}\nsplits: [valid]\n"
        f"max-new-tokens: 4\nbatch_size: 2\nprogress: false\noutput: {tmp_path / 'out'}\n"
    )
    assert main(["translate", "--config", str(config), "--max-new-tokens", "5"]) == 0
    settings = json.loads((tmp_path / "out" / "english-acehnese" / FILE).read_text())["settings"]
    assert settings["decoding"]["max_new_tokens"] == 5 and settings["batch"]["rows"] == 2
    config.write_text("tsak: nusax\n")
    assert "tsak is not known; did you mean task?" in fails(["translate", "--config", str(config)], capsys)
    config.write_text("beams: two\n")
    assert "beams must be a whole number; got 'two'" in fails(["translate", "--config", str(config)], capsys)
    assert "--source, --target, --model must be given" in fails(["translate", "--task", "nusax"], capsys)
