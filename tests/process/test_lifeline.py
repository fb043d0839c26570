"""The end of a child whose supervisor is gone."""

import subprocess
import sys
from pathlib import Path

# rmtree finds what another thread has written behind its back, the first time.
CHILD = """
import shutil, sys, threading
from pathlib import Path
from mlx_server.status import end_with_supervisor

def rmtree(folder, **options):
    shutil.rmtree = remove
    remove(folder / "responses")
    (folder / "engine.pulse").touch()

remove, shutil.rmtree = shutil.rmtree, rmtree
end_with_supervisor(Path(sys.argv[1]))
threading.Event().wait()
"""


def test_the_run_directory_goes_also_while_others_write_to_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "responses").mkdir(parents=True)
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(run_dir)], stdin=subprocess.PIPE)
    child.communicate(timeout=30)
    assert child.returncode == 1
    assert not run_dir.exists()
