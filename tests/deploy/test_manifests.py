"""What deploy/ says fits together, and fits what docs/operations.md says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # comes with moto

from ckptd.config import daemon_config
from ckptd.trainer.preempting import Sources
from ckptd.wire.address import MAX_PATH_BYTES
from examples.preemptible import RUN_AGAIN

PROJECT = Path(__file__).parents[2]
DEPLOY = PROJECT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
UNIT = DEPLOY / "systemd/ckptd.service"
SCRIPT = (DEPLOY / "slurm/train.sbatch").read_text()


def objects(path: Path) -> dict[str, Any]:
    return {found["kind"]: found for found in yaml.safe_load_all(path.read_text())}


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["template"]["spec"]


def containers(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = pod(manifest)
    return {each["name"]: each for each in [*spec.get("initContainers", []), *spec["containers"]]}


def env(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container.get("env", [])}


def pair(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the containers of the trainer and of its daemon."""
    found = objects(path)
    owner = found.get("DaemonSet", found["Job"])
    return containers(found["Job"])["trainer"], containers(owner)["daemon"]


def drain_s(variables: dict[str, str]) -> float:
    return daemon_config(variables, socket="/s", is_on_demand=False).drain_s


def unit() -> dict[str, list[str]]:
    """Return the settings of all sections; one may be given several times."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("path", sorted(p for p in DEPLOY.rglob("*") if p.is_file()), ids=lambda p: p.name)  # fmt: skip
def test_every_variable_named_there_is_documented(path):
    documented = (PROJECT / "docs/operations.md").read_text().split("## Environment\n")[1]
    named = set(re.findall(r"\bCKPTD_[A-Z_]+\b", path.read_text()))
    assert [name for name in sorted(named) if f"| `{name}` |" not in documented] == []


# --- Kubernetes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda p: p.name)
def test_trainer_and_daemon_share_one_socket_a_root_and_a_user(path):
    trainer, daemon = pair(path)
    socket = env(trainer)["CKPTD_SOCKET"]
    assert socket == env(daemon)["CKPTD_SOCKET"]
    assert len(socket) <= MAX_PATH_BYTES
    mounts = [{m["name"]: m["mountPath"] for m in each["volumeMounts"]} for each in (trainer, daemon)]  # fmt: skip
    assert mounts[0] == mounts[1]
    assert socket.startswith(mounts[0]["sockets"] + "/")
    assert trainer["command"][-1].startswith(mounts[0]["checkpoints"] + "/")
    found = objects(path)
    owners = [found["Job"], found.get("DaemonSet", found["Job"])]
    assert len({pod(each)["securityContext"]["runAsUser"] for each in owners}) == 1
    for name in ("sockets", "checkpoints"):
        sources = [{**v, "hostPath": v.get("hostPath", {}).get("path")}
                   for each in owners for v in pod(each)["volumes"] if v["name"] == name]  # fmt: skip
        assert sources[0] == sources[1]


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda p: p.name)
def test_the_grace_period_is_longer_than_trainer_and_daemon_may_take(path):
    found = objects(path)
    trainer, daemon = pair(path)
    grace_s = Sources.of((), env(trainer)).grace_s
    if "DaemonSet" in found:
        assert pod(found["Job"])["terminationGracePeriodSeconds"] > grace_s
        assert pod(found["DaemonSet"])["terminationGracePeriodSeconds"] > drain_s(env(daemon))
    else:  # a sidecar is told when the trainer has ended, and both have one period together
        both_s = grace_s + drain_s(env(daemon))
        assert pod(found["Job"])["terminationGracePeriodSeconds"] > both_s


def test_the_sidecar_outlives_the_trainer():
    """An init container that restarts always is ended after the containers proper."""
    _, daemon = pair(DEPLOY / "kubernetes/sidecar.yaml")
    assert daemon["restartPolicy"] == "Always"
    assert daemon in pod(objects(DEPLOY / "kubernetes/sidecar.yaml")["Job"])["initContainers"]


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda p: p.name)
def test_to_be_preempted_is_no_failure_of_the_job(path):
    job = objects(path)["Job"]
    assert pod(job)["restartPolicy"] == "Never"  # or there may be no policy
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in rules} == {"Ignore"}
    (codes,) = [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule]
    assert (codes["containerName"], codes["values"]) == ("trainer", [RUN_AGAIN])
    assert [{"type": "DisruptionTarget"}] in [rule.get("onPodConditions") for rule in rules]


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda p: p.name)
def test_the_pods_of_a_job_find_each_other(path):
    found = objects(path)
    job, service = found["Job"], found["Service"]
    variables = env(containers(job)["trainer"])
    name, subdomain = job["metadata"]["name"], pod(job)["subdomain"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{subdomain}"
    assert service["metadata"]["name"] == subdomain
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(variables["WORLD_SIZE"])
    assert {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"} <= set(variables)


def test_both_forms_are_the_same_job():
    jobs = [objects(path)["Job"] for path in KUBERNETES]
    for job in jobs:
        pod(job).pop("initContainers", None)
        pod(job).pop("terminationGracePeriodSeconds")
        pod(job)["volumes"] = [v for v in pod(job)["volumes"] if v["name"] != "sockets"]
    assert jobs[0] == jobs[1]


# --- systemd -------------------------------------------------------------------------------------


def test_the_unit_waits_longer_than_the_daemon_drains():
    given = dict(each.split("=", 1) for each in unit()["Environment"])
    assert float(unit()["TimeoutStopSec"][0]) > drain_s(given)
    assert given["CKPTD_SOCKET"].startswith(f"/run/{unit()['RuntimeDirectory'][0]}/")


def test_the_unit_lets_users_be_seen_and_keeps_memory_over_a_kill():
    """`PrivateUsers` makes each peer nobody, `PrivateTmp` hides sockets and roots below /tmp."""
    settings = unit()
    assert not settings.keys() & {"PrivateUsers", "PrivateTmp", "MemoryMax", "DynamicUser"}
    assert settings["Restart"] == ["always"]
    assert {"StartLimitIntervalSec", "StartLimitBurst"} <= settings.keys()
    assert int(settings["FileDescriptorStoreMax"][0]) > 0
    assert (settings["Type"], settings["NotifyAccess"]) == (["notify"], ["main"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    mine = tmp_path / UNIT.name
    program = unit()["ExecStart"][0].split()[0]
    mine.write_text(UNIT.read_text().replace(program, sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(mine)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


# --- Slurm ---------------------------------------------------------------------------------------


def test_the_warning_of_slurm_comes_before_trainers_and_daemons_are_out_of_time():
    lead = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", SCRIPT, re.MULTILINE)
    seconds = re.findall(r"^export CKPTD_(?:GRACE|DRAIN)_S=\"\$\{\w+:-(\d+)\}\"", SCRIPT, re.MULTILINE)  # fmt: skip
    assert len(seconds) == 2
    assert sum(map(float, seconds)) < float(lead[0])
    assert {"--requeue", "--open-mode=append"} <= set(re.findall(r"^#SBATCH (\S+)", SCRIPT, re.MULTILINE))  # fmt: skip


def test_everybody_knows_the_code_that_says_run_me_again():
    assert f"RUN_AGAIN={RUN_AGAIN} " in SCRIPT
    assert f"| {RUN_AGAIN} |" in (PROJECT / "docs/operations.md").read_text()
