"""The `mend` command where something is missing or wrong: one clear line, and nothing heavy is imported in vain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mend.cli import main

HEAVY = ("matplotlib", "rich", "cel_expr_python", "mend_local", "torch", "cryptography")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and complaint of a command."""
    code = main([*arguments])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("command", ["get", "describe clio", "explain clio"])
def test_no_cluster_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A kubeconfig that is not there is said to be unusable."""
    code, words = said(capsys, *command.split(), "--kubeconfig", str(tmp_path / "none"))
    assert code == 1
    assert words.splitlines()[-1].startswith("mend: cluster credentials: unusable: ")


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody listens at the server's address: the request and the reason, no traceback."""
    (tmp_path / "config").write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: k, cluster: {server: 'https://127.0.0.1:9'}}]\n"
        "users: [{name: u, user: {token: t}}]\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n"
    )
    code, words = said(capsys, "get", "--kubeconfig", str(tmp_path / "config"))
    assert code == 1
    assert words.startswith("mend: GET /apis/mend.dev/v1alpha1/namespaces/default/trainingruns: ")
    assert len(words.splitlines()) == 1


@pytest.mark.parametrize("command", ["replay", "chart", "explain clio --journal"])
def test_a_file_that_is_not_there_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is named."""
    code, words = said(capsys, *command.split(), "/nowhere/x.journal.jsonl")
    assert code == 1
    assert "/nowhere/x.journal.jsonl: No such file or directory" in words


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("controller", "--lease-seconds", "1"), "expected a whole number of at least 2"),
        (("controller", "--journal-size", "1GB"), "got '1GB'; expected a whole number of Mi or Gi, for example 1Gi"),
        (("controller", "--log-level", "LOUD"), "invalid choice: 'LOUD'"),
        (("fly",), "invalid choice: 'fly'"),
    ],
)
def test_a_wrong_word_is_refused_with_what_is_expected(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """argparse's exit code 2, as everywhere."""
    with pytest.raises(SystemExit) as leave:
        main([*arguments])
    assert leave.value.code == 2
    assert expected in capsys.readouterr().err


def test_an_address_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--listen says what it takes."""
    code, words = said(capsys, "controller", "--listen", "here:http", "--data-dir", str(tmp_path))
    assert code == 1
    assert "--listen: got 'here:http'; expected HOST:PORT" in words


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--help of each says what it is for; --version says which mend this is."""
    for command in ("get", "describe", "explain", "chart", "replay", "checkpoint", "controller", "local", "demo"):
        with pytest.raises(SystemExit) as leave:
            main([command, "--help"])
        assert leave.value.code == 0
        assert f"usage: mend {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("mend 0.")


def test_the_controller_starts_without_what_only_people_need() -> None:
    """Importing the command imports no plotting, no terminal library, no local cluster: it starts in a second."""
    code = f"import sys, mend.cli; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []
