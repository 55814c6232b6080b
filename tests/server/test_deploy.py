"""What `deploy/` says is what the command takes and the repository has."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from typer.main import get_command

from surgeon.cli.app import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OPTIONS = {name for option in get_command(app).commands["serve"].params for name in option.opts}  # type: ignore[attr-defined]


def test_the_image_starts_a_command_that_there_is() -> None:
    text = (DEPLOY / "compose" / "Dockerfile").read_text()
    assert set(re.findall(r"--[a-z-]+(?=\")", text)) <= OPTIONS
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()]
    assert copied
    assert all((ROOT / name).exists() for name in copied)


def test_compose_names_the_image_and_waits_for_the_end() -> None:
    service = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]["surgeon"]
    assert (ROOT / service["build"]["dockerfile"]).exists()
    assert int(service["stop_grace_period"].removesuffix("s")) > 30


def test_kubernetes_gives_what_the_pods_use() -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "surgeon.yaml").read_text()))
    kinds = {(doc["kind"], doc["metadata"]["name"]) for doc in documents}
    pod = next(doc for doc in documents if doc["kind"] == "Deployment")["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert {word for word in container["args"] if word.startswith("--")} <= OPTIONS
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in kinds
        if "secret" in volume:
            assert ("Secret", volume["secret"]["secretName"]) in kinds
    service = next(doc for doc in documents if doc["kind"] == "Service")
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    paths = {container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")}
    assert paths == {"/v2/health/ready", "/v2/health/live"}
    assert pod["spec"]["terminationGracePeriodSeconds"] > 35
