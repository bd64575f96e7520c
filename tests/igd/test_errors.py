"""An error of the command line is one sentence, word for word."""

import sys

import pytest

from defense import DefenseError
from igd import cli


def test_brackets_in_an_error_are_printed(monkeypatch, capsys):
    sentence = "expected logits [classes], got [3]; or: pip install 'ig-defense[openvino]'"

    def fails():
        raise DefenseError(sentence)

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr(sys, "argv", ["igd"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"igd: {sentence}\n"
