"""Prometheus' own parser reads the endpoint over HTTP; every query of dashboard and alarms asks for exported names."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from ullage.guard.watch import alerts, grafana
from ullage.guard.watch.metrics import METRICS
from ullage.guard.watch.sample import Counters, Device, Sample
from ullage.guard.watch.watcher import Watcher

prometheus_client = pytest.importorskip("prometheus_client")
GiB = 2**30
ADDRESS = "127.0.0.1:19099"
DASHBOARD = json.loads((Path(next(iter(grafana.__path__))) / "dashboard.json").read_text())
_WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_PROMQL = {"by", "and", "or", "unless", "offset", "bool", "on", "ignoring"}


def names_in(query):
    bare = re.sub(r'\{[^}]*\}|"[^"]*"|\[[^\]]*\]|\b\d+[smhd]\b', " ", query)
    bare = re.sub(r"\bby\s*\([^)]*\)", " ", bare)
    found = [match for match in _WORD.finditer(bare) if match.group() not in _PROMQL]
    return {match.group() for match in found if not bare[match.end() :].lstrip().startswith("(")}


def queries():
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    found += [rule.query for rule in alerts.alerts()]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            found.append(re.fullmatch(r"label_values\((.*), \w+\)", variable["query"]["query"]).group(1))
    return found


def test_the_parse_of_queries_can_fail():
    assert names_in('sum by (device) (rate(foo_total{a="b"}[5m])) / bar > bool baz') == {"foo_total", "bar", "baz"}


@pytest.mark.parametrize("query", queries())
def test_a_query_asks_for_exported_names_and_labels(query):
    exported = {metric.exported: metric for metric in METRICS}
    names = names_in(query)
    assert names
    assert names <= exported.keys()
    for name, labels in re.findall(r"([a-z_]+)\{([^}]*)\}", query):
        known = {"instance", "job", *exported[name].labels}
        assert set(re.findall(r"(\w+)\s*=~?", labels)) <= known


def test_every_metric_is_shown_or_alarmed():
    asked = set().union(*(names_in(query) for query in queries()))
    assert {metric.exported for metric in METRICS} == asked


def watcher_with(samples):
    watcher = Watcher(reserve="20%")
    watcher.sampler.take = lambda: samples
    return watcher


def gpu(used, **counters):
    device = Device(index=0, name='NVIDIA "H100"\n80GB', total_bytes=80 * GiB)
    found = Counters(pid=7, device=0, rank=3, age_seconds=0.5, allocated_bytes=GiB, reserved_bytes=2 * GiB, **counters)
    return Sample(device=device, used_bytes=used, counters=(found,))


def scraped(port):
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_client_scrapes_the_values():
    from ullage.guard.watch.endpoint import serve

    samples = [gpu(70 * GiB, num_alloc_retries=2, num_ooms=1, step=12)]
    watcher = watcher_with(samples)
    for moment in range(5):
        watcher.trend.add([gpu(moment * GiB)], now=time.monotonic() - 60 + 10 * moment)
    watcher.look()
    port, stop = serve(watcher.values, port=0, address="127.0.0.1")
    try:
        found = scraped(port)
    finally:
        stop()
        watcher.close()
    named = {metric.exported for metric in METRICS} - {"ullage_process_used_bytes"}
    assert {key[0] for key in found} == named
    device = (("device", "0"), ("kind", "gpu"), ("name", 'NVIDIA "H100"\n80GB'))
    torch = (("device", "0"), ("pid", "7"), ("rank", "3"))
    assert found[("ullage_device_used_bytes", *device)] == 70 * GiB
    assert found[("ullage_device_reserve_line_bytes", *device)] == 64 * GiB
    assert found[("ullage_torch_alloc_retries_total", *torch)] == 2
    assert found[("ullage_torch_ooms_total", *torch)] == 1
    assert found[("ullage_torch_step", *torch)] == 12
    assert found[("ullage_watch_samples_total",)] == 1


def started_watch(*words):
    process = subprocess.Popen(
        [sys.executable, "-m", "ullage.cli", "watch", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    match = re.search(r":(\d+)/metrics", process.stderr.readline())
    assert match
    return process, int(match.group(1))


def test_the_command_serves_and_ends_on_request():
    process, port = started_watch("--port", "0", "--interval", "0.1")
    try:
        found = scraped(port)
        again = dict(found)
        end = time.monotonic() + 10
        while again[("ullage_watch_samples_total",)] == found[("ullage_watch_samples_total",)]:
            assert time.monotonic() < end
            time.sleep(0.1)
            again = scraped(port)
        host = next(key for key in found if key[0] == "ullage_device_used_bytes" and ("kind", "host") in key)
        assert found[host] > 0
    finally:
        process.terminate()
        assert process.wait(timeout=10) == 0


def test_a_port_that_is_taken_is_said_in_one_sentence(capsys):
    from ullage.cli import main

    process, port = started_watch("--port", "0")
    try:
        assert main(["watch", "--port", str(port), "--samples", "1"]) == 2
        assert re.fullmatch(r"ullage: --port: cannot listen on 127\.0\.0\.1:\d+: .*\n", capsys.readouterr().err)
    finally:
        process.terminate()
        process.wait(timeout=10)


def test_the_alarm_rules_are_yaml():
    yaml = pytest.importorskip("yaml")
    rules = yaml.safe_load(alerts.alerts_yaml(45))["groups"][0]["rules"]
    assert {rule["alert"]: rule["expr"] for rule in rules} == {rule.name: rule.query for rule in alerts.alerts(45)}
    assert any("2700" in rule["expr"] for rule in rules)


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_prometheus_parses_every_query(tmp_path):
    rules = [{"record": f"query:{at}", "expr": query.replace("$", "")} for at, query in enumerate(queries())]
    (tmp_path / "queries.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    (tmp_path / "alerts.yml").write_text(alerts.alerts_yaml())
    for name in ("queries.yml", "alerts.yml"):
        done = subprocess.run(["promtool", "check", "rules", tmp_path / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not os.environ.get("ULLAGE_PROMETHEUS"), reason="on demand: ULLAGE_PROMETHEUS=1")
def test_a_real_prometheus_scrapes_and_answers_the_dashboard(tmp_path):
    """Every query of the dashboard is answered without an error by a Prometheus that scrapes a real watch."""
    process, port = started_watch("--port", "0", "--interval", "0.2")
    (tmp_path / "alerts.yml").write_text(alerts.alerts_yaml())
    (tmp_path / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1s}}\nrule_files: [alerts.yml]\nscrape_configs:\n"
        f"  - job_name: ullage\n    static_configs: [{{targets: ['127.0.0.1:{port}']}}]\n"
    )
    server = subprocess.Popen(
        ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={ADDRESS}"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ask(query):
        asked = f"http://{ADDRESS}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return json.load(answer)["data"]["result"]

    try:
        end = time.monotonic() + 60
        while True:
            try:
                if ask("ullage_device_used_bytes"):
                    break
            except OSError:
                pass
            assert time.monotonic() < end
            time.sleep(0.5)
        time.sleep(3)
        for query in queries():
            ask(query.replace('"$instance"', '".*"').replace('"$device"', '".*"'))
        assert float(ask("max(ullage_device_used_bytes / ullage_device_total_bytes)")[0]["value"][1]) > 0
        assert float(ask("sum(increase(ullage_watch_samples_total[30s]))")[0]["value"][1]) > 0
    finally:
        for each in (server, process):
            each.terminate()
            each.wait(timeout=20)
