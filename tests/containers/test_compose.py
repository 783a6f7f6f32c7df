"""The compose file: follows the specification, and agrees with the Dockerfile that it builds."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.containers.conftest import SAMPLE
from tests.containers.steps import Recipe

COMPOSE: dict[str, Any] = yaml.safe_load((SAMPLE / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROFILES = {"cpu": {"cpu", "prometheus"}, "gpu": {"triton", "prometheus"}}
"""What `--profile` starts."""


def test_compose_file_follows_the_specification() -> None:
    """The JSON schema of the compose specification accepts it, unknown keys included."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [*command, str(SAMPLE / "compose.yaml")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_profiles_start_these_services() -> None:
    """No service is started without a profile, and none is in the wrong one."""
    found = {
        profile: {name for name, service in SERVICES.items() if profile in service["profiles"]} for profile in PROFILES
    }
    assert found == PROFILES
    assert set().union(*PROFILES.values()) == set(SERVICES)


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_hardened_and_watched(name: str) -> None:
    """Read-only root, no capabilities, no new privileges, and a health check: the anchor reached every service."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_reached_from_this_machine_only(name: str) -> None:
    """Nothing listens on other interfaces: there is no password in front of it."""
    assert [port for port in SERVICES[name]["ports"] if not port.startswith("127.0.0.1:")] == []


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_service_probes_as_the_image_does(recipe: Recipe, name: str) -> None:
    """The health check of the service and that of the image ask the same question, at the same pace."""
    (step,) = (step.value for step in recipe.stages[name] if step.name == "HEALTHCHECK")
    flags, _, command = step.partition("CMD")
    written = dict(flag.removeprefix("--").split("=") for flag in flags.split())
    check = SERVICES[name]["healthcheck"]
    assert check["test"] == ["CMD", *json.loads(command)]
    assert {key.replace("-", "_"): value for key, value in written.items()} == {
        key: str(value) for key, value in check.items() if key != "test"
    }


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_service_builds_a_stage_of_the_dockerfile(recipe: Recipe, name: str) -> None:
    """Context, file and target are there."""
    built = SERVICES[name]["build"]
    assert (SAMPLE / built["context"] / built["dockerfile"]).resolve() == SAMPLE / "Dockerfile"
    assert built["target"] in recipe.stages


def test_triton_is_not_killed_while_it_ends_what_it_has_begun() -> None:
    """The grace period of the service is longer than Triton's own timeout."""
    options = dict(word.split("=") for word in SERVICES["triton"]["command"] if word.startswith("--"))
    assert int(SERVICES["triton"]["stop_grace_period"].removesuffix("s")) > int(options["--exit-timeout-secs"])


def test_only_triton_asks_for_a_gpu() -> None:
    """`--profile cpu` starts on a machine without one."""
    asks = {
        name: service["deploy"]["resources"]["reservations"]["devices"]
        for name, service in SERVICES.items()
        if "deploy" in service
    }
    assert asks == {"triton": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]}


def test_prometheus_scrapes_the_service(recipe: Recipe) -> None:
    """Each target is a service of the compose file at a port that its image exposes, and each server is one."""
    jobs = yaml.safe_load((SAMPLE / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    targets = [target for job in jobs for entry in job["static_configs"] for target in entry["targets"]]
    exposed = {
        f"{name}:{port}"
        for name in ("cpu", "triton")
        for step in recipe.stages[name]
        if step.name == "EXPOSE"
        for port in step.value.split()
    }
    assert set(targets) <= exposed
    assert {target.partition(":")[0] for target in targets} == {"cpu", "triton"}
