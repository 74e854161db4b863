"""Exit codes, the sentence of each error, and SIGTERM."""

import signal

import pytest
from fedbonsai.runtime.cli.exit_codes import Sigterm, exit_code_of
from fedbonsai.runtime.errors import ClusterError, ConfigError, RunError


def raising(error):
    def call():
        raise error

    return call


def test_each_class_of_error_has_its_exit_code(capsys):
    assert exit_code_of(lambda: None) == 0
    assert exit_code_of(raising(ConfigError("no"))) == 2
    assert exit_code_of(raising(ClusterError("no"))) == 2
    assert exit_code_of(raising(RunError("no", device=1, round_=2, stage="train"))) == 1
    assert exit_code_of(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.splitlines() == [
        "error: no", "error: no", "error: device 1, round 2, stage train: no", "interrupted"
    ]  # fmt: skip


def test_the_trace_of_a_users_code_is_shown_before_the_sentence(capsys):
    error = RunError("the policy raised KeyError: 1", stage="decide")
    error.trace = "Traceback ...\nKeyError: 1\n"
    assert exit_code_of(raising(error)) == 1
    assert capsys.readouterr().err == "Traceback ...\nKeyError: 1\nerror: stage decide: the policy raised KeyError: 1\n"


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 / 0)


def test_sigterm_interrupts_once():
    sigterm = Sigterm()
    with sigterm:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the clean-up continues
    assert sigterm.received
