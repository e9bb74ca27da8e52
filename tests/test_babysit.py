"""launch/tpu/babysit.sh against a stand-in gcloud: what it brings back, leaves alone and gives up."""

import shutil

import pytest

pytest_plugins = ["launch_cloud"]

pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("git") is None, reason="needs bash and git"
)


def test_babysit_recovers_from_two_preemptions(cloud):
    preempted = {"states": ["READY", "READY", "PREEMPTED"], "training": None}
    cloud.world(
        [
            preempted,
            {**preempted, "states": ["CREATING", "READY", "TERMINATED"]},
            {"states": ["READY"], "training": 0},
        ]
    )
    result = cloud.run("babysit.sh", "--create", "--spot", "--delete-when-done", "--", "--config.seed=3")
    assert result.returncode == 0, result.stderr
    assert cloud.changes == [*cloud.bring_up, "delete", *cloud.bring_up, "delete", *cloud.bring_up, "delete"]
    assert {tuple(training["arguments"]) for training in cloud.trainings} == {
        ("-m", "ngrpo_jax.train", "--config=configs/tiny.py", "--workdir=/share/run", "--config.seed=3")
    }
    creations = [call for call in cloud.calls if "create" in call]
    assert len(creations) == 3 and all("--spot" in call for call in creations)


def test_babysit_recovers_a_suspended_queued_resource(cloud):
    cloud.world(
        [
            {
                "queue": ["PROVISIONING", "ACTIVE", "SUSPENDED\tSERVICE"],
                "states": ["READY"],
                "training": None,
            },
            {"queue": ["ACTIVE"], "states": ["READY"], "training": 0},
        ]
    )
    result = cloud.run("babysit.sh", "--create", "--queued", "--spot")
    assert result.returncode == 0, result.stderr
    assert cloud.changes == [*cloud.bring_up, "delete", *cloud.bring_up]


def test_babysit_stops_on_a_crash(cloud):
    cloud.world([{"states": ["READY"], "training": 1}])
    result = cloud.run("babysit.sh", "--create")
    assert result.returncode == 1
    assert cloud.changes == [*cloud.bring_up, "log"]
    assert "crashed" in result.stderr and "exit status 1" in result.stderr
    assert "step 1 of the training" in result.stderr


@pytest.mark.parametrize("before", ["a crash", "stop.sh"])
def test_babysit_starts_what_ended_before_it_came_with_its_own_commit(cloud, before):
    cloud.world([{"states": ["READY"], "training": 1 if before == "a crash" else None}])
    if before == "a crash":
        assert cloud.run("babysit.sh", "--create").returncode == 1
    else:
        for script in ("create.sh", "setup.sh", "run.sh", "stop.sh"):
            assert cloud.run(script).returncode == 0
    done = len(cloud.changes)
    cloud.end()
    for home in cloud.folder.glob("life0/worker*"):
        (home / "ends_with").write_text("0\n")
    cloud.git("commit", "--allow-empty", "-qm", "mended")
    mended = cloud.git("rev-parse", "HEAD")
    try:
        result = cloud.run("babysit.sh")
    finally:
        cloud.git("reset", "-q", "--hard", "HEAD~1")
    assert result.returncode == 0, result.stderr
    assert cloud.changes[done:] == ["scp", "unpack", "setup", "start"]
    assert (cloud.folder / "life0" / "worker1" / "ngrpo" / "COMMIT").read_text() == mended + "\n"


def test_babysit_tells_a_preemption_from_the_crash_it_causes(cloud):
    """The processes fail while the node is still called READY; only the second look sees the preemption."""
    cloud.world(
        [
            {"states": ["READY", "READY", "PREEMPTED"], "training": 134},
            {"states": ["READY"], "training": 0},
        ]
    )
    result = cloud.run("babysit.sh", "--create")
    assert result.returncode == 0, result.stderr
    assert "no crash" in result.stderr
    assert cloud.changes == [*cloud.bring_up, "delete", *cloud.bring_up]


def test_babysit_starts_again_after_a_restart_of_a_machine(cloud):
    cloud.world([{"states": ["READY"], "training": None, "reboot_at": 3}])
    result = cloud.run("babysit.sh", "--create")
    assert result.returncode == 0, result.stderr
    assert cloud.changes == [*cloud.bring_up, "start"]


def test_babysit_bounds_its_restarts(cloud):
    cloud.world([{"states": ["READY", "PREEMPTED"], "training": None} for _ in range(5)])
    result = cloud.run("babysit.sh", "--create", "--max-restarts=2")
    assert result.returncode == 1 and "--max-restarts" in result.stderr
    assert cloud.changes.count("create") == 3


def test_babysit_waits_for_capacity_within_bounds(cloud):
    cloud.world([{"states": ["READY"], "training": 0}], refusals=3)
    assert cloud.run("babysit.sh", "--create").returncode == 0
    assert cloud.changes.count("create") == 4
    cloud.world([{"states": ["READY"], "training": 0}], refusals=9)
    result = cloud.run("babysit.sh", "--create", "--max-errors=2", NGRPO_TPU_NAME="another")
    assert result.returncode == 1 and "failure 2 in a row" in result.stderr


def test_babysit_survives_a_service_that_does_not_answer(cloud):
    cloud.world([{"states": ["READY", "ERROR", "ERROR", "READY"], "training": 0}])
    assert cloud.run("create.sh").returncode == 0
    result = cloud.run("babysit.sh")
    assert result.returncode == 0, result.stderr
    assert cloud.changes == [*cloud.bring_up]


@pytest.mark.parametrize(
    ("life", "words", "reason"),
    [
        ({"states": ["READY", "STOPPED"], "training": None}, [], "stopped or withdrew"),
        ({"states": ["READY", "ABSENT"], "training": None}, [], "does not exist"),
        (
            {"queue": ["ACTIVE", "SUSPENDED\tUSER"], "states": ["READY"], "training": None},
            ["--queued"],
            "withdrew",
        ),
        ({"queue": ["CREATING", "FAILED"]}, ["--queued"], "refused"),
    ],
)
def test_babysit_leaves_alone_what_somebody_else_ended(cloud, life, words, reason):
    cloud.world([life, {"states": ["READY"], "training": 0}])
    result = cloud.run("babysit.sh", "--create", *words)
    assert result.returncode == 1 and reason in result.stderr
    assert cloud.changes.count("create") == 1 and "delete" not in cloud.changes


def test_babysit_creates_nothing_unasked(cloud):
    result = cloud.run("babysit.sh")
    assert result.returncode == 1 and "--create" in result.stderr
    assert cloud.verbs == ["describe"]
