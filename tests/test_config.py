"""What "auto" becomes, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from turbolm.config import EngineConfig, Gpu, Hardware, format_size, parse_size, resolve
from turbolm.errors import CapacityError, ConfigError
from turbolm.kv import KvFormat, KvShape
from turbolm.memory import ModelNeeds

GIB = 1 << 30
LAPTOP = Hardware("CPU", "x86_64", 4, ("avx2",), 16 * GIB, 8 * GIB, native="avx2")
SERVER = replace(LAPTOP, gpus=(Gpu("H200", 141 * GIB, 140 * GIB, (9, 0)),))
SMALL = ModelNeeds("small", 8192, 100 << 20, 135 << 20, (KvShape(3, 64, 64),) * 30, 49152)
LARGE = ModelNeeds("large", 32768, 4 * GIB, 7 * GIB, (KvShape(8, 128, 128),) * 32, 152064)


def test_auto_on_a_cpu_keeps_packed_weights_and_uses_native_kernels() -> None:
    found = resolve(EngineConfig(), SMALL, LAPTOP)
    assert (found.device, found.kernels, found.dtype, found.unpack) == ("cpu", "native", "float32", False)
    assert found.threads == 4
    assert found.max_context == 8192
    assert found.pool_tokens >= 8192
    text = " ".join(found.reasons)
    assert all(word in text for word in ("no CUDA GPU", "avx2", "physical cores", "KV cache"))


def test_without_native_kernels_weights_are_unpacked_and_it_is_said() -> None:
    found = resolve(EngineConfig(), SMALL, replace(LAPTOP, native=None, native_error="no C++ compiler was found"))
    assert (found.kernels, found.unpack) == ("reference", True)
    assert any("no C++ compiler" in reason for reason in found.reasons)
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        resolve(EngineConfig(kernels="native"), SMALL, replace(LAPTOP, native=None, native_error="no C++ compiler"))


def test_auto_takes_a_gpu_where_there_is_one() -> None:
    found = resolve(EngineConfig(), LARGE, SERVER)
    assert (found.device, found.dtype) == ("cuda", "bfloat16")
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        resolve(EngineConfig(device="cuda"), LARGE, LAPTOP)


def test_a_gpu_runs_its_own_kernels_unless_it_can_not() -> None:
    found = resolve(EngineConfig(), LARGE, SERVER)
    assert (found.kernels, found.unpack, found.block_size) == ("native", False, 64)
    old = replace(SERVER, gpu_native_error="compute capability 7.5; they need 8.0")
    found = resolve(EngineConfig(), LARGE, old)
    assert found.kernels == "reference"
    assert any("7.5" in reason for reason in found.reasons)
    with pytest.raises(ConfigError, match="7\\.5"):
        resolve(EngineConfig(kernels="native"), LARGE, old)
    assert resolve(EngineConfig(dtype="float32"), LARGE, SERVER).kernels == "reference"


def test_a_gpu_keeps_int4_packed_and_unpacks_the_rest() -> None:
    layers, others = 10**9, 10**8
    model = replace(LARGE, num_parameters=layers + others, layer_parameters=layers, packed=("int4",))
    for group, packed in ((128, 4 + 20 / 128), (32, 4 + 20 / 32)):
        file = replace(model, packed_bytes=int(layers * packed / 8) + 2 * others)
        found = resolve(EngineConfig(), file, SERVER).weight_bytes
        kept = layers * (4 + 32 / group) / 8 + 2 * others
        assert kept <= found <= 1.04 * kept
    rounded = resolve(EngineConfig(weights="int4"), replace(model, packed=()), SERVER)
    assert rounded.weight_bytes == layers * 17 // 32 + 2 * others
    blocks = resolve(EngineConfig(), replace(model, packed=("int4", "q5_0")), SERVER)
    assert blocks.weight_bytes == 2 * (layers + others)


def test_a_gpu_keeps_memory_for_what_a_step_holds() -> None:
    small = replace(SERVER, gpus=(Gpu("24 GB", 24 * GIB, 23 * GIB, (8, 9)),))
    model = replace(LARGE, num_parameters=8 * 10**9, activation_elements=70_000)
    found = resolve(EngineConfig(kv_memory="2G"), model, small)
    with pytest.raises(CapacityError, match="are free"):
        resolve(EngineConfig(kv_memory="2G", max_batch_tokens=64 * found.max_batch_tokens), model, small)


def test_speculation_is_on_where_it_pays_and_says_why() -> None:
    assert resolve(EngineConfig(), SMALL, LAPTOP).speculation
    assert not resolve(EngineConfig(speculation="off"), SMALL, LAPTOP).speculation
    assert not resolve(EngineConfig(), SMALL, SERVER).speculation
    assert resolve(EngineConfig(speculation="on"), SMALL, SERVER).speculation
    two = replace(SERVER, gpus=SERVER.gpus * 2)
    assert resolve(EngineConfig(speculation="on", tensor_parallel=2), SMALL, two).speculation
    found = resolve(EngineConfig(kernels="reference"), SMALL, LAPTOP)
    assert not found.speculation
    assert any("speculation off: " in reason for reason in found.reasons)


def test_a_draft_model_takes_its_part_of_the_memory() -> None:
    alone = resolve(EngineConfig(), LARGE, SERVER)
    found = resolve(EngineConfig(), LARGE, SERVER, SMALL)
    assert found.draft_model == "small" and 0 < found.draft_cost < 0.1
    own = 30 * 2 * 3 * 64 * 2
    assert found.kv_bytes_per_token == alone.kv_bytes_per_token + own
    assert found.pool_tokens < alone.pool_tokens
    assert any("draft model small" in reason and str(own) in reason for reason in found.reasons)
    two = replace(SERVER, gpus=SERVER.gpus * 2)
    for options, words in (
        ({"speculation": "off"}, "speculation is 'off'"),
        ({"kernels": "reference"}, "checks no drafts"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve(EngineConfig(**options), LARGE, two, SMALL)


def test_a_draft_model_lies_on_the_first_of_several_gpus() -> None:
    """So another one may have as much less memory as the draft model takes there, and no more."""
    draft = replace(SMALL, num_parameters=4 * 10**9)

    def tokens(first: int, second: int) -> int:
        gpus = tuple(replace(SERVER.gpus[0], free_memory=free * GIB) for free in (first, second))
        return resolve(EngineConfig(tensor_parallel=2), LARGE, replace(SERVER, gpus=gpus), draft).pool_tokens

    assert tokens(100, 100) == tokens(100, 94) > tokens(100, 80)
    assert tokens(100, 100) > tokens(94, 100)


def test_deterministic_is_had_where_kernels_can_and_refused_elsewhere() -> None:
    always = EngineConfig(deterministic=True)
    for hardware in (LAPTOP, SERVER):
        found = resolve(always, LARGE, hardware)
        assert found.deterministic and any("deterministic" in reason for reason in found.reasons)
    two = replace(SERVER, gpus=SERVER.gpus * 2)
    for changed, words in (
        ({"kernels": "reference"}, "kernels 'reference'"),
        ({"kv": "int8"}, "kv 'auto'"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve(EngineConfig.of(always, **changed), LARGE, two)
    assert resolve(EngineConfig.of(always, tensor_parallel=2), LARGE, two).deterministic
    assert resolve(EngineConfig.of(always, kv="int8"), SMALL, LAPTOP).deterministic


def test_the_context_shrinks_to_the_memory_only_where_nobody_asked_for_it() -> None:
    needs = replace(LARGE, max_context=1 << 20)
    found = resolve(EngineConfig(), needs, LAPTOP)
    assert found.max_context < 1 << 20
    assert found.max_context <= found.pool_tokens
    assert any("max_context" in reason for reason in found.reasons)
    with pytest.raises(CapacityError, match=r"1048576 tokens.*lower max_context"):
        resolve(EngineConfig(max_context=1 << 20), needs, LAPTOP)


def test_a_quantized_kv_cache_holds_more_tokens_in_the_same_memory() -> None:
    """Per head and token of 128 dimensions: 512 bytes in bfloat16; 128 + 4 each for keys and values in int8."""
    plain = resolve(EngineConfig(kv_memory="4G"), LARGE, SERVER)
    for kv, num_bytes in (("int8", 264), ("fp8", 256), ("int4", 136), ("int8:k,int4:v", 200), ("int4:v", 324)):
        found = resolve(EngineConfig(kv=kv, kv_memory="4G"), LARGE, SERVER)
        assert found.kv_bytes_per_token == 32 * 8 * num_bytes
        assert found.pool_tokens == (4 * GIB // found.kv_bytes_per_token) // 64 * 64 > 1.5 * plain.pool_tokens
        text = f"KV cache in {found.kv}: {32 * 8 * num_bytes} bytes per token, instead of 131072 in bfloat16"
        assert text in found.reasons


def test_layers_of_the_kv_cache_may_stay_unquantized() -> None:
    found = resolve(EngineConfig(kv="int8", kv_skip_layers="0, 1,-1,31"), LARGE, SERVER)
    assert found.kv == KvFormat("int8", "int8", "bfloat16", (0, 1, 31))
    assert found.kv_bytes_per_token == 8 * (29 * 264 + 3 * 512)
    assert any("layers 0, 1, 31 in bfloat16" in reason for reason in found.reasons)
    assert found.kv.of_layer(31) == ("bfloat16", "bfloat16")
    assert found.kv.of_layer(30) == ("int8", "int8")


@pytest.mark.parametrize(
    ("options", "model", "hardware", "words"),
    [
        ({"kv": "int8", "kv_skip_layers": "32"}, LARGE, LAPTOP, "the model has 32 layers: 0 to 31, or -32 to -1"),
        ({"kv_skip_layers": "0"}, LARGE, LAPTOP, "set kv to int8, int4 or fp8 too"),
        ({"kv": "int4"}, replace(LARGE, kv_layers=(KvShape(8, 72, 72),)), LAPTOP, "use float16 or int8 or fp8"),
        ({"kv": "int8"}, replace(LARGE, kv_layers=(KvShape(8, 128, 50),)), LAPTOP, "heads of 50; use float16"),
        ({"kv": "float16"}, LARGE, SERVER, "store bfloat16, int8, int4, fp8; use one of them"),
        ({"kv": "fp8"}, LARGE, replace(SERVER, gpus=(Gpu("A100", 80 * GIB, 79 * GIB, (8, 0)),)), "int8, int4; use"),
    ],
)  # fmt: skip
def test_kv_formats_that_do_not_fit_are_refused_with_those_that_do(
    options: dict, model: ModelNeeds, hardware: Hardware, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(EngineConfig(**options), model, hardware)
    assert words in str(caught.value)


def test_the_reference_stores_any_kind() -> None:
    for kind in ("float32", "float16", "bfloat16", "int8", "int4", "fp8"):
        assert resolve(EngineConfig(kv=kind, kernels="reference"), LARGE, SERVER).kv == KvFormat(kind, kind, "bfloat16")


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    with pytest.raises(CapacityError, match=r"'large' needs 30\.1 GB .* 8\.59 GB are free"):
        resolve(EngineConfig(dtype="float32"), LARGE, LAPTOP)
    with pytest.raises(CapacityError, match=r"kv_memory is 103\.1 GB.*3\.94 GB are free"):
        resolve(EngineConfig(kv_memory="96G"), LARGE, LAPTOP)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, "device is 'gpu'; allowed: auto, cpu, cuda"),
        ({"dtype": "float23"}, "Did you mean 'float32'"),
        ({"speculation": "yes"}, "speculation is 'yes'; allowed: auto, on, off"),
        ({"threads": -1}, "threads must be a whole number"),
        ({"max_batch_size": 2.5}, "max_batch_size must be a whole number"),
        ({"block_size": 17}, "allowed: 8, 16, 32, 64, 128"),
        ({"kv_memory": "lots"}, "give a size such as 500M"),
        ({"kv": "int5"}, "allowed: auto, float32, bfloat16, float16, int8, int4, fp8"),
        ({"kv": "in8"}, "Did you mean 'int8'"),
        ({"kv": "int8:k,int4:k"}, "name keys and values once each"),
        ({"kv": "int8:x"}, "name keys and values once each"),
        ({"kv_skip_layers": "first"}, "give layers by number"),
        ({"blocksize": 16}, "Did you mean 'block_size'"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.of(None, **options)
    assert words in str(caught.value)


def test_sizes() -> None:
    assert parse_size("500M", "x") == 500 << 20
    assert parse_size("1.5 GiB", "x") == int(1.5 * GIB)
    assert parse_size("4096", "x") == 4096
    assert format_size(98_362_432) == "98.4 MB"
    assert format_size(512) == "512 B"
