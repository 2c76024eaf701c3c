"""Options, errors and progress that all commands share."""

import sys
from types import SimpleNamespace

import pytest

from rcp_kernels.cli import console
from rcp_kernels.cli.app import app


def test_progress_without_a_terminal_is_plain_lines(capsys, monkeypatch):
    clock = iter(range(0, 100, 4))
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with console.Phases() as phases:
        for done in (0, 1):
            phases("reading the model", done, 1, "demo")
        phases("recipe", 0, 0, "method gptq")
        for done in range(1, 7):
            phases("layers", done, 6, f"layer {done}")
        for _ in range(3):
            phases("layers of laquant", 0, 6, "step 1")
        phases("validation", 40, 340, "perplexity 20")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "reading the model: demo",
        "reading the model: done",
        "recipe: method gptq",
        "layers: 1 of 6 (layer 1)",
        "layers: 4 of 6, about 6 s left (layer 4)",
        "layers: 6 of 6 (layer 6)",
        "layers of laquant: 0 of 6 (step 1)",
        "step 40: perplexity 20",
    ]


def test_progress_on_a_terminal_is_a_bar_a_phase(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with console.Phases() as phases:
        for done in (1, 2):
            phases("layers", done, 2, "down")
            phases("perplexity", done, 2, "")
    err = capsys.readouterr().err
    assert "layers: down" in err
    assert "2/2" in err


@pytest.mark.parametrize("where", [0, 1])
def test_traceback_shows_where_an_error_was_raised(run, monkeypatch, where):
    arguments = ["eval", "/no/such/model"]
    assert "must be a model's directory" in run(*arguments)[2]
    arguments.insert(where, "--traceback")
    monkeypatch.setattr(sys, "argv", ["rcp-kernels", *arguments])
    from rcp_kernels.cli.app import main

    with pytest.raises(FileNotFoundError):
        main()


def test_every_command_has_an_example_and_every_option_a_sentence(run):
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        code, out, _ = run(name, "--help")
        assert code == 0
        assert f"rcp-kernels {name}" in out
        assert command.epilog.startswith("Example")
        if name != "bench":
            for annotation in command.callback.__annotations__.values():
                for option in getattr(
                    eval(annotation, vars(sys.modules[command.callback.__module__])), "__metadata__", ()
                ):
                    assert option.help.endswith(".")
                    assert option.help[0].isupper()
