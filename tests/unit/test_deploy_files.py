"""deploy/ and docs/operations.md name the series that /metrics has, and no others."""

import json
import re
from pathlib import Path

import pytest
import yaml
from fake_engine import PATIENCE, wait_until
from prometheus_client.parser import text_string_to_metric_families

from duetjax.build import ModelRequest, load
from duetjax.config import EngineConfig, SamplingParams
from duetjax.policy.request import NewRequest
from duetjax.serve.limits import Limits
from duetjax.serve.metrics import Metrics
from duetjax.serve.queue_bound import QueueBound

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text(encoding="utf-8"))
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
EXPRESSIONS += [rule["expr"] for rule in RULES]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
METRICS = PAGE.partition("\n## Metrics\n")[2].partition("\n## ")[0]

OF_PROMETHEUS = {"job", "instance"}
"""Labels that a scrape adds."""
WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
SERIES = re.compile(r"`([a-z0-9_:]+)`")
SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{([^}]*)\}")


def names(expression):
    """Series of a PromQL expression: what is left without strings, labels, ranges and functions."""
    text = re.sub(r"\"[^\"]*\"", "", expression)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", GROUPING.sub("", text))
    words = re.findall(
        r"[a-zA-Z_:][a-zA-Z0-9_:]*(?!\w)(?!\s*\()", re.sub(r"\b[0-9.]+\w*", "", text)
    )
    return {word for word in words if word not in WORDS}


@pytest.fixture(scope="module")
def families():
    """What Prometheus' parser finds at /metrics of an engine that has shared its device."""
    config = EngineConfig(
        device="sim",
        policy="static-split",
        split=(40, 92),
        hardware_profile="h200-sxm",
        sim_step_ms=(0.5, 0.5),
    )
    client = load(ModelRequest(), config).engine
    left = [request("short", 5, 400), *(request(f"long{i}", 900, 3) for i in range(6))]
    ended = set()

    def on_outputs(outputs):
        if left:
            client.submit(left.pop())  # prompts while others decode
        ended.update(request_id for request_id, _ in outputs.finished)

    client.start(on_outputs)
    client.submit(left.pop())
    client.submit(left.pop(0))
    try:
        wait_until(lambda: len(ended) == 7, "all requests")
        wait_until(lambda: client.launch_counts().ended, "the end of an episode")
        metrics = Metrics(client, "model", lambda: 3, QueueBound(client, Limits()), 50.0)
        text = metrics.render().decode()
    finally:
        client.shutdown(PATIENCE)
    return {family.name: family for family in text_string_to_metric_families(text)}


def request(request_id, prompt_len, max_tokens):
    sampling = SamplingParams(seed=1, logit_bias={7: 100})
    return NewRequest(request_id, tuple(range(10, 10 + prompt_len)), max_tokens, sampling)


@pytest.fixture(scope="module")
def labels(families):
    """The labels of each sample, by its name."""
    found = {}
    for family in families.values():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("up", {"up"}),
        ('sum by (le, lane) (rate(a:b_bucket{x="c d", y=~"e.*"}[5m])) / 2.5e3', {"a:b_bucket"}),
        ("a > on (instance) 0.01 * sum(b) and on (job) deriv(c[1h] offset 5m) > 0", {*"abc"}),
        ("histogram_quantile(0.99, rate(x_bucket[$__rate_interval]))", {"x_bucket"}),
    ],
)
def test_names_are_found_in_an_expression(expression, expected):
    assert names(expression) == expected


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_has_only_series_and_labels_that_exist(labels, expression):
    used = names(expression)
    assert used
    assert [name for name in used if name not in labels] == []
    for name, selected in SELECTOR.findall(expression):
        matched = set(re.findall(r"(\w+)\s*[=!]~?", selected))
        assert matched <= labels[name] | OF_PROMETHEUS
    grouped = {label.strip() for by in GROUPING.findall(expression) for label in by.split(",")}
    assert grouped <= OF_PROMETHEUS.union(*(labels[name] for name in used))


def test_the_dashboard_has_its_rows_and_asks_the_chosen_source_alone():
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Latency", "Throughput", "Duet", "KV and queue", "Errors"]
    first = DASHBOARD["templating"]["list"][0]
    assert (first["name"], first["type"], first["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    sources = [panel["datasource"] for panel in PANELS]
    sources += [target["datasource"] for panel in PANELS for target in panel["targets"]]
    assert {source["uid"] for source in sources} == {"${datasource}"}


def test_its_panels_are_told_apart_and_do_not_overlap():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_how_bad_and_the_page_what_to_do(rule):
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description"}
    assert f"`{rule['alert']}`" in PAGE


def rows():
    """The series that the page lists, with their kinds."""
    cells = [line.split("|") for line in METRICS.splitlines() if line.startswith("| `")]
    return [(name, kind.strip()) for _, names, kind, *_ in cells for name in SERIES.findall(names)]


def test_the_page_lists_the_series_that_there_are_once_and_with_their_kinds(families):
    found = {
        f"{name}_total" if family.type == "counter" else name: family.type
        for name, family in families.items()
    }
    assert len(rows()) == len(found)
    assert dict(rows()) == found
