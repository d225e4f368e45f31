"""The cluster configurations we ship are valid, and a misspelt key in one would be noticed here.

local and aws-spot go through Ray's own loader and schema; what that schema leaves open is checked against the code that
reads it (provider keys) and EC2's own model (node_config). kuberay goes through a schema written by hand, because the
custom resource's definition is on the network only; the fields inside pod templates beyond containers are not checked.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import ray.autoscaler
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
Config = dict[str, Any]


def load(name: str) -> Config:
    config: Config = yaml.safe_load((ROOT / "cluster_configs" / f"{name}.yaml").read_text())
    return config


def check_with_ray(config: Config) -> None:
    """Raises when Ray's schema or loader refuses the configuration, or nothing in Ray reads a key of its provider."""
    validate_config(config)
    validate_config(prepare_config(copy.deepcopy(config)))
    unknown = sorted(set(config["provider"]) - {"type"} - provider_keys())
    if unknown:
        raise ValueError(f"no provider of Ray's reads {unknown}")


def provider_keys() -> set[str]:
    """Every quoted word in the autoscaler's sources that handle providers."""
    package = Path(ray.autoscaler.__file__).parent / "_private"
    sources = [*package.glob("*.py"), *package.glob("aws/*.py"), *package.glob("fake_multi_node/*.py")]
    return {word for source in sources for word in re.findall(r"[\"'](\w+)[\"']", source.read_text())}


def check_with_ec2(config: Config) -> None:
    """Raises when a node_config is not a request EC2 would parse (besides the two fields Ray fills in)."""
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in config["available_node_types"].values():
        request = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        unknown = set(request) - set(shape.members)
        report = ParamValidator().validate(request, shape)
        if unknown or report.has_errors():
            raise ValueError(f"EC2 would refuse {sorted(unknown)} {report.generate_report()}")


def check_kuberay(config: Config) -> None:
    """Raises when the RayCluster breaks the schema or a rule of the operator's that a schema can't say."""
    schema = json.loads((Path(__file__).parent / "raycluster_schema.json").read_text())
    jsonschema.validate(config, schema)
    groups = config["spec"]["workerGroupSpecs"]
    if len({group["groupName"] for group in groups}) < len(groups):
        raise ValueError("two worker groups have one name")
    for group in groups:
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            raise ValueError(f"{group['groupName']}: replicas lie outside of minReplicas and maxReplicas")


CHECKS: dict[str, list[Callable[[Config], None]]] = {
    "local": [check_with_ray],
    "aws-spot": [check_with_ray, check_with_ec2],
    "kuberay": [check_kuberay],
}


def check(name: str, config: Config) -> None:
    for each in CHECKS[name]:
        each(config)


@pytest.mark.parametrize("name", CHECKS)
def test_each_configuration_is_valid(name: str) -> None:
    check(name, load(name))


def misspellings(name: str) -> Iterator[tuple[str, ...]]:
    """Paths to keys of which each level of each file is represented by all it has."""
    config = load(name)
    if name == "kuberay":
        yield from (("spec", key) for key in config["spec"])
        yield from (("spec", "autoscalerOptions", key) for key in config["spec"]["autoscalerOptions"])
        yield from (("spec", "authOptions", key) for key in config["spec"]["authOptions"])
        yield from (("spec", "headGroupSpec", key) for key in config["spec"]["headGroupSpec"])
        yield from (("spec", "workerGroupSpecs", "0", key) for key in config["spec"]["workerGroupSpecs"][0])
        return
    yield from ((key,) for key in config)
    yield from (("provider", key) for key in config["provider"])
    for kind, settings in config["available_node_types"].items():
        yield from (("available_node_types", kind, key) for key in settings)
        yield from (("available_node_types", kind, "node_config", key) for key in settings["node_config"])


@pytest.mark.parametrize(("name", "path"), [(name, path) for name in CHECKS for path in misspellings(name)])
def test_a_misspelt_key_is_refused(name: str, path: tuple[str, ...]) -> None:
    config = load(name)
    place: Any = config
    for step in path[:-1]:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[path[-1] + "x"] = place.pop(path[-1])
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError, TypeError)):
        check(name, config)


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_aws_starts_ray_only_with_a_token(kind: str) -> None:
    start = " ".join(load("aws-spot")[f"{kind}_start_ray_commands"][1].split())
    guard, _, rest = start.partition("ulimit")
    assert "test -s ~/.ray/auth_token" in guard
    assert "exit 1" in guard
    assert rest.index("RAY_AUTH_MODE=token") < rest.index("ray start")


def test_aws_falls_back_from_spot_to_the_same_machine_on_demand() -> None:
    kinds = load("aws-spot")["available_node_types"]
    spot, on_demand = kinds["spot"], kinds["on_demand"]
    assert spot["node_config"].pop("InstanceMarketOptions")["MarketType"] == "spot"
    assert spot["node_config"] == on_demand["node_config"]
    assert spot["priority"] > on_demand["priority"]


def test_kuberay_turns_token_authentication_and_the_autoscaler_on() -> None:
    spec = load("kuberay")["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["rayVersion"] == ray.__version__


def test_kuberay_stages_checkpoints_in_more_shared_memory_than_a_pod_has_by_default() -> None:
    for group in load("kuberay")["spec"]["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        volumes = {volume["name"]: volume["emptyDir"]["medium"] for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]] == "Memory"
