"""launch/gpu, launch/gke and eval_all.sh against stand-ins, and every script of launch/ under shellcheck."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ["gpu/local.sh", "gpu/slurm.sbatch", "gpu/sweep.sbatch", "gke/submit.sh", "eval_all.sh"]
RUN = ["--config=configs/tiny.py", "--workdir=/share/a b", "--", "--config.seed=3", "it's"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Keeps what it was started with, then ends as FAIL says: "2" = process 2 fails, the others wait to be ended.
PYTHON = """#!/bin/bash
"$REAL_PYTHON" -I -c 'import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}))' "$@" >>"$TRACE"
if [ -n "$FAIL" ]; then
  [ "$JAX_PROCESS_ID$NGRPO_TEST" = "$FAIL" ] && exit 7
  [ -z "$JAX_PROCESS_ID" ] || exec sleep 60
fi
if [[ $2 == ngrpo_jax.evaluate && $3 != --from ]]; then
  mkdir -p "${5#*=}" && echo "${6#*data.eval=}" >"${5#*=}/generations_5.jsonl"
fi
echo "output of process $JAX_PROCESS_ID$SLURM_PROCID"
"""
# srun as SLURM has it, for two tasks on this machine.
SRUN = """#!/bin/bash
output=
while [[ $1 == --* ]]; do [[ $1 != --output=* ]] || output=${1#*=}; shift; done
for task in 0 1; do
  file=${output//%j/$SLURM_JOB_ID}
  SLURM_PROCID=$task SLURM_NTASKS=2 "$@" >"${file//%t/$task}" 2>&1 || exit
done
"""


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A folder of stand-ins on PATH, and what was started."""

    def __init__(self, folder):
        self.folder, self.trace = folder, folder / "trace.jsonl"
        (folder / "bin").mkdir()
        write_program(folder / "bin" / "trainer", PYTHON)
        self.settings = {
            "NGRPO_PYTHON": str(folder / "bin" / "trainer"),
            "TRACE": str(self.trace),
            "FAIL": "",
        }

    def run(self, script, *words, cwd=None, **settings):
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.folder), "REAL_PYTHON": sys.executable, **self.settings}
        return subprocess.run(
            ["bash", str(LAUNCH / script), *words],
            env=environment | settings,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
        )

    @property
    def started(self):
        return [json.loads(line) for line in self.trace.read_text().split("\n") if line]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def _linter(name):
    """The program beside this interpreter or on PATH."""
    beside = pathlib.Path(sys.executable).parent / name
    program = str(beside) if beside.exists() else shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    return program


def test_shellcheck_finds_nothing():
    program = _linter("shellcheck")
    scripts = [path for pattern in ("*.sh", "*.sbatch") for path in LAUNCH.rglob(pattern)]
    assert len(scripts) >= 15
    sourced = [*LAUNCH.rglob("*.env"), LAUNCH / "env.example"]
    for words in (["-x", *scripts, ROOT / ".ci" / "run"], ["-s", "bash", *sourced]):
        result = subprocess.run([program, *map(str, words)], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_missing_names(machine, script):
    result = machine.run(script, "--help")
    assert result.returncode == 0 and "--dry-run" in result.stdout
    result = machine.run(script)
    assert result.returncode == 2 and result.stderr.startswith("error: ")
    assert machine.run(script, "--nonsense").returncode == 2


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_dry_run_shows_the_training_and_starts_none(machine, script):
    result = machine.run(script, "--dry-run", *RUN)
    assert result.returncode == 0, result.stderr
    assert r"--workdir=/share/a\ b" in result.stderr and r"it\'s" in result.stderr
    assert not machine.trace.exists()


def test_a_flag_of_the_train_command_is_told_where_to_stand(machine):
    result = machine.run("gpu/local.sh", "--preflight")
    assert result.returncode == 2 and "error: unknown argument --preflight" in result.stderr
    assert 'flags of the command that it starts follow "--"' in result.stderr
    assert "--preflight" in machine.run("gpu/local.sh", "--help").stdout


def test_local_starts_one_process_with_flags_set(machine):
    assert machine.run("gpu/local.sh", *RUN).returncode == 0
    (started,) = machine.started
    assert started["arguments"] == ["-m", "ngrpo_jax.train", *RUN[:2], *RUN[3:]]
    environment = started["environment"]
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"
    assert "latency_hiding" in environment["XLA_FLAGS"]
    assert "JAX_PROCESS_ID" not in environment


def test_local_shares_the_gpus_among_processes(machine, tmp_path):
    words = ["--config=configs/tiny.py", f"--workdir={tmp_path}/run", "--processes=2"]
    result = machine.run("gpu/local.sh", *words, CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert result.returncode == 0, result.stderr
    shares = {
        started["environment"]["JAX_PROCESS_ID"]: started["environment"]["JAX_LOCAL_DEVICE_IDS"]
        for started in machine.started
    }
    assert shares == {"0": "0,1", "1": "2,3"}
    assert "output of process 1" in (tmp_path / "run" / "logs" / "process-1.log").read_text()
    uneven = machine.run("gpu/local.sh", *words, CUDA_VISIBLE_DEVICES="4,5,6")
    assert uneven.returncode == 2 and "evenly" in uneven.stderr


def test_local_counts_no_gpu_where_all_are_left_out(machine, tmp_path):
    write_program(machine.folder / "bin" / "nvidia-smi", "#!/bin/bash\necho GPU 0; echo GPU 1; echo GPU 2\n")
    words = ["--config=c.py", f"--workdir={tmp_path}/run", "--processes=2", "--dry-run"]
    assert machine.run("gpu/local.sh", *words).returncode == 2
    without = machine.run("gpu/local.sh", *words, CUDA_VISIBLE_DEVICES="")
    assert without.returncode == 0 and "JAX_LOCAL_DEVICE_IDS" not in without.stderr


def test_local_ends_all_processes_when_one_fails(machine, tmp_path):
    words = ["--config=configs/tiny.py", f"--workdir={tmp_path}/run", "--processes=3"]
    result = machine.run(
        "gpu/local.sh", *words, FAIL="2", CUDA_VISIBLE_DEVICES="0,1,2", NGRPO_END_SECONDS="1"
    )
    assert result.returncode == 7
    assert "error: process 2 ended with status 7" in result.stderr


def test_slurm_starts_a_process_for_each_task(machine, tmp_path):
    write_program(machine.folder / "bin" / "srun", SRUN)
    clone = tmp_path / "clone"
    shutil.copytree(LAUNCH, clone / "launch")
    # SLURM runs a copy of the script from elsewhere.
    spool = tmp_path / "spool"
    shutil.copy(LAUNCH / "gpu" / "slurm.sbatch", spool)
    job = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(clone), "SLURM_GPUS_ON_NODE": "4"}
    result = machine.run(spool, *RUN, **job, SLURM_CPUS_PER_TASK="12")
    assert result.returncode == 0, result.stderr
    assert [started["arguments"] for started in machine.started] == [
        ["-m", "ngrpo_jax.train", *RUN[:2], *RUN[3:]]
    ] * 2
    assert {started["environment"]["JAX_LOCAL_DEVICE_IDS"] for started in machine.started} == {"0,1,2,3"}
    assert {started["environment"]["SRUN_CPUS_PER_TASK"] for started in machine.started} == {"12"}
    assert (clone / "runs" / "slurm" / "17-1.log").read_text() == "output of process 1\n"
    assert machine.run("gpu/slurm.sbatch", *RUN).returncode == 2


def test_a_sweep_is_an_array_of_tasks(machine):
    words = ["--config=c.py", "--workdir=/share/x", "--set", "seed=0,1", "--set=mixing.rate=0,0.1"]
    result = machine.run("gpu/sweep.sbatch", "--dry-run", *words, "--", "--config.train.steps=4")
    assert result.returncode == 0, result.stderr
    assert "ngrpo_jax.sweep --config=c.py --workdir=/share/x --set" in result.stderr
    assert result.stderr.rstrip().endswith("--task=0 --config.train.steps=4")
    for wrong in (["--dry-run", *words[:2]], words):  # nothing to sweep; no task of an array
        assert machine.run("gpu/sweep.sbatch", *wrong).returncode == 2


def test_slurm_refuses_a_workdir_that_each_node_would_read_differently(machine):
    result = machine.run("gpu/slurm.sbatch", "--dry-run", "--config=c.py", "--workdir=runs/x")
    assert result.returncode == 2 and "runs/x" in result.stderr


def test_eval_all_keeps_each_apart_goes_on_after_a_failure_and_reports_it(machine, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("aime24", "gpqa_diamond"):
        (data / f"{name}.jsonl").touch()
    words = ["--config=configs/tiny.py", f"--workdir={tmp_path}/run", f"--out={out}", f"--data={data}"]
    result = machine.run("eval_all.sh", *words, "--", "--config.eval.samples=2")
    assert result.returncode == 0, result.stderr
    first, second, table = (started["arguments"] for started in machine.started)
    assert first[1:3] == ["ngrpo_jax.evaluate", "--config=configs/tiny.py"]
    assert f"--config.data.eval=jsonl:{data}/aime24.jsonl" in first and "--config.data.prompt=math" in first
    assert "--config.reward.kind=choice" in second and second[-1] == "--config.eval.samples=2"
    assert table == ["-m", "ngrpo_jax.evaluate", "--from", f"{out}/aime24", f"{out}/gpqa_diamond"]
    assert (out / "aime24.log").read_text().startswith("output")
    assert (out / "aime24" / "generations_5.jsonl").read_text() == f"jsonl:{data}/aime24.jsonl\n"
    failing = machine.run(
        "eval_all.sh", *words, "--benchmark=a=tfds:a", "--choice=b=tfds:b", NGRPO_TEST="x", FAIL="x"
    )
    assert failing.returncode == 1 and "failed: a b" in failing.stderr
    assert len(machine.started) == 5


def test_gke_manifest_is_filled_in_whole(machine):
    yaml = pytest.importorskip("yaml")
    words = ["--job=first", "--image=repo/image:1", "--type=v6e", "--topology=4x4", "--hosts=4", "--chips=4"]
    words += ["--bucket=b", "--service-account=ksa", "--config=configs/tiny.py", "--dry-run"]
    odd = '/bucket/it\'s "odd" & $x \\ more'
    result = machine.run("gke/submit.sh", *words, f"--workdir={odd}", "--", "--config.seed=3")
    assert result.returncode == 0, result.stderr
    assert "${" not in result.stdout
    job = yaml.safe_load(result.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    train = pod["containers"][0]
    assert job["completions"] == job["parallelism"] == 4
    assert train["args"] == [
        "ngrpo_jax.train",
        "--config=configs/tiny.py",
        f"--workdir={odd}",
        "--config.seed=3",
    ]
    assert train["resources"]["limits"]["google.com/tpu"] == 4
    assert {"name": "LIBTPU_INIT_ARGS", "value": "--xla_tpu_scoped_vmem_limit_kib=98304"} in train["env"]
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
    spot = machine.run("gke/submit.sh", *words, f"--workdir={odd}", "--spot")
    selector = yaml.safe_load(spot.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"][
        "spec"
    ]
    assert selector["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    outside = machine.run("gke/submit.sh", *words, "--workdir=/elsewhere")
    assert outside.returncode == 2 and "/elsewhere" in outside.stderr


def test_hadolint_finds_nothing():
    words = [_linter("hadolint"), "--failure-threshold", "style", str(LAUNCH / "gke" / "Dockerfile")]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_container_copies_what_exists():
    text = (LAUNCH / "gke" / "Dockerfile").read_text()
    copied = [word for line in text.split("\n") if line.startswith("COPY") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "ngrpo_jax", "configs"} <= set(copied)
    allowed = (LAUNCH / "gke" / "Dockerfile.dockerignore").read_text().split("\n")
    for name in copied:
        assert f"!{name}" in allowed
    assert os.access(LAUNCH / "gpu" / "local.sh", os.X_OK)
