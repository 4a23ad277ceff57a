"""The files in examples/ that nothing here can run: they are YAML, hang together, and hold a right configuration."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from flowprefill_sglang.cli.main import COMMANDS
from flowprefill_sglang.cluster.configuration_file import read_configuration

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
KUBERAY = EXAMPLES / "kuberay"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_the_configuration_passes_its_check() -> None:
    one = read_configuration(KUBERAY / "cluster.yaml")
    assert (one.launcher, one.ray_address, one.host, one.model_path) == (
        *("ray", "auto", "0.0.0.0"),
        Path("/models/Llama-3-8B"),
    )


def test_kustomize_finds_every_file() -> None:
    kustomization = load(KUBERAY / "kustomization.yaml")
    (generated,) = kustomization["configMapGenerator"]
    named = {*kustomization["resources"], *generated["files"], "kustomization.yaml"}
    assert named == {path.name for path in KUBERAY.iterdir()}


def test_the_job_reads_the_file_that_it_mounts() -> None:
    job, kustomization = load(KUBERAY / "rayjob.yaml"), load(KUBERAY / "kustomization.yaml")
    program, command, flag, file = shlex.split(job["spec"]["entrypoint"])
    assert (program, flag) == ("flowprefill", "--config")
    assert command in COMMANDS
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    (generated,) = kustomization["configMapGenerator"]
    assert volumes[mounts[str(Path(file).parent)]]["configMap"]["name"] == generated["name"]
    assert Path(file).name in generated["files"]


def test_there_is_a_pod_with_a_gpu_for_each_server_and_the_model_in_it() -> None:
    one = read_configuration(KUBERAY / "cluster.yaml")
    (group,) = load(KUBERAY / "rayjob.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == one.prefill + one.decode
    container = group["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "/models" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_service_leads_to_the_router() -> None:
    one, service = read_configuration(KUBERAY / "cluster.yaml"), load(KUBERAY / "service.yaml")
    head = load(KUBERAY / "rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    ports = {port["name"]: port["containerPort"] for port in head["spec"]["containers"][0]["ports"]}
    (port,) = service["spec"]["ports"]
    assert ports[port["targetPort"]] == port["port"] == one.port
    assert service["metadata"]["annotations"]["prometheus.io/port"] == str(one.port)
    assert service["spec"]["selector"].items() <= head["metadata"]["labels"].items()


def test_prometheus_has_a_job_for_each_role() -> None:
    jobs = {job["job_name"]: job for job in load(EXAMPLES / "prometheus.yml")["scrape_configs"]}
    assert set(jobs) == {"flowprefill-router", "flowprefill-prefill", "flowprefill-decode"}
    for job in jobs.values():
        assert "metrics_path" not in job, "Prometheus's own default, /metrics, is right"
        (static,) = job["static_configs"]
        assert all(":" in target for target in static["targets"])
