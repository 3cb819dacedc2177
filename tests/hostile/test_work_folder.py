"""The folder that `finetune run` works in is its owner's, and nothing that somebody put there is followed."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import spec_cases
from finetune_cli import local
from finetune_cli.errors import CommandError, Exit
from waiting import PATIENCE_S

STORE = """
import sys
from finetune_api.run import StorageConfig
from finetune_trainer.store import open_store
store = open_store(StorageConfig())
for uri in sys.argv[1:]:
    store.put(uri, b"tokens of rows")
"""


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def _work_dir(tmp_path: Path) -> Path:
    return local.default_work_dir(tmp_path / "job.yaml", spec_cases.base())


def _link_in_place_of_the_lock(work: Path, precious: Path) -> Path:
    work.mkdir(parents=True)
    (work / "lock").symlink_to(precious)
    return work / "lock"


def _link_deep_inside(work: Path, precious: Path) -> Path:
    (work / "model").mkdir(parents=True)
    (work / "model" / "config.json").symlink_to(precious)
    return work / "model" / "config.json"


def _link_in_place_of_the_folder(work: Path, precious: Path) -> Path:
    work.parent.mkdir(parents=True)
    work.symlink_to(precious.parent, target_is_directory=True)
    return work


def _link_in_place_of_the_folder_above(work: Path, precious: Path) -> Path:
    work.parent.symlink_to(precious.parent, target_is_directory=True)
    return work.parent


@pytest.mark.parametrize(
    "plant",
    [
        _link_in_place_of_the_lock,
        _link_deep_inside,
        _link_in_place_of_the_folder,
        _link_in_place_of_the_folder_above,
    ],
)
def test_a_planted_link_is_named_and_not_followed(tmp_path: Path, plant: Callable[[Path, Path], Path]) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    precious = home / "credentials"
    precious.write_text("mine")
    link = plant(_work_dir(tmp_path), precious)
    with pytest.raises(CommandError) as caught, local.locked(_work_dir(tmp_path)):
        pass
    assert str(link) in str(caught.value)
    assert "is a link" in str(caught.value)
    assert caught.value.code == Exit.USAGE
    assert precious.read_text() == "mine"
    assert _mode(home) == 0o755
    assert list(home.iterdir()) == [precious]


def test_a_work_folder_is_its_owners_alone_also_one_that_was_not(tmp_path: Path) -> None:
    for made in (False, True):
        work = tmp_path / str(made) / "work"
        if made:
            work.mkdir(mode=0o755, parents=True)
            work.chmod(0o777)
        with local.locked(work):
            assert (_mode(work), _mode(work / "lock")) == (0o700, 0o600)


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(CommandError, match="belongs to another user"), local.locked(tmp_path):
        pass


@pytest.mark.parametrize(("umask", "file_mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_local_store_heeds_the_umask_and_keeps_tokens_of_rows_to_their_owner(
    tmp_path: Path, umask: int, file_mode: int
) -> None:
    files = [tmp_path / "out" / "run" / name for name in ("adapter/README.md", ".job/prepared/train/tokens")]
    command = [sys.executable, "-P", "-c", STORE, *(file.as_uri() for file in files)]
    done = subprocess.run(command, umask=umask, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [_mode(file) for file in files] == [file_mode] * 2
    assert _mode(files[1].parents[2]) == 0o700
