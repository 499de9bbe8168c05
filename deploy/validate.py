"""Checks rendered manifests against the Kubernetes schemas, each other, and the server they run.

Invariant: what is checked elsewhere (a schema) is not repeated here; what no schema can know (that a grace
period outlasts a drain, that a variable exists) is. A check that cannot be made is said to be skipped.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

DEPLOY = Path(__file__).resolve().parent
METRICS = DEPLOY.parent / "server" / "src" / "metrics.rs"
PROBES = {"startupProbe": "/startupz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
# What the server itself takes after the drain: ending the streams that are left, and flushing.
GOODBYES_S = 20
# kubernetes-validate has the core schemas only. Of this custom resource the fields in use are checked by
# name, as its v1 definition spells them; an unknown field is an error, so add it here when you use it.
POD_MONITOR_SPEC = {"jobLabel", "selector", "podMetricsEndpoints"}
POD_METRICS_ENDPOINT = {"port", "path", "interval"}

Manifest = dict[str, Any]


def schema_errors(manifest: Manifest) -> Iterator[str]:
    """Say where a manifest breaks the schema of its kind."""
    if manifest["kind"] == "PodMonitor":
        spec = manifest["spec"]
        unknown = set(spec) - POD_MONITOR_SPEC
        for endpoint in spec["podMetricsEndpoints"]:
            unknown |= set(endpoint) - POD_METRICS_ENDPOINT
        if manifest["apiVersion"] != "monitoring.coreos.com/v1" or unknown:
            yield f"PodMonitor: unknown version or fields {sorted(unknown)}"
        return
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{manifest['kind']}: {error}"


def the(manifests: list[Manifest], kind: str) -> Manifest:
    """Give the one manifest of a kind."""
    found = [manifest for manifest in manifests if manifest["kind"] == kind]
    if len(found) != 1:
        sys.exit(f"error: one {kind} is wanted, {len(found)} are there")
    return found[0]


def reference_errors(manifests: list[Manifest]) -> Iterator[str]:
    """Say where manifests that name each other disagree."""
    deployment = the(manifests, "Deployment")["spec"]
    pod = deployment["template"]["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    selectors = {
        "Deployment": deployment["selector"]["matchLabels"],
        "Service": the(manifests, "Service")["spec"]["selector"],
        "PodDisruptionBudget": the(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        "NetworkPolicy": the(manifests, "NetworkPolicy")["spec"]["podSelector"].get("matchLabels"),
        "PodMonitor": the(manifests, "PodMonitor")["spec"]["selector"]["matchLabels"],
    }
    for kind, selector in selectors.items():
        if not selector or not selector.items() <= labels:
            yield f"{kind}: its selector {selector} does not match the pod's labels"
    ports = {port["name"] for container in pod["containers"] for port in container["ports"]}
    used = {port["targetPort"] for port in the(manifests, "Service")["spec"]["ports"]}
    used |= {endpoint["port"] for endpoint in the(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"]}
    for rule in the(manifests, "NetworkPolicy")["spec"]["ingress"]:
        used |= {port["port"] for port in rule["ports"]}
    for container in pod["containers"]:
        used |= {container[probe]["httpGet"]["port"] for probe in PROBES}
    if used - ports:
        yield f"ports {sorted(used - ports)} are not the container's {sorted(ports)}"
    if pod["serviceAccountName"] != the(manifests, "ServiceAccount")["metadata"]["name"]:
        yield "the pod's service account is not there"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    if mounts != set(volumes):
        yield f"mounts {sorted(mounts)} and volumes {sorted(volumes)} differ"
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in volumes.values()
        if "persistentVolumeClaim" in volume
    }
    if claims != {the(manifests, "PersistentVolumeClaim")["metadata"]["name"]}:
        yield f"claims {sorted(claims)} are not the one that is there"


def behaviour_errors(manifests: list[Manifest]) -> Iterator[str]:
    """Say where a pod would lose streams, or have more rights than it needs."""
    pod = the(manifests, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    pre_stop_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_timeout_s = float(env["GLMSERVE_DRAIN_TIMEOUT"])
    grace_s = pod["terminationGracePeriodSeconds"]
    if not grace_s > pre_stop_s + drain_timeout_s + GOODBYES_S:
        yield (
            f"a grace of {grace_s} s is not more than preStop {pre_stop_s} s + drain {drain_timeout_s:g} s"
            f" + goodbyes {GOODBYES_S} s"
        )
    for probe, path in PROBES.items():
        if container[probe]["httpGet"]["path"] != path:
            yield f"{probe} asks {container[probe]['httpGet']['path']}, not {path}"
    if the(manifests, "Deployment")["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] != 0:
        yield "a rollout takes a pod away before its successor is ready"
    model = env["GLMSERVE_MODEL"]
    if not any(model.startswith(mount["mountPath"] + "/") for mount in container["volumeMounts"]):
        yield f"GLMSERVE_MODEL {model} is on no volume"
    rights = {
        "enableServiceLinks": (pod.get("enableServiceLinks"), False),
        "automountServiceAccountToken": (pod.get("automountServiceAccountToken"), False),
        "runAsNonRoot": (pod["securityContext"].get("runAsNonRoot"), True),
        "seccompProfile": (pod["securityContext"].get("seccompProfile"), {"type": "RuntimeDefault"}),
        "capabilities": (container["securityContext"].get("capabilities"), {"drop": ["ALL"]}),
        "allowPrivilegeEscalation": (container["securityContext"].get("allowPrivilegeEscalation"), False),
    }
    for name, (value, wanted) in rights.items():
        if value != wanted:
            yield f"{name} is {value}, not {wanted}"


def unknown_variables(text: str, serve_help: str) -> Iterator[str]:
    """Say which variables the server does not read."""
    for name in sorted(set(re.findall(r"GLMSERVE_[A-Z_]+", text))):
        if not re.search(rf"\b{name}\b", serve_help):
            yield f"the server knows no variable {name}"


def unknown_metrics(rules: str, metrics: str) -> Iterator[str]:
    """Say which metrics of the alert rules the server does not export."""
    for name in sorted(set(re.findall(r"glmserve_[a-z_]+", rules))):
        if f'"{re.sub("_(bucket|sum|count)$", "", name)}"' not in metrics:
            yield f"rules.yaml: the server exports no {name}"


def absent_members(workspace: str, ignored: str) -> Iterator[str]:
    """Say which crates of the workspace a builder would not get: without one of them cargo builds nothing."""
    kept = [line[1:].strip("/") for line in ignored.splitlines() if line.startswith("!")]
    for member in tomllib.loads(workspace)["workspace"]["members"]:
        files = (member, f"{member}/Cargo.toml")
        if not any(file == path or file.startswith(f"{path}/") for path in kept for file in files):
            yield f".dockerignore: the workspace's {member} is not let through"


def main() -> int:
    """Check every file and report all errors at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rendered", type=Path, nargs="+", help="a rendered overlay")
    parser.add_argument("--glmserve", type=Path, required=True, help="the server's binary")
    args = parser.parse_args()
    errors = []
    num_manifests = 0
    texts = [(DEPLOY / "Dockerfile").read_text()]
    for path in args.rendered:
        texts.append(path.read_text())
        manifests = list(yaml.safe_load_all(texts[-1]))
        num_manifests += len(manifests)
        try:
            found = [error for manifest in manifests for error in schema_errors(manifest)]
            found = found or [*reference_errors(manifests), *behaviour_errors(manifests)]
        except KeyError as missing:
            found = [f"a manifest lacks {missing}"]
        errors += [f"{path.stem}: {error}" for error in found]
    if args.glmserve.is_file():
        command = [args.glmserve, "serve", "--help"]
        serve_help = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        errors += unknown_variables("\n".join(texts), serve_help)
    else:
        print(f"skipped: the variables, for there is no {args.glmserve}")
    if METRICS.is_file():
        errors += unknown_metrics((DEPLOY / "monitoring" / "rules.yaml").read_text(), METRICS.read_text())
    else:
        print("skipped: the names of the metrics, for there is no server/src/metrics.rs")
    files = (DEPLOY.parent / name for name in ("Cargo.toml", ".dockerignore"))
    errors += absent_members(*(file.read_text() for file in files))
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    print(f"{num_manifests} manifests in {len(args.rendered)} overlays, {len(errors)} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
