"""The command that changes equations and asks the tests: what it refuses, its lock, and one module in full."""

import importlib.util
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, assert_adds_to_the_lock

from m3po.cli.arguments import guarded

sys.path.insert(0, str(REPOSITORY / "scripts"))
import mutation_test


def test_bad_input_is_one_line(capsys, monkeypatch):
    assert guarded(mutation_test.main, ["gate"]) == 2
    assert "unknown module gate. There are: returns, policy_loss" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert guarded(mutation_test.main, ["gates"]) == 2
    assert "requirements-mutation.txt" in capsys.readouterr().err


def test_modules_and_their_tests_exist():
    for module, tests in mutation_test.MODULES.values():
        assert (REPOSITORY / f"source/m3po/{module}.py").is_file()
        assert all((REPOSITORY / f"tests/test_{name}.py").is_file() for name in tests.split())


@pytest.mark.parametrize(("unnoticed", "code"), [(1, 0), (2, 1)])
def test_one_in_twenty_may_go_unnoticed(unnoticed, code, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    left = {"returns": [], "gates": ["m.f_1\n-a\n+b"] * unnoticed}
    monkeypatch.setattr(mutation_test, "survivors", lambda name, folder: (10, left[name]))
    assert mutation_test.main(["returns", "gates"]) == code
    assert f"all: 20 changes, {unnoticed} unnoticed" in capsys.readouterr().out


def test_the_lock_adds_to_the_main_lock_and_changes_nothing_of_it():
    assert_adds_to_the_lock("requirements-mutation.txt", "mutmut")


@pytest.mark.slow
def test_a_module_is_mutated(tmp_path: Path):
    pytest.importorskip("mutmut")
    total, left = mutation_test.survivors("policy_loss", tmp_path)
    assert total > 20
    assert len(left) <= 0.1 * total
