"""An embedded Ray keeps to this machine and to the installed modules, and has the command's
priority: in a process of its own, started in a hostile folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, os, psutil, ray, sys
from adversa.config import Cluster
from adversa.distributed import start

start.start(Cluster(cpus=1, object_store_mb=100), False)

@ray.remote
def found():
    import colorsys
    return colorsys.__file__, os.nice(0)

(module, nice), me = ray.get(found.remote()), psutil.Process()
connections = [c for p in [me, *me.children(recursive=True)] for c in p.net_connections("inet")]
listening = {c.laddr.ip for c in connections if c.status == "LISTEN"}
print(json.dumps({
    "module": module, "nice": nice - os.nice(0), "listening": sorted(listening),
    "dashboard": ray._private.worker.global_worker.node.webui_url,
}))
ray.shutdown()
"""


def test_an_embedded_ray_listens_on_loopback_and_takes_no_module_from_the_folder_one_is_in(
    tmp_path,
):
    """Whoever reaches its ports can run code; and workers would look for modules in the current
    folder first.
    """
    (tmp_path / "colorsys.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    words = [sys.executable, "-P", "-c", SCRIPT]
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["listening"] and all(
        ip.removeprefix("::ffff:") in ("127.0.0.1", "::1") for ip in said["listening"]
    ), said
    assert said["nice"] == 0
    assert (
        not said["dashboard"]
        and not said["module"].startswith(str(tmp_path))
        and not (tmp_path / "executed").exists()
    )
