"""The Kubernetes manifests: valid in every version they promise, and consistent with each other and with the image."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml

from fptq_export.runtime.metrics import Metrics
from tests.containers.conftest import SAMPLE
from tests.containers.steps import Recipe

FOLDER = SAMPLE / "kubernetes"
VERSIONS = ("1.29", "1.33", "1.37")
"""Oldest, middle and newest version of Kubernetes whose schema must accept the manifests."""
NO_MANIFESTS = {"kustomization.yaml", "prometheus-adapter.yaml"}
"""Files for kubectl and Helm, which the API server never sees."""
READ: dict[str, dict[str, Any]] = {
    path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.yaml"))
}
MANIFESTS = {name: manifest for name, manifest in READ.items() if name not in NO_MANIFESTS}
DEPLOYMENT = READ["deployment.yaml"]
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]
SETTINGS: dict[str, str] = READ["configmap.yaml"]["data"]
UNLOADING_SECONDS = 10
"""What is left of the grace period after preStop and Triton's own timeout: unloading a model takes seconds."""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_follows_the_schema(name: str, version: str) -> None:
    """The strict schema of the API, which knows no other fields, accepts it."""
    assert kubernetes_validate.validate(MANIFESTS[name], version, strict=True) == version


def test_schema_finds_a_wrong_field() -> None:
    """The check above can fail: a probe with a misspelt field is refused."""
    broken = copy.deepcopy(DEPLOYMENT)
    broken["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["period"] = 5
    with pytest.raises(kubernetes_validate.utils.ValidationError, match="period"):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_kustomization_names_every_manifest_and_the_image() -> None:
    """`kubectl apply -k` applies all of them, and replaces the image that the Deployment names."""
    kustomization = READ["kustomization.yaml"]
    assert set(kustomization["resources"]) == set(MANIFESTS)
    assert [image["name"] for image in kustomization["images"]] == [CONTAINER["image"]]


def selectors() -> Iterator[dict[str, str]]:
    yield READ["service.yaml"]["spec"]["selector"]
    yield READ["poddisruptionbudget.yaml"]["spec"]["selector"]["matchLabels"]
    yield DEPLOYMENT["spec"]["selector"]["matchLabels"]
    yield POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"]


def test_selectors_find_the_pods() -> None:
    """Service, disruption budget, Deployment and spread all select the labels of the Pod."""
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert [selector for selector in selectors() if not selector.items() <= labels.items()] == []


def test_ports_are_those_of_the_image(recipe: Recipe) -> None:
    """Container ports, Service targets, probes and the scrape annotation name ports that the image exposes."""
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    (exposed,) = (step.value.split() for step in recipe.stages["triton"] if step.name == "EXPOSE")
    assert sorted(map(str, ports.values())) == sorted(exposed)
    assert {port["targetPort"] for port in READ["service.yaml"]["spec"]["ports"]} <= set(ports)
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["metrics"])


@pytest.mark.parametrize(
    ("probe", "path"),
    [
        ("startupProbe", "/v2/health/ready"),
        ("readinessProbe", "/v2/health/ready"),
        ("livenessProbe", "/v2/health/live"),
    ],
)
def test_probe_asks_triton(probe: str, path: str) -> None:
    """A model that fails to load makes a Pod unready; only a server that does not answer is restarted."""
    assert CONTAINER[probe]["httpGet"] == {"path": path, "port": "http"}


def test_container_can_write_nowhere_but_in_its_scratch() -> None:
    """Not root, read-only root, no capabilities; the writable volumes are in memory or on the node and bounded."""
    context = CONTAINER["securityContext"]
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    writable = [volumes[mount["name"]] for mount in CONTAINER["volumeMounts"] if not mount.get("readOnly")]
    assert [volume for volume in writable if "sizeLimit" not in volume.get("emptyDir", {})] == []


def test_pod_runs_as_the_user_of_the_image(recipe: Recipe) -> None:
    """The user that the Pod asks for is the one whom the image was made for."""
    (user,) = (step.value for step in recipe.stages["triton"] if step.name == "USER")
    context = POD["securityContext"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == user


def test_container_asks_for_a_gpu() -> None:
    """A limit of an extended resource is its request: the Pod lands on a node with a GPU, or stays pending."""
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_every_setting_reaches_the_server() -> None:
    """Each key of the ConfigMap is used in the arguments, and no argument names another."""
    used = re.findall(r"\$\((\w+)\)", " ".join(CONTAINER["args"]))
    assert sorted(used) == sorted(SETTINGS)
    assert CONTAINER["envFrom"] == [{"configMapRef": {"name": READ["configmap.yaml"]["metadata"]["name"]}}]


def test_server_is_started_as_the_image_starts_it(recipe: Recipe) -> None:
    """The arguments of the Pod begin with the command of the image; options follow."""
    (command,) = (json.loads(step.value) for step in recipe.stages["triton"] if step.name == "CMD")
    assert CONTAINER["args"][: len(command)] == command
    assert [word for word in CONTAINER["args"][len(command) :] if not word.startswith("--")] == []


def test_grace_period_is_longer_than_a_shutdown_takes() -> None:
    """A Pod is not killed while Triton still waits for answers that it has begun."""
    before = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    needed = before + int(SETTINGS["EXIT_TIMEOUT_SECONDS"]) + UNLOADING_SECONDS
    assert POD["terminationGracePeriodSeconds"] >= needed


def test_update_keeps_every_pod_until_its_successor_is_ready() -> None:
    """A rollout turns no request away, and an eviction takes one Pod of at least two."""
    assert DEPLOYMENT["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert READ["poddisruptionbudget.yaml"]["spec"]["maxUnavailable"] == 1
    assert READ["horizontalpodautoscaler.yaml"]["spec"]["minReplicas"] >= 2


def test_autoscaler_reads_the_metric_that_the_adapter_makes() -> None:
    """Its target is the Deployment, whose replicas nobody else sets; its metric is of series that text models give."""
    spec = READ["horizontalpodautoscaler.yaml"]["spec"]
    assert (spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"]) == (
        "Deployment",
        DEPLOYMENT["metadata"]["name"],
    )
    assert "replicas" not in DEPLOYMENT["spec"]
    (rule,) = READ["prometheus-adapter.yaml"]["rules"]["custom"]
    given = {sample.name for family in Metrics("model").registry.collect() for sample in family.samples}
    series = set(re.findall(r"fptq_\w+", rule["seriesQuery"] + rule["metricsQuery"]))
    assert series
    assert series <= given
    assert [metric["pods"]["metric"]["name"] for metric in spec["metrics"]] == [rule["name"]["as"]]
