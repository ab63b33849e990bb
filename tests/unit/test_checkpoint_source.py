"""What --model means, in which order, and how wrong ones are refused."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import duetjax
from duetjax.checkpoint.source import (
    SourceKind,
    check_context,
    preset_names,
    resolve_model,
)
from duetjax.config import (
    ConfigError,
    DuetJAXError,
    ModelConfig,
    ModelFolderError,
    RopeType,
    SamplingParams,
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": 3,
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def write_config(folder: Path, generation: object = None, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def refused(model: str | None, load_format: str = "dummy") -> str:
    with pytest.raises(DuetJAXError) as refusal:
        resolve_model(model, load_format=load_format)
    message = str(refusal.value)
    assert message.isprintable()
    assert len(message) < 700
    return message


def test_a_folder_is_named_after_its_last_part(tmp_path):
    write_config(tmp_path / "models" / "tiny")
    source = resolve_model("models/tiny/", load_format="dummy")
    assert source.kind is SourceKind.FOLDER
    assert (source.name, source.folder) == ("tiny", tmp_path / "models" / "tiny")
    assert source.config.vocab_size == 12
    assert source.description == f"model tiny: the folder {tmp_path}/models/tiny"


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_config(tmp_path / "tiny")
    assert resolve_model("~/tiny", load_format="dummy").folder == tmp_path / "tiny"


def test_a_folder_comes_before_a_preset_of_the_same_name(tmp_path):
    assert resolve_model("qwen3-0.6b", load_format="dummy").kind is SourceKind.PRESET
    write_config(tmp_path / "qwen3-0.6b")
    assert resolve_model("qwen3-0.6b", load_format="dummy").kind is SourceKind.FOLDER


def test_a_folder_comes_before_a_hub_id_of_the_same_name(tmp_path):
    write_config(tmp_path / "org" / "name")
    assert resolve_model("org/name", load_format="dummy").kind is SourceKind.FOLDER


@pytest.fixture
def forgotten_demo():
    """The demo package is imported anew in the test, and what the test imported is not kept."""
    kept = sys.modules.pop("duetjax.demo", None)
    yield
    sys.modules.pop("duetjax.demo", None)
    if kept is not None:
        sys.modules["duetjax.demo"] = kept


def test_no_model_is_the_bundled_demo(tmp_path, monkeypatch, forgotten_demo):
    write_config(tmp_path / "demo")
    monkeypatch.setattr(duetjax, "__path__", [str(tmp_path)])
    source = resolve_model(None, load_format="dummy")
    assert (source.kind, source.name) == (SourceKind.DEMO, "duetjax-demo")
    assert source.folder == tmp_path / "demo"
    assert "no --model was given" in source.description


def test_an_installation_without_the_demo_says_so(tmp_path, monkeypatch, forgotten_demo):
    monkeypatch.setitem(sys.modules, "duetjax.demo", None)
    assert "bundled demo model is missing" in refused(None)
    (tmp_path / "demo").mkdir()
    monkeypatch.delitem(sys.modules, "duetjax.demo")
    monkeypatch.setattr(duetjax, "__path__", [str(tmp_path)])
    assert "give --model" in refused(None)


def test_a_preset_has_a_config_but_no_folder():
    source = resolve_model("llama-3.2-1b", load_format="dummy")
    assert (source.name, source.folder) == ("llama-3.2-1b", None)
    assert source.generation.eos_token_ids == (128001,)
    assert source.description == "model llama-3.2-1b: a preset, as no folder has that name"


def test_a_preset_without_dummy_weights_names_where_the_real_ones_are():
    message = refused("llama-3.1-8b", "auto")
    assert "meta-llama/Llama-3.1-8B" in message
    assert "--load-format dummy" in message


# Parameter counts as the models' cards and safetensors files state them.
PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-14b": 14_768_307_200,
    "qwen3-8b": 8_190_735_360,
}


def parameters(config: ModelConfig) -> int:
    hidden, inner, D = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * D, config.num_kv_heads * D
    attention = hidden * (2 * q + 2 * kv) + config.qkv_bias * (q + 2 * kv)
    norms = 2 * hidden + config.qk_norm * 2 * D
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + hidden + config.num_layers * (attention + 3 * hidden * inner + norms)


def test_presets_have_exactly_the_published_number_of_parameters():
    found = {name: resolve_model(name, load_format="dummy").config for name in preset_names()}
    assert {name: parameters(config) for name, config in found.items()} == PARAMETERS


def test_presets_are_bfloat16_models_without_sliding_windows():
    for name in preset_names():
        config = resolve_model(name, load_format="dummy").config
        assert (config.dtype, config.sliding_window) == ("bfloat16", None)
        assert (config.rope.type is RopeType.LLAMA3) == name.startswith("llama-3")


@pytest.mark.parametrize("model", ["./qwen3-8b", "../org", "/org/name", "~/org/name", "~no/one"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(model):
    assert "no such folder" in refused(model)
    assert "correct it" in refused(model)


@pytest.mark.parametrize(
    "model",
    ["", " ", "gpt2", "a/b/c", "org/", "/", "a\0b", "org/na me", "org/n\nm", "é/x", "x" * 9999],
)
def test_what_cannot_be_a_hub_id_is_refused_with_the_three_things_tried(model):
    if model == "/":
        assert "config.json" in refused(model)
        return
    message = refused(model)
    assert "no such folder, not a preset (llama-3.1-70b, " in message
    assert "not a hub id of the form org/name" in message


def test_a_file_is_refused_with_the_advice_to_give_its_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "give the folder that holds it" in refused("model.safetensors")
    assert "give the folder that holds it" in refused("./model.safetensors")


def test_an_unknown_load_format_is_refused():
    assert refused("qwen3-8b", "gguf") == "--load-format gguf: choose auto or dummy"


def test_dummy_weights_need_no_weights_in_the_folder(tmp_path):
    write_config(tmp_path / "tiny")
    assert resolve_model("tiny", load_format="dummy").config.num_layers == 1
    assert "no weights" in refused("tiny", "auto")


BAD_CONFIGS = {
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, "supported are LlamaForCausalLM"),
    "no architecture": ({"architectures": "absent"}, "architectures None"),
    "odd architecture": ({"architectures": [["x"]]}, "architectures [['x']]"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "unquantised"),
    "vocabulary": ({"vocab_size": 10**12}, "vocab_size must be an integer from 1"),
    "layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers must be an integer from 1"),
    "missing size": ({"hidden_size": "absent"}, "hidden_size is missing"),
    "text for a size": ({"hidden_size": "x" * 10**6}, "hidden_size must be an integer"),
    "boolean size": ({"hidden_size": True}, "hidden_size must be an integer"),
    "activation": ({"hidden_act": "gelu\n"}, r"hidden_act 'gelu\n'"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    "legacy rope": ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
    "rope is text": ({"rope_scaling": "llama3"}, "rope_scaling must be an object"),
    "rope by layer": ({"rope_parameters": {"full_attention": {}}}, "per layer type"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "infinite theta": ({"rope_theta": math.inf}, "rope_theta must be a positive number"),
    "theta not a number": ({"rope_theta": math.nan}, "rope_theta must be a positive number"),
    "huge epsilon": ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
    "8-bit dtype": ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 2}, "not a multiple"),
    "odd head": ({"head_dim": 3}, "head_dim 3 is odd"),
    "stop id": ({"eos_token_id": [2**40]}, "eos_token_id"),
    "tie": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
}


@pytest.mark.parametrize("fault", BAD_CONFIGS)
def test_a_bad_config_is_refused_with_its_folder_and_key(tmp_path, fault):
    changes, expected = BAD_CONFIGS[fault]
    write_config(tmp_path / "bad", **changes)
    message = refused("bad")
    assert message.startswith(f"{tmp_path}/bad: config.json: ")
    assert expected in message


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b"9" * 9999,
    ],
    ids=["empty", "cut", "list", "null", "text", "binary", "deep", "deep-object", "long-number"],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path, file, text):
    write_config(tmp_path / "bad", generation={})
    (tmp_path / "bad" / file).write_bytes(text)
    message = refused("bad")
    assert message.startswith(f"{tmp_path}/bad/{file}: not a JSON object (")
    assert message.endswith("download the model again")


def test_a_config_of_a_gigabyte_is_refused_unread(tmp_path):
    write_config(tmp_path / "bad")
    os.truncate(tmp_path / "bad" / "config.json", 2**30)
    assert "1073741824 bytes" in refused("bad")


ROPE_KEYS = st.sampled_from(["rope_type", "type", "factor", "rope_theta", "low_freq_factor"])
SCALARS = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        3,
        2**70,
        10**400,
        0.5,
        math.inf,
        math.nan,
        "",
        "llama3",
        "a\nb",
        [[]],
        {},
    ]
)


@settings(deadline=None, max_examples=200)
@given(
    changes=st.dictionaries(
        st.sampled_from(
            [
                *CONFIG,
                "rope_scaling",
                "rope_parameters",
                "rope_theta",
                "head_dim",
                "dtype",
                "sliding_window",
                "use_sliding_window",
                "rms_norm_eps",
                "hidden_act",
            ]
        ),
        SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(ROPE_KEYS, SCALARS, max_size=2),
        max_size=3,
    ),
    family=st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3"]),
)
def test_any_config_is_either_parsed_or_refused_in_one_line(changes, family):
    hf = {"architectures": [f"{family}ForCausalLM"]} | {**CONFIG, **changes}
    try:
        outcome: object = ModelConfig.from_hf(hf)
    except ModelFolderError as refusal:
        outcome = str(refusal)
    if isinstance(outcome, ModelConfig):
        assert 0 < outcome.head_dim < 2**24
        assert outcome.sliding_window is None or outcome.sliding_window > 0
    else:
        assert str(outcome).isprintable()


def generation(tmp_path: Path, file: object, **changes: object):
    write_config(tmp_path / "tiny", file, **changes)
    return resolve_model("tiny", load_format="dummy").generation


def test_without_generation_config_only_the_stop_ids_are_known(tmp_path):
    defaults = generation(tmp_path, None)
    assert defaults.sampling == SamplingParams(max_tokens=None)
    assert (defaults.eos_token_ids, defaults.ignored) == ((3,), ())


def test_generation_config_sets_what_is_served(tmp_path):
    recommended = {
        "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1,
    }  # fmt: skip
    file = recommended | {"max_new_tokens": 2048, "novelty": [1]}
    defaults = generation(tmp_path, file)
    assert defaults.sampling == SamplingParams(**recommended, max_tokens=2048)
    assert defaults.ignored == ()


def test_sampling_parameters_count_even_where_do_sample_is_false(tmp_path):
    defaults = generation(tmp_path, {"do_sample": False, "temperature": 1, "top_k": 50})
    assert (defaults.sampling.temperature, defaults.sampling.top_k) == (1, 50)
    neutral = {"do_sample": False, "top_p": None}
    assert generation(tmp_path, neutral).sampling == SamplingParams(max_tokens=None)


def test_stop_ids_of_generation_config_replace_those_of_config(tmp_path):
    assert generation(tmp_path, {"eos_token_id": [5, 7, 5]}).eos_token_ids == (5, 7)
    assert generation(tmp_path, {"eos_token_id": 0}).eos_token_ids == (0,)
    assert generation(tmp_path, {"eos_token_id": None}).eos_token_ids == (3,)


def test_stop_ids_beyond_the_vocabulary_are_left_out(tmp_path):
    vocab_size = CONFIG["vocab_size"]
    file = {"eos_token_id": [vocab_size - 1, vocab_size]}
    assert generation(tmp_path, file).eos_token_ids == (vocab_size - 1,)


def test_sampling_keys_that_are_not_served_are_listed_unless_neutral(tmp_path):
    asked = {"typical_p": 1.0, "no_repeat_ngram_size": 3, "num_beams": 4}
    assert generation(tmp_path, asked).ignored == ("no_repeat_ngram_size", "num_beams")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", 10**400),
        ("temperature", True),
        ("top_p", 0),
        ("top_k", 2.5),
        ("min_p", -1),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", "\n" * 10**6),
        ("eos_token_id", -1),
        ("eos_token_id", "</s>"),
    ],
)
def test_a_bad_generation_config_is_refused_with_its_key(tmp_path, key, value):
    write_config(tmp_path / "bad", {key: value})
    assert f"bad/generation_config.json: {key} must be" in refused("bad")


def test_a_context_beyond_the_sliding_window_is_refused_naming_the_flag(tmp_path):
    write_config(tmp_path / "m", architectures=["MistralForCausalLM"], sliding_window=32)
    config = resolve_model("m", load_format="dummy").config
    check_context(config, 32)
    with pytest.raises(ConfigError, match=r"window of 32 .* use --max-model-len 32 or less"):
        check_context(config, 33)


def test_a_context_beyond_the_trained_positions_is_refused_naming_the_flag(tmp_path):
    config = resolve_model(str(write_config(tmp_path / "m")), load_format="dummy").config
    check_context(config, 64)
    with pytest.raises(ConfigError, match="use --max-model-len 64 or less"):
        check_context(config, 65)


def test_llama_ignores_the_sliding_window_key_and_qwen_needs_its_flag(tmp_path):
    def window(**changes):
        write_config(tmp_path / "m", **changes)
        return resolve_model("m", load_format="dummy").config.sliding_window

    qwen = {"architectures": ["Qwen2ForCausalLM"]}
    assert window(sliding_window=32) is None
    assert window(sliding_window=32, **qwen) is None
    assert window(sliding_window=32, use_sliding_window=True, **qwen) == 32
    assert window(use_sliding_window=True, **qwen) == 4096
    assert window(architectures=["MistralForCausalLM"]) == 4096
    assert window(architectures=["MistralForCausalLM"], sliding_window=None) is None


def test_reading_checkpoints_loads_neither_jax_nor_the_hub_library():
    code = (
        "import sys, duetjax.checkpoint.source, duetjax.checkpoint.dummy\n"
        "print([name for name in ('jax', 'huggingface_hub', 'torch') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(duetjax.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.strip() == "[]"
