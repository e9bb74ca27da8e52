"""The tables of docs/launch.md are those of the estimate, and follow the sums that the document gives."""

import pytest

from docs import launch_tables
from ngrpo_jax.model.decoder import parameter_count
from ngrpo_jax.preflight import memory


def test_the_documents_tables_are_up_to_date():
    document = launch_tables.DOCUMENT.read_text(encoding="utf-8")
    assert launch_tables.rewritten(document) == document, "run python -m docs.launch_tables"


@pytest.mark.parametrize(("name", "where"), [("1.5B", "v4-8"), ("7B", "8 × H100")])
def test_what_is_always_held_is_fourteen_bytes_a_parameter(name, where):
    config, model = launch_tables.MODELS[name]
    (place,) = (each for each in launch_tables.SLICES if each.name == where)
    choice, fits = launch_tables.best(config, model, place)
    assert fits
    held = 14 * parameter_count(model) / place.devices
    assert memory.held(choice.allocations, "always") == pytest.approx(held, rel=1e-3)


def test_a_mesh_that_fits_leaves_room_and_splits_no_more_than_it_must():
    for where in launch_tables.SLICES:
        for config, model in launch_tables.MODELS.values():
            room = launch_tables.FULL * where.memory * launch_tables.GIB
            every = list(launch_tables.choices(config, model, where.devices))
            choice, fits = launch_tables.best(config, model, where)
            assert fits == any(other.peak <= room for other in every)
            assert not fits or choice.peak <= room
            tensor = choice.settings.mesh.tensor
            assert not fits or all(
                other.peak > room for other in every if other.settings.mesh.tensor < tensor
            )
            grids = [other.settings.mesh for other in every]
            assert {grid.fsdp * grid.tensor for grid in grids} == {where.devices}


def test_twice_the_devices_shorten_an_update_by_half():
    config, model = launch_tables.MODELS["1.5B"]
    small, large = (each for each in launch_tables.SLICES if each.kind == "TPU v5e")
    seconds = [
        launch_tables.hours(launch_tables.best(config, model, each)[0].settings, model, each)[1]
        for each in (small, large)
    ]
    assert seconds[0] == pytest.approx(2 * seconds[1])


def test_a_document_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="has lost the marks of its table of memory"):
        launch_tables.rewritten("no marks")
