"""The tables of accelerators are those of docs/targets.json, by the sums that docs/launch.md gives."""

import dataclasses

import pytest

from benchmarks import shapes, targets
from docs import launch_tables
from ngrpo_jax.preflight import memory

ROW = {
    "compiled": True,
    "phase": "update",
    "total_gib": 8.0,
    "device_gib": 15.75,
    "collective_gb": 2.0,
    "milliseconds": 400.0,
    "problem": None,
}


def _row(program, **changes):
    return ROW | {"program": program} | changes


def _run(target="v5e:2x4", fsdp=8, **changes):
    rows = [
        _row("accumulate"),
        _row("score float32", total_gib=4.0),
        _row("training decode_chunk", phase="rollout", total_gib=9.0, milliseconds=640.0, collective_gb=0.0),
    ]
    return targets.Run("ngrpo_1_5b", target, (1, fsdp, 1), 8.0, [row | changes for row in rows])


@pytest.mark.parametrize("name", launch_tables.TABLES)
def test_the_documents_tables_are_up_to_date(name):
    document = (launch_tables.FOLDER / name).read_text(encoding="utf-8")
    assert launch_tables.rewritten(name, document) == document, "run python -m docs.launch_tables"


def test_a_document_without_its_marks_is_refused():
    with pytest.raises(ValueError, match=r"launch.md has lost the marks of its table of memory"):
        launch_tables.rewritten("launch.md", "no marks")


def test_a_run_comes_back_from_its_file_as_it_was(tmp_path):
    run, none = _run(), targets.Run("ngrpo_7b", "v5e:2x4", (1, 2, 4), 24.25, [])
    targets.save(tmp_path / "runs.json", [run, none])
    assert targets.load(tmp_path / "runs.json") == [run, none]
    assert targets.load(tmp_path / "missing.json") == []


def test_the_chosen_mesh_fits_and_splits_products_no_more_than_it_must():
    for target in targets.TARGETS:
        for name in ("ngrpo_1_5b", "ngrpo_7b"):
            settings = targets.settings_of(name)
            model = targets.model_of(settings)
            room = targets.CHIPS[targets.KINDS[target.partition(":")[0]]].memory_gib
            grid, needed = targets.choose(settings, model, target)
            assert grid.fsdp * grid.tensor == targets.devices_of(target)
            if grid.tensor > 1:
                less = dataclasses.replace(grid, fsdp=targets.devices_of(target), tensor=1)
                parts = memory.training_estimate(dataclasses.replace(settings, mesh=less), model)
                assert memory.peak(parts)[0] / targets.GIB > min(room, needed)


OUTSIDE = {("ngrpo_qwen3_1_7b", "h100:8", "table")}  # 0.74: XLA keeps two more copies of that embedding


@pytest.mark.parametrize("run", launch_tables.runs(), ids=lambda run: f"{run.config} {run.target}")
def test_the_estimate_of_memory_is_within_12_percent_of_what_the_compilers_say(run):
    estimates = run.estimates()
    for phase in targets.PHASES:
        row = run.largest(phase)
        if row is not None and (run.config, run.target, phase) not in OUTSIDE:
            assert estimates[phase] == pytest.approx(row["total_gib"], rel=0.12), phase


def test_what_a_phase_holds_is_its_largest_program():
    run = _run()
    assert run.largest("update")["program"] == "accumulate" and run.largest("table") is None
    (cells,) = targets.fitting_table([run])[1]
    assert cells[2:] == ("8 × 1", "8.0 (1.11)", "9.0 (1.26)", "–", 15.75, "compiles and fits")
    assert "8 × 1: update 8.0, rollout 9.0: **9.0**" in launch_tables.memory_table([run])


def test_a_run_that_cannot_be_says_why():
    none = targets.Run("ngrpo_7b", "v5e:2x4", (1, 2, 4), 24.25, [])
    assert targets.verdict(none) == "has not the memory: at least 24.2 GiB a device by estimate"
    assert not launch_tables.fits(none) and "no; at best 2 × 4" in launch_tables.memory_table([none])
    failed = _run(problem="needs 20.0 GiB; lower rollout.slots")
    assert targets.verdict(failed).startswith("accumulate: needs 20.0 GiB; lower rollout.slots; score")
    assert not launch_tables.fits(failed) and "| no; 8 × 1" in launch_tables.memory_table([failed])


def test_products_at_the_peak_are_those_of_the_paper_config_by_hand():
    layers, head = 1_310_195_712, 151936 * 1536
    products, kernels = targets.products_ms(_run(), _row("accumulate"))
    assert products == pytest.approx(1e3 * 2 * 12288 * (4 * layers + 3 * head) / 197e12)
    pairs = 12288 * 12288 / 2
    assert kernels == pytest.approx(1e3 * 4.5 * 28 * 4 * 1536 * pairs / 197e12)
    assert targets.products_ms(_run(), _row("training decode_chunk")) is None


def test_seconds_of_a_step_by_hand():
    run = _run()
    settings = targets.settings_of("ngrpo_1_5b")
    model = targets.model_of(settings)
    cache = 8 * shapes.cache_bytes(model) * 2150 / (0.75 * 819e9)
    assert launch_tables.decode_seconds(run, settings, model) == pytest.approx(0.64 / 32 + cache)
    kernels = sum(targets.products_ms(run, _row(name))[1] for name in ("accumulate", "score"))
    microbatches = 256 * 4150 / (8 * 12288 * 0.92)
    seconds = microbatches * ((800 + 4150 / 12288 * kernels) / 1e3 + 2 * 2e9 / 200e9)
    assert launch_tables.update_seconds(run, settings, model) == pytest.approx(seconds)
    whole = launch_tables.cost(run)
    assert whole.run > 625 * (whole.rollout + whole.update)


def test_gpus_whose_compiler_tells_no_time_are_told_by_bytes_and_operations():
    run = _run("h100:8", milliseconds=None)
    settings = targets.settings_of("ngrpo_1_5b")
    model = targets.model_of(settings)
    read = 2 * shapes.weights_read(model) + 8 * shapes.cache_bytes(model) * 2150
    assert launch_tables.decode_seconds(run, settings, model) == pytest.approx(read / (0.5 * 3350e9))
    faster = _run("h100:8", milliseconds=None, collective_gb=0.0)
    linked = 256 * 4150 / (8 * 12288 * 0.92) * 2 * 2e9 / 900e9
    difference = launch_tables.update_seconds(run, settings, model) - launch_tables.update_seconds(
        faster, settings, model
    )
    assert difference == pytest.approx(linked)
    assert "| 8 × H100 | 1.5B |" in launch_tables.cost_table([run])
