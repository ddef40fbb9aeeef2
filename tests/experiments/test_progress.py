"""Tests of the progress shown in log files and on a terminal, and of the messages of interrupted commands."""

from __future__ import annotations

import io

import pytest

from flare.cli import main
from flare.experiments.utils import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_a_line_every_30_seconds(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.counter("acehnese flare", 100, "step", initial=20) as bar:
        for second in range(61):
            clock[0] = float(second)
            bar.update(1)
    err = capsys.readouterr().err
    assert "\r" not in err
    # At second 30, 31 updates after the initial 20 steps make 51. The other 49 steps take 30 / 31 s each.
    assert err.splitlines() == [
        "acehnese flare: 51 of 100 steps, 47 s left",
        "acehnese flare: 81 of 100 steps, 19 s left",
    ]


def test_a_terminal_gets_a_bar_if_the_counter_has_a_name(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress.counter("shown", 2, "row") as bar:
        bar.update(2)
    assert "shown" in terminal.getvalue() and "\r" in terminal.getvalue()
    before = terminal.getvalue()
    with progress.counter(None, 2, "row") as bar:
        bar.update(2)
    assert terminal.getvalue() == before


@pytest.mark.parametrize(
    "work, words, message",
    [
        (
            "flare.experiments.commands.experiment.read_settings",
            ["finetune", "--task", "nusax", "--no-resume"],
            "last checkpoint",
        ),
        ("flare.experiments.commands.experiment.read_settings", ["train", "--task", "nusax"], "last checkpoint"),
        ("flare.experiments.commands.experiment.read_settings", ["evaluate"], "are saved"),
        ("flare.experiments.commands.experiment.read_settings", ["translate", "--output", "a b"], "are kept"),
        ("flare.experiments.report.write_report", ["report", "runs"], "unchanged"),
        ("flare.experiments.demo.run_demo", ["demo"], "starts again"),
    ],
)
def test_an_interrupted_command_says_how_to_continue(work, words, message, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, interrupted)
    assert main(words) == 130
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    shown = " ".join(word for word in words if word != "--no-resume").replace("a b", "'a b'")
    assert f"flare {shown}\n" in err, err
