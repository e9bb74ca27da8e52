"""Compiles some programs of a run for a target on several meshes; run by tests.

    python tests/target_programs.py TARGET SETTINGS_JSON PROGRAM,PROGRAM MESH ...

Prints JSON: mesh ("1.8.1": data, fsdp, tensor) -> program -> what preflight/forecast.py says of it.
"""

import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from configs import base
from ngrpo_jax.preflight import forecast, targets
from ngrpo_jax.runtime import mesh
from ngrpo_jax.settings import resolve


def main(target, given, names, *grids):
    config = base.get_config()
    for name, value in json.loads(given).items():
        section, leaf = name.split(".")
        config[section][leaf] = value
    found = {}
    for grid in grids:
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = sizes = tuple(map(int, grid.split(".")))
        settings, devices = resolve(config), mesh.make_mesh(*sizes, targets.devices(target))
        model, info = forecast.read_model(settings)
        work = forecast.work(settings, model, devices, info)
        rows = forecast.compiled({name: work[name] for name in names.split(",")})
        found[grid] = {row.program: dataclasses.asdict(row) for row in rows}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
