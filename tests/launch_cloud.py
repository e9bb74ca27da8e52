"""A clone with the launch scripts and a cloud to run them against, for the tests of launch/tpu."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def git(clone, *words):
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(
        ["git", *identity, "-C", str(clone), *words], check=True, capture_output=True, text=True
    )


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """A committed clone with the launch scripts: what is sent does not depend on this working tree."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "launch", clone / "launch")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    git(clone, "init", "-q")
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "first")
    return clone


class Cloud:
    """The scripts, and the world that the stand-in gcloud plays to them."""

    bring_up = ("create", "scp", "unpack", "setup", "start")  # what it takes from nothing to a training

    def __init__(self, clone, folder):
        self.clone, self.folder = clone, folder
        (folder / "bin").mkdir()
        gcloud = folder / "bin" / "gcloud"
        standin = pathlib.Path(__file__).parent / "gcloud_standin.py"
        gcloud.write_text(f'#!/bin/bash\nexec "{sys.executable}" -I -S "{standin}" "$@"\n')
        gcloud.chmod(0o755)
        self.world(lives=[{"states": ["READY"], "training": None}])
        self.settings = {
            "NGRPO_TPU_NAME": "tpu one",
            "NGRPO_ZONE": "zone-b",
            "NGRPO_TPU_TYPE": "v5litepod-16",
            "NGRPO_CONFIG": "configs/tiny.py",
            "NGRPO_WORKDIR": "/share/run",
            "NGRPO_POLL_SECONDS": "0.05",
            "NGRPO_CRASH_GRACE_SECONDS": "0.05",
        }

    def world(self, lives, workers=2, refusals=0):
        # Before the first creation comes a life in which nothing exists.
        world = {"lives": lives, "workers": workers, "refusals": refusals, "life": -1, "exists": False}
        (self.folder / "world.json").write_text(json.dumps(world))

    def git(self, *words):
        return git(self.clone, *words).stdout.strip()

    def run(self, script, *words, **settings):
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        environment = {"PATH": path, "STANDIN": str(self.folder), "HOME": str(self.folder)}
        command = ["bash", str(self.clone / "launch" / "tpu" / script), *words]
        return subprocess.run(
            command,
            env=environment | self.settings | settings,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )

    def lines(self, name):
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().split("\n") if line] if path.exists() else []

    @property
    def calls(self):
        return self.lines("calls.jsonl")

    @property
    def verbs(self):
        """What was asked of gcloud, in order; of the calls to the workers, what on_worker.sh was told."""
        verbs = []
        for call in self.calls:
            words = [word for word in call if not word.startswith("--")]
            verb = words[words.index("tpus") + 2]
            if verb == "ssh":
                command = next(word for word in call if word.startswith("--command="))
                told = re.search(r"on_worker\.sh (\w+)", command)
                verb = "unpack" if told is None or "tar.gz" in command else told.group(1)
            verbs.append(verb)
        return verbs

    @property
    def changes(self):
        """The verbs without the looks."""
        return [verb for verb in self.verbs if verb not in ("describe", "status")]

    @property
    def trainings(self):
        return self.lines("trainings.jsonl")

    def end(self):
        for flag in self.folder.glob("life*/worker*/goes_on"):
            flag.unlink()


@pytest.fixture
def cloud(clone, tmp_path):
    cloud = Cloud(clone, tmp_path)
    yield cloud
    cloud.end()
