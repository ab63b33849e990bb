"""deploy/ and docs/operations.md name what there is: series, flags, routes, files."""

import argparse
import ast
import importlib
import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from fake_engine import PATIENCE, wait_until
from image_check import instructions
from prometheus_client.parser import text_string_to_metric_families

from duetjax.build import ModelRequest, load
from duetjax.cli import _parser
from duetjax.config import EngineConfig, SamplingParams
from duetjax.policy.request import NewRequest
from duetjax.serve.limits import Limits
from duetjax.serve.metrics import Metrics
from duetjax.serve.probes import probes
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

DEPLOY = ROOT / "deploy"
CACHE = "/var/cache/duetjax"
PORT = _parser().parse_args(["serve"]).port
LONGEST_END = _parser().parse_args(["serve"]).shutdown_timeout + 38
"""Seconds from SIGTERM on: a drain, 2 for error events, 1 for uvicorn, 30 + 5 for the engine."""
NOT_OURS = {"--build-arg", "--gpus", "--stop-timeout"}
"""Flags of docker."""

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


def subparsers():
    """Every command of duetjax, by name."""
    actions = _parser()._actions
    [commands] = [each for each in actions if isinstance(each, argparse._SubParsersAction)]
    return commands.choices


def parsed(arguments):
    """What `duetjax` makes of a command line, on which every flag is written out."""
    command, *rest = arguments
    flags = {each.partition("=")[0] for each in rest if each.startswith("--")}
    assert flags <= subparsers()[command]._option_string_actions.keys()
    return _parser().parse_args(arguments)


def probe_paths():
    return {route.path for route in probes(None)}


def the(name):
    """The one instruction of the last stage that has this name."""
    last = max(i for i, (each, _) in enumerate(instructions()) if each == "FROM")
    [found] = [rest for each, rest in instructions()[last:] if each == name]
    return found


def copied():
    """What the image takes of the repository."""
    found = [rest.split()[:-1] for name, rest in instructions() if name == "COPY"]
    return [source for sources in found if "--from" not in sources[0] for source in sources]


def test_the_image_copies_what_exists_and_what_is_sent_to_the_builder():
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [rule for rule in ignore if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(copied())
    for source in copied():
        assert (ROOT / source).exists(), source
        assert not any(fnmatch(source, rule.removeprefix("**/")) for rule in rules[1:])


def test_the_image_has_all_that_the_wheel_is_built_from():
    sources = ["duetjax", "pallas_kernels", "launcher", "checkpoints/demo", "pyproject.toml"]
    assert {*sources, "setup.py", "README.md", "LICENSE", "requirements-cuda13.lock"} <= set(
        copied()
    )


def test_the_image_serves_as_nobody_special_on_the_port_that_it_exposes():
    program, *arguments = json.loads(the("ENTRYPOINT"))
    args = parsed(arguments)
    assert (program, args.host, args.port) == ("duetjax", "0.0.0.0", PORT)
    assert int(the("EXPOSE")) == PORT
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", the("USER"))
    assert the("STOPSIGNAL") == "SIGTERM"
    assert the("VOLUME") == CACHE
    assert f"DUETJAX_CACHE_DIR={CACHE}" in the("ENV").split()


def test_the_image_asks_whether_it_lives():
    command = json.loads(the("HEALTHCHECK").partition(" CMD ")[2])
    [(port, path)] = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", command[-1])
    assert (int(port), path) == (PORT, "/livez")
    assert path in probe_paths()
    compile(command[-1], "HEALTHCHECK", "exec")


def test_the_image_installs_what_is_locked_with_cuda_by_hash():
    [command] = [rest.split() for name, rest in instructions() if name == "RUN" and " -r " in rest]
    assert {"--no-deps", "--require-hashes"} < set(command)
    assert command[-1] in copied()


def test_the_image_may_have_an_extra_that_there_is():
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    [extra] = re.findall(r"EXTRAS=(\w+)", text)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\n{extra} = [" in project.partition("[project.optional-dependencies]")[2]
    assert f"--build-arg EXTRAS={extra}" in PAGE


def test_the_example_for_ray_imports_what_there_is():
    tree = ast.parse((DEPLOY / "ray_serve.py").read_text(encoding="utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in froms if node.module.startswith("duetjax")]
    assert ours
    for node in ours:
        module = importlib.import_module(node.module)
        assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def unit():
    """The settings of deploy/duetjax.service: section to name to values."""
    found = {}
    for line in (DEPLOY / "duetjax.service").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            name, equals, value = line.partition("=")
            assert equals, line
            section.setdefault(name, []).append(value)
    return found


def test_the_unit_runs_a_command_line_that_there_is_and_no_key_is_in_it():
    [command] = unit()["Service"]["ExecStart"]
    text = (DEPLOY / "duetjax.service").read_text(encoding="utf-8")
    [example] = re.findall("DUETJAX_ARGS=(.*)", text)
    program, *arguments = shlex.split(command.replace("$DUETJAX_ARGS", example))
    assert program == "/opt/duetjax/bin/duetjax"
    args = parsed(arguments)
    assert (args.api_key, args.port) == (None, PORT)
    assert "DUETJAX_API_KEY=" in text  # of the environment's file


def test_the_unit_waits_for_a_drain_and_does_not_repeat_what_cannot_work():
    service = {name: values[-1] for name, values in unit()["Service"].items()}
    assert int(service["TimeoutStopSec"]) > LONGEST_END
    assert (service["Restart"], service["KillMode"]) == ("on-failure", "mixed")
    assert service["RestartPreventExitStatus"] == "2"
    assert service["WorkingDirectory"] == f"/var/cache/{service['CacheDirectory']}" == CACHE
    assert f"DUETJAX_CACHE_DIR={CACHE}" in unit()["Service"]["Environment"]


@pytest.mark.parametrize(
    "name", ["PrivateDevices", "DevicePolicy", "ProtectClock", "MemoryDenyWriteExecute"]
)
def test_the_unit_leaves_a_gpu_and_compiled_code_alone(name):
    assert name not in unit()["Service"]


@pytest.fixture(scope="module")
def objects():
    """What deploy/kubernetes.yaml describes, by kind."""
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


@pytest.fixture
def pod(objects):
    return objects["Deployment"]["spec"]["template"]


@pytest.fixture
def container(pod):
    [found] = pod["spec"]["containers"]
    return found


def test_the_pod_runs_a_command_line_that_there_is(container):
    _, *entry = json.loads(the("ENTRYPOINT"))
    args = parsed([*entry, *container["args"]])
    assert [each["containerPort"] for each in container["ports"]] == [args.port] == [PORT]
    [variable] = container["env"]
    assert (args.api_key, variable["name"]) == (None, "DUETJAX_API_KEY")
    assert variable["valueFrom"]["secretKeyRef"].keys() == {"name", "key"}


def test_the_pod_is_asked_on_routes_that_there_are(container):
    asked = {
        name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")
    }
    assert {name: get["path"] for name, get in asked.items()} == {
        "startup": "/livez",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert {get["path"] for get in asked.values()} <= probe_paths()
    assert {get["port"] for get in asked.values()} == {container["ports"][0]["name"]}


def test_the_pod_may_start_for_long_and_end_in_peace(objects, pod, container):
    startup = container["startupProbe"]
    patience = startup["periodSeconds"] * startup["failureThreshold"]
    assert patience >= 1800
    assert objects["Deployment"]["spec"]["progressDeadlineSeconds"] > patience
    _, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > int(seconds) + LONGEST_END


def test_the_pod_has_a_gpu_and_the_volumes_and_the_user_of_the_image(objects, pod, container):
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    security = pod["spec"]["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == the("USER")
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts == {"cache": CACHE, "tmp": "/tmp"}
    assert mounts.keys() == {each["name"] for each in pod["spec"]["volumes"]}
    claim = pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == objects["PersistentVolumeClaim"]["metadata"]["name"]


def test_the_service_finds_the_pods(objects, pod, container):
    labels = pod["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    [port] = objects["Service"]["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (PORT, container["ports"][0]["name"])


def test_the_page_names_flags_and_alike_numbers_that_there_are():
    options = {flag for each in subparsers().values() for flag in each._option_string_actions}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE)) - NOT_OURS <= options
    assert f"TimeoutStopSec={unit()['Service']['TimeoutStopSec'][0]}" in PAGE
    [grace] = re.findall(r"terminationGracePeriodSeconds: \d+", PAGE)
    assert grace in (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
