"""launch/tpu against a stand-in gcloud: order of calls, flags, quoting."""

import os
import pathlib
import re
import shutil

import pytest

pytest_plugins = ["launch_cloud"]

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "launch" / "tpu").glob("*.sh") if path.name != "tpu.sh")
COMMON = ["create.sh", "setup.sh", "run.sh", "logs.sh", "status.sh", "stop.sh", "delete.sh", "babysit.sh"]

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("git") is None, reason="needs bash and git"
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_how_and_calls_nothing(cloud, script):
    result = cloud.run(script, "--help")
    assert result.returncode == 0
    assert script in result.stdout and "--dry-run" in result.stdout
    assert not cloud.calls


@pytest.mark.parametrize("script", COMMON)
@pytest.mark.parametrize("queued", ["true", "false"])
def test_dry_run_shows_calls_and_makes_none(cloud, script, queued):
    result = cloud.run(script, "--dry-run", NGRPO_QUEUED=queued)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^\+ gcloud ", result.stderr, re.M)
    assert not cloud.calls


@pytest.mark.parametrize(
    ("tpu_type", "image"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_create_on_demand(cloud, tpu_type, image):
    assert cloud.run("create.sh", "--type", tpu_type).returncode == 0
    flags = [f"--accelerator-type={tpu_type}", f"--version={image}", "--zone=zone-b"]
    assert cloud.calls == [["--quiet", "compute", "tpus", "tpu-vm", "create", "tpu one", *flags]]


def test_create_queued_spot_waits_until_ready(cloud):
    queue = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    cloud.world([{"queue": queue, "states": ["ABSENT", "CREATING", "READY"]}])
    result = cloud.run(
        "create.sh", "--queued", "--spot", "--wait", "--project=lab", "--gcloud-flag=--network=own net"
    )
    assert result.returncode == 0, result.stderr
    first = cloud.calls[0]
    assert first[3:6] == ["queued-resources", "create", "tpu one"]
    wanted = {"--node-id=tpu one", "--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--project=lab"}
    assert wanted | {"--network=own net", "--accelerator-type=v5litepod-16"} <= set(first)
    # Two looks at the queue alone, then three at the node as well.
    assert cloud.verbs == ["create"] + ["describe"] * 8


def test_create_gives_up_waiting_for_a_refused_request(cloud):
    cloud.world([{"queue": ["CREATING", "FAILED"]}])
    result = cloud.run("create.sh", "--queued", "--wait")
    assert result.returncode == 1
    assert "refused" in result.stderr


def test_whole_life_of_a_training(cloud, clone):
    """Every script in turn, over two workers; the commit, the flags and the state come through."""
    options = ["--cache=/share/compiled", "--env=LIBTPU_INIT_ARGS=--own=1"]
    for script in ("create.sh", "setup.sh", "run.sh"):
        result = cloud.run(script, *(options if script == "run.sh" else []))
        assert result.returncode == 0, result.stderr
    assert cloud.verbs == [*cloud.bring_up]
    assert "--worker=all" in cloud.calls[1] and "--worker=all" in cloud.calls[4]
    sha = cloud.git("rev-parse", "HEAD")
    for worker in ("worker0", "worker1"):
        assert (cloud.folder / "life0" / worker / "ngrpo" / "COMMIT").read_text() == sha + "\n"
    running = cloud.run("status.sh").stdout
    assert "is ready" in running and "/share/run is running" in running
    assert "worker1 running step 1" in running
    assert "step 1 of the training" in cloud.run("logs.sh", "--worker=1").stdout

    assert cloud.run("stop.sh").returncode == 0
    assert "/share/run is stopped" in cloud.run("status.sh").stdout
    assert cloud.run("delete.sh", "--yes").returncode == 0
    assert "is absent" in cloud.run("status.sh").stdout
    assert cloud.changes == [*cloud.bring_up, "log", "stop", "delete"]

    assert sorted(training["worker"] for training in cloud.trainings) == ["worker0", "worker1"]
    for training in cloud.trainings:
        assert training["arguments"] == [
            "-m", "ngrpo_jax.train", "--config=configs/tiny.py", "--workdir=/share/run"
        ]  # fmt: skip
        environment = training["environment"]
        assert environment["JAX_PLATFORMS"] == "tpu,cpu"
        assert environment["PYTHONUNBUFFERED"] == "1"
        assert environment["JAX_COMPILATION_CACHE_DIR"] == "/share/compiled"
        assert environment["LIBTPU_INIT_ARGS"].endswith("fuse_all_reduce=true --own=1")


def test_odd_names_reach_the_training_as_they_are(cloud):
    workdir = '/share/it\'s "odd" $HOME `x` & more'
    override = "--config.data.train=jsonl:/d/a b;'c'\\n*.jsonl"
    cloud.settings |= {"NGRPO_TPU_NAME": 'it\'s "one"; $x', "NGRPO_WORKDIR": workdir}
    for script, words in (
        ("create.sh", []),
        ("setup.sh", []),
        ("run.sh", ["--env", "COLOUR=deep 'blue'", "--", override, ""]),
    ):
        result = cloud.run(script, *words)
        assert result.returncode == 0, result.stderr
    assert all(
        'it\'s "one"; $x' in word for call in cloud.calls for word in call[5:6] if "tar.gz" not in word
    )
    assert "is running" in cloud.run("status.sh").stdout
    for training in cloud.trainings:
        assert training["arguments"][3:] == [f"--workdir={workdir}", override, ""]
        assert training["environment"]["COLOUR"] == "deep 'blue'"


def test_delete_wants_yes(cloud):
    result = cloud.run("delete.sh")
    assert result.returncode == 2 and "--yes" in result.stderr
    assert not cloud.calls
    assert cloud.run("delete.sh", "--queued", "--yes").returncode == 0
    assert cloud.calls[0][3:6] == ["queued-resources", "delete", "tpu one"] and "--force" in cloud.calls[0]


def test_a_worker_refuses_another_commit_and_a_second_training(cloud, clone):
    for script in ("create.sh", "setup.sh", "run.sh"):
        assert cloud.run(script).returncode == 0
    again = cloud.run("run.sh")
    assert again.returncode != 0 and "runs /share/run already" in again.stderr
    assert cloud.run("run.sh", "--restart").returncode == 0
    cloud.git("commit", "--allow-empty", "-qm", "second")
    try:
        late = cloud.run("run.sh", "--restart")
    finally:
        cloud.git("reset", "-q", "--hard", "HEAD~1")
    assert late.returncode != 0 and "run setup.sh first" in late.stderr


def test_setup_leaves_the_code_of_a_running_training_alone(cloud, clone):
    for script in ("create.sh", "setup.sh", "run.sh", "setup.sh"):
        assert cloud.run(script).returncode == 0
    sha = cloud.git("rev-parse", "HEAD")
    cloud.git("commit", "--allow-empty", "-qm", "second")
    try:
        early = cloud.run("setup.sh")
        assert early.returncode != 0 and "runs /share/run" in early.stderr
        assert (cloud.folder / "life0" / "worker0" / "ngrpo" / "COMMIT").read_text() == sha + "\n"
        assert cloud.run("stop.sh").returncode == 0 and cloud.run("setup.sh").returncode == 0
        second = cloud.git("rev-parse", "HEAD")
    finally:
        cloud.git("reset", "-q", "--hard", "HEAD~1")
    assert (cloud.folder / "life0" / "worker1" / "ngrpo" / "COMMIT").read_text() == second + "\n"


def test_run_mounts_the_bucket_again(cloud):
    words = ["--bucket=own bucket", "--mount=/mnt/own"]
    shown = cloud.run("run.sh", "--dry-run", *words).stderr
    assert "--bucket" in shown and "own" in shown and "/mnt/own" in shown


def test_a_connection_to_a_machine_that_is_gone_ends(cloud):
    shown = cloud.run("setup.sh", "--dry-run").stderr
    assert shown.count("ServerAliveInterval=15") == 3 and "--scp-flag=" in shown and "--ssh-flag=" in shown


def test_setup_refuses_uncommitted_changes(cloud, clone):
    requirements = clone / "requirements.txt"
    before = requirements.read_text()
    requirements.write_text(before + "# changed\n")
    try:
        result = cloud.run("setup.sh")
    finally:
        requirements.write_text(before)
    assert result.returncode == 2 and "uncommitted" in result.stderr
    assert not cloud.calls


@pytest.mark.parametrize(
    ("script", "words", "culprit"),
    [
        ("create.sh", ["--type", "v3-8"], "v3-8"),
        ("babysit.sh", ["--type", "v5e-8"], "write v5litepod-8"),
        ("create.sh", ["--nmae=x"], "--nmae"),
        ("create.sh", ["--zone"], "--zone"),
        ("create.sh", ["--name=-x"], "-x"),
        ("run.sh", ["--workdir=runs/x"], "runs/x"),
        ("run.sh", ["--workdir=gs://bucket/x"], "mount the bucket"),
        ("run.sh", ["--commit=nowhere"], "nowhere"),
        ("run.sh", ["--env=COLOUR"], "COLOUR"),
        ("run.sh", ["--ssh=smoke"], "smoke"),
        ("logs.sh", ["--lines=many"], "many"),
        ("babysit.sh", ["--max-restarts=x"], "--max-restarts"),
    ],
)
def test_bad_input_is_one_sentence(cloud, script, words, culprit):
    result = cloud.run(script, *words)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert culprit in result.stderr
    assert not cloud.calls


@pytest.mark.parametrize("script", COMMON)
def test_missing_names_are_asked_for(cloud, script):
    result = cloud.run(script, NGRPO_ZONE="")
    assert result.returncode == 2 and "NGRPO_ZONE" in result.stderr
    assert not cloud.calls


def test_tunnel_uses_the_alpha_track(cloud):
    result = cloud.run("stop.sh", "--ssh=iap", "--dry-run")
    assert (
        "gcloud --quiet alpha compute tpus tpu-vm ssh" in result.stderr
        and "--tunnel-through-iap" in result.stderr
    )
    assert "--internal-ip" in cloud.run("stop.sh", "--ssh=internal", "--dry-run").stderr


def test_env_example_names_every_setting():
    text = "\n".join(path.read_text() for path in (ROOT / "launch").rglob("*.s*") if path.is_file())
    used = set(re.findall(r"\bNGRPO_[A-Z_]+\b", text))
    tuned = {"NGRPO_POLL_SECONDS", "NGRPO_CRASH_GRACE_SECONDS", "NGRPO_END_SECONDS", "NGRPO_BOOT_FILE"}
    manifest = set(
        re.findall(r"\$\{(NGRPO_[A-Z_]+)\}", (ROOT / "launch" / "gke" / "jobset.yaml").read_text())
    )
    named = set(re.findall(r"\bNGRPO_[A-Z_]+\b", (ROOT / "launch" / "env.example").read_text()))
    assert used - tuned - manifest <= named
    assert named <= used
    assert os.access(ROOT / "launch" / "tpu" / "create.sh", os.X_OK)
