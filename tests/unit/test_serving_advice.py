"""Advice on serving: requests that wait, as many GPUs as it takes, no more weights on the host than there are."""

import json
import shlex

import pytest

from ullage.cli import main


def of(capsys, line):
    main([*shlex.split(line), "--json"])
    return json.loads(capsys.readouterr().out)


def test_too_many_requests_are_told_to_wait(capsys):
    found = of(capsys, "fit serve qwen3-8b --on H100 --context 32k --concurrency 500")
    first = found["advice"][0]
    assert first["flags"].startswith("--concurrency ")
    count = int(first["flags"].split()[1])
    assert 1 <= count <= found["serving"]["max_concurrency"]
    line = f"fit serve qwen3-8b --on H100 --context 32k --concurrency {count}"
    after = of(capsys, line)
    assert after["verdict"] == first["verdict"] == "fits"
    assert found["worst"]["needed_bytes"] - after["worst"]["needed_bytes"] == pytest.approx(first["gain_bytes"], abs=2)
    assert of(capsys, line.replace(f"concurrency {count}", f"concurrency {count + 1}"))["verdict"] != "fits"


def test_gpus_are_doubled_until_it_fits(capsys):
    found = of(capsys, "fit serve gpt-oss-120b --on A100-40GB")
    more = next(item for item in found["advice"] if "GPUs of this kind" in item["change"])
    assert more["verdict"] == "fits" and "4 GPUs" in more["change"] and more["cost"] == "3 more GPUs"
    assert "--pipeline" not in more["typed"]


@pytest.mark.parametrize("line", ["llama-3.1-70b --on RTX4090", "llama-3.1-8b --on T4", "qwen3-8b --on RTX3060"])
def test_no_more_weights_are_put_on_the_host_than_there_are(capsys, line):
    found = of(capsys, f"fit serve {line}")
    for item in found["advice"]:
        words = item["flags"].split()
        if "--cpu-offload" in words:
            size = int(words[words.index("--cpu-offload") + 1].removesuffix("GiB"))
            assert (size - 1) * 2**30 < found["serving"]["weights_bytes"]


def test_more_gpus_come_before_seconds_of_copies_in_every_step(capsys):
    found = of(capsys, "fit serve deepseek-v3 --on 8xH100")
    changes = [item["change"] for item in found["advice"]]
    assert "16 GPUs" in changes[0]
    assert any("host memory" in change for change in changes[1:])
