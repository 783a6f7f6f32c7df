"""What a run is asked to do. Stored in `manifest.json`, so that a later verb continues with the same options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

__all__ = ["RunOptions"]


class RunOptions(BaseModel):
    """Options of a run, checked.

    Field names are the option names of the command line: `calib_size` is `--calib-size`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Hugging Face directory, hub id, `.gguf` file, or an ONNX graph (`.onnx`)."""
    output: Path
    """Directory that holds every file of the run."""
    engine: Path | None = None
    """Where the engine goes; None builds none."""
    target: str | None = None
    """`tensorrt`, `tensorrt-rtx`, `onnx`; None picks what this machine can build."""
    task: Literal["auto", "causal-lm", "encoder", "seq2seq", "seq2seq-encoder", "seq2seq-decoder", "vlm-decoder"] = (
        "auto"
    )
    """What the model is exported as; `auto` takes what its config says. `seq2seq` is both halves of an encoder-decoder,
    each a run of its own."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Type of everything that is not quantized."""
    logits: Literal["all", "last"] = "all"
    """Tokens of a call that the graph gives logits for: every one, or the last one."""
    kv_cache: Literal["concat", "static"] = "concat"
    """A KV cache that grows with every call, or one of fixed length that is written in place."""
    kv_dtype: Literal["float", "int8"] = "float"
    """A KV cache of type `dtype`, or of INT8 codes with a scale for each head of a token."""
    emit_range_outputs: bool = False
    """Add an output with the saturation of every static layer, `range_monitor`."""
    adapter: Path | None = None
    """LoRA adapter that is merged into the model before anything else."""
    rotate: bool = False
    """Rotate the residual stream by a Hadamard matrix, fused into the weights, before anything else."""
    policy: str = "paper"
    """`paper`, `auto`, or a policy.json to replay."""
    effective_bits: float | None = Field(default=None, gt=0.0, le=16.0)
    """Bits a weight, scales included, that `auto` may use on average; None: as many as `paper`, unless
    `max_ppl_increase` is given."""
    max_dynamic_layers: NonNegativeInt | None = None
    """Linears that `auto` may quantize token by token."""
    cost_table: Path | None = None
    """Measured decode times for `auto`; None models them."""
    v0: float = Field(default=15.0, ge=0.0, allow_inf_nan=False)
    v1: float = Field(default=150.0, ge=0.0, allow_inf_nan=False)
    equalizer: Literal["paper", "none", "lae", "smoothquant", "awq", "search"] = "paper"
    """What equalizes inputs at fold sites: LAE between v0 and v1, nothing, or one method at every site."""
    smoothquant_alpha: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"] = 0.5
    """Exponent of the activations in `smoothquant`; `auto` searches it site by site."""
    range_calibrator: Literal["absmax", "percentile", "mse", "entropy"] = "absmax"
    """How much of an input a static scale covers: everything, or less than its outliers."""
    percentile: float = Field(default=99.99, gt=0.0, le=100.0)
    """Of the values that `range_calibrator` percentile covers."""
    group_size: Literal[128, 64, 32, 16] = 128
    weight_method: Literal[
        "rtn", "mse", "clip", "awq", "gptq", "gptq+awq", "gptq+cd", "adaround", "two_level", "integer_scale"
    ] = "rtn"
    """`awq` is `equalizer` awq with `clip`, `gptq+awq` the same with `gptq`; both take the default `equalizer` only."""
    signed_scales: bool = False
    """Let group scales be negative, so that all 16 levels are used; needs `plugin` on."""
    sequential: bool = False
    """Quantize weights block by block, with the inputs that the quantized blocks before give."""
    reconstruct_blocks: NonNegativeInt = 0
    """Steps of learned rounding against the output of each block, `sequential` included; 0 for none."""
    exclude: tuple[str, ...] = ("lm_head", "^proj_out$")
    """Regular expressions of torch paths that keep the float precision; by default the head, as it is called."""
    precision: tuple[str, ...] = ()
    """`REGEX=NAME` with `w4a8`, `w4a16`, `w8a8` or `float`; later ones win, also over `exclude`."""
    calib_dataset: str = "builtin"
    """`builtin`, `random`, a .txt, .jsonl, .fasta or .npz file, or a datasets id."""
    calib_data: Path | None = None
    """Inputs an ONNX graph is calibrated on: a .npz or .npy file, or a directory of them, one file a batch. For
    speech: a .npz file of windows of features, and of the texts in them for the decoder."""
    calib_size: PositiveInt = 64
    """Samples of `calib_seq` tokens; of features, the first so many windows."""
    calib_seq: PositiveInt = 512
    batch_size: NonNegativeInt = 0
    """Samples in one forward pass of calibration, and in one step of `reconstruct_blocks`; 0 picks one. For an ONNX
    graph: samples that files are cut into; 0 leaves a file as it is, unless the graph fixes its batch."""
    seed: NonNegativeInt = 0
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Runs the decoder blocks in calibration: `auto`, `cpu`, `cuda` or `cuda:1`."""
    max_memory: ByteSize | None = None
    """Bytes of hidden states that calibration holds in memory, in each process; the rest lies on disk."""
    verify: bool = True
    eval_windows: PositiveInt = 8
    """Windows of held-out text for perplexity."""
    eval_seq: PositiveInt = 512
    """Tokens in a window; of an encoder, most tokens in a text."""
    eval_text: str = "builtin"
    """Texts an encoder is compared on: `builtin`, a .txt, .jsonl, .fasta or .npz file, or a datasets id."""
    eval_sentences: PositiveInt = 200
    """Texts an encoder is compared on."""
    eval_data: Path | None = None
    """Inputs an ONNX graph or a model of speech is compared on, as `calib_data`; None takes those."""
    min_cosine: float | None = Field(default=None, gt=0.0, le=1.0)
    """Smallest mean cosine of an encoder's text embeddings, or of an output of an ONNX graph; below it nothing is
    published."""
    decode_steps: PositiveInt = 16
    """Greedy decode steps compared with the cache carried."""
    max_ppl_increase: NonNegativeFloat | None = None
    """Largest relative increase of perplexity (0.1 is 10 %); above it nothing is published."""
    max_batch_size: PositiveInt = 4
    max_input_len: PositiveInt = 1024
    max_kv_len: PositiveInt = 2048
    min_shapes: str | None = None
    """trtexec grammar: `input_ids:1x1,attention_mask:1x1`; overrides the three limits, with the two below."""
    opt_shapes: str | None = None
    max_shapes: str | None = None
    compute_capability: tuple[str, ...] = ("8.0", "8.6", "8.9", "12.0")
    """GPUs a TensorRT-RTX engine is built for."""
    builder_optimization_level: int = Field(default=3, ge=0, le=5)
    plugin: Literal["off", "on"] = "off"
    """Whether the W4A8 plugin runs the quantized linears; off lowers them to standard operators."""
    embed_plugin: bool = False
    """Put the plugin library into the engine, which then loads without one beside it; needs `plugin` on."""
    fuse_projections: bool = True
    """Let the plugin multiply once where several linears read one tensor (q, k and v; gate and up)."""
    mem_pool_size: str | None = None
    """`workspace:8G`, as trtexec takes it."""
    checkpoint: Path | None = None
    """Where a compressed-tensors checkpoint of the policy goes; None writes none."""
    checkpoint_format: Literal["int-quantized", "pack-quantized"] = "int-quantized"
    checkpoint_per_token: bool = False
    """Write every input as quantized token by token, which is what vLLM runs."""
    keep: bool = True
    """Keep the float and the Q/DQ graph after a successful run."""
    trust_remote_code: bool = False
