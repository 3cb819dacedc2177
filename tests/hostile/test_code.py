"""No code runs that is not ours or a package's: not what lies in the folder from which somebody starts a job."""

import ast
import subprocess
import sys
from pathlib import Path

from finetune_api.names import Stage
from finetune_cli.stages import StageRun
from tiny_run import make_run
from waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for room in ("api", "operator", "trainer", "cli") for path in (ROOT / room).rglob("*.py"))


def _starts_of_python(path: Path) -> list[ast.List | ast.Tuple]:
    """The lists and tuples that begin with sys.executable: commands."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.List | ast.Tuple) and node.elts and ast.unparse(node.elts[0]) == "sys.executable"
    ]


def test_every_python_that_we_start_leaves_the_current_folder_out_of_its_path() -> None:
    starts = [(path, each) for path in SOURCES for each in _starts_of_python(path)]
    assert len(starts) >= 4
    mentions = sum(path.read_text().count("sys.executable") for path in SOURCES)
    assert mentions == len(starts), "a command that this test does not see"
    assert [path.name for path, each in starts if ast.unparse(each.elts[1]) != "'-P'"] == []
    entrypoints = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("ENTRYPOINT")]
    assert len(entrypoints) == 2
    assert all(line.startswith('ENTRYPOINT ["python", "-P", "-m", ') for line in entrypoints)


def test_modules_beside_a_job_are_not_imported(tmp_path: Path) -> None:
    run, here, ran = make_run(tmp_path, steps=1), tmp_path / "job", tmp_path / "ran"
    here.mkdir()
    for name in ("orjson", "pydantic", "torch", "numpy", "yaml", "finetune_trainer"):
        (here / f"{name}.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise ImportError('planted')\n")
    config_file = tmp_path / "run.json"
    config_file.write_text(run.config.to_json())
    stage = StageRun(run.config, config_file, Stage.TRAIN, 1, run.plan.digest(), tmp_path / "log", 0)
    done = subprocess.run(stage.command(), cwd=here, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert stage.command()[0] == sys.executable
    assert not ran.exists()
    assert done.returncode == 0, done.stderr[-2000:]
