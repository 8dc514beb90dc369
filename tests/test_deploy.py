"""What stands in deploy/, as far as it can be tried without such a cluster."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from test_end_to_end import SPACE, wait_for_events

from tuning.record.journal import FINAL
from tuning.record.tables import read_table

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
FILES = ["Containerfile", "cluster.yaml", "rayjob.yaml", "slurm.sh"]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.parametrize("name", FILES)
def test_each_file_begins_with_how_to_start_and_follow_it(name):
    head = (DEPLOY / name).read_text().partition("\n\n")[0]
    assert re.search(r"^# (Start|Build): ", head, re.MULTILINE) and re.search(r"^# Follow: ", head, re.MULTILINE)
    assert f"`{name}`" in (DEPLOY / "README.md").read_text()


def test_the_cluster_file_is_what_ray_up_takes():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    started = [command for key in ("head", "worker") for command in cluster[f"{key}_start_ray_commands"]]
    assert not any("0.0.0.0" in command for command in started)


# Of KubeRay's ray.io/v1, as its Go types and the custom resource's schema have them; more are none of ours.
RAY_JOB = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"}
RAY_CLUSTER = {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
HEAD_GROUP = {"rayStartParams", "template"}
WORKER_GROUP = HEAD_GROUP | {"groupName", "replicas", "minReplicas", "maxReplicas"}
CONTAINER = {"name", "image", "env", "resources", "volumeMounts"}


def test_the_ray_job_has_no_field_that_kuberay_lacks():
    job = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    assert job.keys() == {"apiVersion", "kind", "metadata", "spec"}
    cluster = job["spec"]["rayClusterSpec"]
    workers = cluster["workerGroupSpecs"]
    assert job["spec"].keys() <= RAY_JOB and cluster.keys() <= RAY_CLUSTER
    assert cluster["headGroupSpec"].keys() <= HEAD_GROUP
    assert all(group.keys() <= WORKER_GROUP for group in workers)
    for group in (cluster["headGroupSpec"], *workers):
        pod = group["template"]["spec"]
        assert pod.keys() <= {"containers", "volumes"}
        assert all(container.keys() <= CONTAINER for container in pod["containers"])


def test_the_ray_job_has_what_kuberay_requires():
    job = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and job["metadata"]["name"]
    spec = job["spec"]["rayClusterSpec"]
    assert "tuning/run_search.py" in job["spec"]["entrypoint"]
    assert f"=={spec['rayVersion']}'" in (DEPLOY / "Containerfile").read_text()
    assert f"=={spec['rayVersion']}'" in (DEPLOY / "cluster.yaml").read_text()
    for group in spec["workerGroupSpecs"]:
        assert group["groupName"] and group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] and container["image"] and container["resources"]["limits"]
        assert all(isinstance(each["value"], str) for each in container["env"])
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("begun", [False, True])
def test_the_ray_job_resumes_its_run_if_it_is_started_again(tmp_path, begun):
    """With a stand-in for Python, which shows its arguments, and another folder."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    if begun:
        (tmp_path / "results" / "xray").mkdir(parents=True)
        (tmp_path / "results" / "xray" / "plan.yaml").touch()
    entrypoint = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())["spec"]["entrypoint"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = shlex.split(entrypoint.replace("/shared", str(tmp_path)))
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    rest = "--resume" if begun else f"--data {tmp_path}/chest_xrays"
    assert shown == f"/opt/finetune-search/tuning/run_search.py --storage {tmp_path}/results --name xray {rest}\n"


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck():
    for script in [*DEPLOY.glob("*.sh"), *DEPLOY.parent.glob("findings/*.sh"), *DEPLOY.parent.glob("benchmarks/*.sh")]:
        found = subprocess.run([SHELLCHECK, str(script)], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


# Stand-ins for Slurm's commands on one machine; `hostname` keeps Ray on the loopback.
STAND_INS = {
    # As since Slurm 22.05: a step has one core unless it asks for more.
    "srun": """cores=1
while [[ $1 == --* ]]; do
    [[ $1 != --cpus-per-task=* ]] || cores=${1#*=}
    shift
done
exec taskset --cpu-list "0-$((cores - 1))" "$@\"""",
    "scontrol": "echo localhost",
    "nvidia-cuda-mps-control": """echo "$@" > "$CUDA_MPS_PIPE_DIRECTORY/started"; exec sleep 1000""",
    "hostname": "echo 127.0.0.1",
}


def job_of_its_own():
    """The number of a job whose ports nothing on this machine has taken."""
    while True:
        job = random.randrange(6000)
        with suppress(OSError), ExitStack() as stack:
            for port in range(20000 + 2 * job, 20002 + 2 * job):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return job


@pytest.fixture
def slurm(tmp_path):
    """A function that starts slurm.sh as Slurm would, in a process group of its own."""
    for name, body in STAND_INS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    started = []

    def start(*arguments, restarts=0, mps=""):
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
        environment |= {
            "SLURM_JOB_ID": str(job_of_its_own()),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_CPUS_PER_TASK": str(min(len(os.sched_getaffinity(0)), 2)),
            "SLURM_RESTART_COUNT": str(restarts),
            "MPS": mps,
        }
        environment |= {"RAY_TMPDIR": ray_folder, "TMPDIR": str(tmp_path)}
        with open(tmp_path / "log.txt", "w") as log:
            command = ["bash", str(DEPLOY / "slurm.sh"), *map(str, arguments)]
            options = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": log, "start_new_session": True}
            started.append(subprocess.Popen(command, **options))
        return started[-1]

    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as ray_folder:  # short: it holds sockets
        yield start
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def is_raylet_of(folder, session):
    """Whether a folder of /proc is that of a raylet in a session."""
    with suppress(OSError):
        return (
            os.getsid(int(folder.name)) == session and b"/raylet" in (folder / "cmdline").read_bytes().split(b"\0")[0]
        )


@pytest.mark.slow
def test_a_slurm_job_that_is_ended_goes_on_in_another(slurm, tmp_path, folder):
    longer = {"trials": 2, "epochs": 60, "finalists": 0}  # the first trial is no loser, and runs for some seconds
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE | {"search": SPACE["search"] | longer}))
    run = tmp_path / "results" / "job"
    name = ["--storage", tmp_path / "results", "--name", "job"]
    arguments = ["--space", tmp_path / "space.yaml", "--data", folder, "--concurrent", 1, *name]
    process = slurm(*arguments, mps="1")
    assert wait_for_events(run / "journal.jsonl", 8, process), (tmp_path / "log.txt").read_text()
    (raylet,) = [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if is_raylet_of(folder, process.pid)]
    assert [each.read_text() for each in tmp_path.glob("mps-*/started")] == ["-f\n"]
    assert len(os.sched_getaffinity(raylet)) == min(len(os.sched_getaffinity(0)), 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 130, (tmp_path / "log.txt").read_text()
    assert "interrupted" in set(read_table(run / "trials.parquet")["status"])
    assert slurm(*arguments, restarts=1).wait() == 0, (tmp_path / "log.txt").read_text()  # requeued
    assert read_table(run / "trials.parquet")["status"].isin(FINAL).all()
    with pytest.raises(ProcessLookupError):  # Ray has ended with the job
        os.killpg(process.pid, 0)
