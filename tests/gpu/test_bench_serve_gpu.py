"""``ullage bench serve`` against a real server on a real GPU, its memory seen by NVML."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("pynvml")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available: there is no GPU"),
    pytest.mark.skipif(
        not transformers.utils.import_utils.is_serve_available(), reason="transformers[serving] is not installed"
    ),
]


def test_a_real_server_on_this_gpu(tmp_path, capsys):
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    from test_bench_server import save_model

    from ullage.cli import main

    save_model(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(tmp_path), "--host", "127.0.0.1", "--port", str(port), "--device", "cuda:0"]
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _try in range(300):
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            try:
                opener.open(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.3)
        words = ["--model", str(tmp_path), "--word", "w1", "--max-concurrency", "8", "--nvml", "0", "--json"]
        assert main(["bench", "serve", f"http://127.0.0.1:{port}", *words]) == 0
    finally:
        process.terminate()
        process.wait(30)
    answer = json.loads(capsys.readouterr().out)
    folder = os.environ.get("ULLAGE_WRITE_RECORDS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "bench-serve.json").write_text(json.dumps(answer, indent=1))
    assert answer["memory"] == "nvml" and all(phase["peak_used_bytes"] for phase in answer["phases"])
    assert answer["phases"][2]["figures"]["num_errors"] == 0
