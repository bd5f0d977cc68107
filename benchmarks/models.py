"""Linear layers of real models, and those that the peers' own benchmarks measure.

Sizes of models are those of their published configurations; a layer stands for all of its model
with the same size and bias (`q` of Llama also for `o`, `gate` for `up`). Sizes of peers are those
of the benchmark that the comment names, with the tokens and ranks at which it runs.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A linear layer, K in_features to N out_features. `fan_in_fan_out`: stored as [K, N].

    tokens, ranks: the sizes at which its own benchmark measures it; empty for a model's layer.
    """

    model: str
    name: str
    K: int
    N: int
    bias: bool = False
    fan_in_fan_out: bool = False
    tokens: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.model}.{self.name}"


def _gpt2(model: str, width: int) -> tuple[Layer, ...]:
    sizes = {
        "c_attn": (width, 3 * width),
        "c_proj": (width, width),
        "c_fc": (width, 4 * width),
        "mlp_c_proj": (4 * width, width),
    }
    return tuple(
        Layer(model, name, K, N, bias=True, fan_in_fan_out=True) for name, (K, N) in sizes.items()
    )


def _encoder(model: str, width: int) -> tuple[Layer, ...]:
    """BERT's block: four square projections and an MLP four times as wide, all with bias."""
    sizes = {
        "query": (width, width),
        "intermediate": (width, 4 * width),
        "output": (4 * width, width),
    }
    return tuple(Layer(model, name, K, N, bias=True) for name, (K, N) in sizes.items())


def _llama(model: str, width: int, kv: int, hidden: int, qkv_bias: bool = False) -> list[Layer]:
    """Llama's block; kv: the width of the grouped keys, or values."""
    layers = [
        Layer(model, "q", width, width, bias=qkv_bias),
        Layer(model, "kv", width, kv, bias=qkv_bias),
        Layer(model, "gate", width, hidden),
        Layer(model, "down", hidden, width),
    ]
    return [*layers, Layer(model, "o", width, width)] if qkv_bias else layers


MODELS = (
    *_gpt2("gpt2", 768),
    *_gpt2("gpt2-medium", 1024),
    *_gpt2("gpt2-large", 1280),
    *_encoder("roberta-base", 768),
    *_encoder("roberta-large", 1024),
    *_encoder("deberta-v2-xxl", 1536),
    Layer("gpt3-175b", "q", 12288, 12288, bias=True),
    Layer("gpt3-175b", "fc", 12288, 49152, bias=True),
    Layer("gpt3-175b", "proj", 49152, 12288, bias=True),
    *_llama("llama-3.2-1b", 2048, 512, 8192),
    *_llama("llama-3.2-3b", 3072, 1024, 8192),
    *_llama("llama-3.1-8b", 4096, 1024, 14336),
    *_llama("llama-3.3-70b", 8192, 1024, 28672),
    *_llama("qwen2.5-7b", 3584, 512, 18944, qkv_bias=True),
    *_llama("mistral-7b", 4096, 1024, 14336),
    *_llama("smollm2-135m", 576, 192, 1536),
    Layer("square", "4096", 4096, 4096),  # the square of 2048 is llama-3.2-1b.q
)

_VLLM_TOKENS = (
    *(1, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896),
    *(1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192),
)
PEERS = (
    # LoRAFusion, benchmarks_paper/bench_lora_kernels.py (there M in steps of 256)
    *(
        Layer("lorafusion", str(size), size, size, tokens=(2048, 4096, 6144, 8192), ranks=(16,))
        for size in (4096, 5120, 8192)
    ),
    # Chalk, the table in chalk/ops/lora.py: Qwen3.5's projections; its A100 point
    Layer("chalk", "q", 2560, 4096, tokens=(2048, 8192, 32768), ranks=(16, 32, 64)),
    Layer("chalk", "down", 9216, 2560, tokens=(2048, 8192, 32768), ranks=(16, 32, 64)),
    Layer("chalk", "gate", 2560, 9216, tokens=(2048, 8192, 32768), ranks=(16, 32, 64)),
    Layer("chalk", "a100", 4096, 4096, tokens=(8192,), ranks=(32,)),
    # axolotl: SmolLM2-135M of its pull request 2324, Qwen3.5-9B's GatedDeltaNet of 3732 (there
    # the rank is ours)
    Layer("axolotl", "smollm2-q", 576, 576, tokens=(512, 8096), ranks=(16,)),
    Layer("axolotl", "smollm2-gate", 576, 1536, tokens=(512, 8096), ranks=(16,)),
    Layer("axolotl", "gdn-qkv", 4096, 8192, tokens=(4096,), ranks=(16,)),
    Layer("axolotl", "gdn-z", 4096, 4096, tokens=(4096,), ranks=(16,)),
    Layer("axolotl", "gdn-ba", 4096, 32, tokens=(4096,), ranks=(16,)),
    # NeMo Automodel, the ragged case of its Triton kernel's tests
    Layer("nemo", "ragged", 500, 224, tokens=(100,), ranks=(8,)),
    # LyCORIS 4.1, the projections that its kernels are timed on (the rank is ours)
    Layer("lycoris", "square", 3072, 3072, tokens=(4096,), ranks=(16,)),
    Layer("lycoris", "up", 3072, 16384, tokens=(4096,), ranks=(16,)),
    Layer("lycoris", "down", 8192, 3072, tokens=(4096,), ranks=(16,)),
    # vLLM, benchmarks/kernels/benchmark_lora.py
    *(
        Layer("vllm", str(size), size, size, tokens=_VLLM_TOKENS, ranks=(16,))
        for size in (1024, 2048, 4096, 8192, 16384)
    ),
)
