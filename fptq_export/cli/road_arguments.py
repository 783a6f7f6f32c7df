"""The options of the road's verbs."""

from __future__ import annotations

import argparse

__all__ = ["DIRECTORY_VERBS", "add_road_options"]

DIRECTORY_VERBS = ("rewrite", "verify", "checkpoint", "build")
"""They go on from a run directory; the other verbs start from a model."""


def add_road_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the options; only those that are given appear in the namespace."""
    if verb in DIRECTORY_VERBS:
        parser.add_argument("output", nargs="?", metavar="DIR", help="run directory written by the earlier stages")
        parser.add_argument("-o", "--output", dest="output", metavar="DIR", help="the same")
    else:
        parser.add_argument(
            "model", nargs="?", metavar="MODEL", help="Hugging Face directory, hub id, .gguf or .onnx file"
        )
        parser.add_argument("-m", "--model", dest="model", metavar="MODEL", help="the same")
        parser.add_argument("-o", "--output", metavar="DIR", help="directory for every file [NAME-w4a8]")
        parser.add_argument(
            "--preset",
            metavar="NAME",
            help="paper; balanced: better INT4 weights for more calibration time; or accurate: also one scale a token"
            " and groups of 64; options that are given win [paper]",
        )
    _add_model_options(parser)
    _add_graph_options(parser)
    _add_calibration_options(parser)
    _add_policy_options(parser)
    _add_weight_options(parser)
    _add_verify_options(parser)
    _add_checkpoint_options(parser)
    _add_build_options(parser)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--task",
        metavar="NAME",
        help="auto, causal-lm, encoder (hidden states, no cache), seq2seq (an encoder-decoder, two runs), one of its"
        " halves (seq2seq-encoder, seq2seq-decoder), or vlm-decoder (behind embeddings) [what config.json says]",
    )
    group.add_argument("--dtype", metavar="TYPE", help="fp16, bf16 or fp32: type of what is not quantized [fp16]")
    group.add_argument(
        "--adapter", metavar="DIR", help="LoRA adapter, as peft saves it, merged into the weights first [none]"
    )
    group.add_argument(
        "--rotate",
        action=argparse.BooleanOptionalAction,
        help="rotate the residual stream by a Hadamard matrix first, exactly: fewer outlier channels [no]",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group.add_argument(
        "--keep", action=argparse.BooleanOptionalAction, help="keep model.onnx and model.qdq.onnx after the run [keep]"
    )


def _add_graph_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("graph")
    group.add_argument("--logits", metavar="TOKENS", help="all, or last: logits of the last token of a call only [all]")
    group.add_argument(
        "--kv-cache",
        metavar="FORM",
        help="concat, or static: a cache of fixed length, written at an index, and one Attention a layer [concat]",
    )
    group.add_argument(
        "--kv-dtype",
        metavar="TYPE",
        help="float, or int8: keys and values with a scale for each head of a token [float]",
    )
    group.add_argument(
        "--emit-range-outputs",
        action=argparse.BooleanOptionalAction,
        help="one more output, range_monitor: what static scales clip, for fptq-export monitor [no]",
    )


def _add_calibration_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calib-dataset",
        metavar="DATA",
        help="builtin, random, a .txt, .jsonl, .fasta or .npz file, or a datasets id [builtin]",
    )
    group.add_argument(
        "--calib-data",
        metavar="DATA",
        help="ONNX models: .npz with an array an input, or a directory of them; speech: .npz with input_features and"
        " decoder_input_ids",
    )
    group.add_argument("--calib-size", type=int, metavar="N", help="samples [64]")
    group.add_argument("--calib-seq", type=int, metavar="TOKENS", help="tokens in a sample [512]")
    group.add_argument("--batch-size", type=int, metavar="N", help="samples in one pass or step; 0 picks one [0]")
    group.add_argument("--seed", type=int, metavar="N", help="seed of the sample choice [0]")
    group.add_argument(
        "--device", metavar="NAME", help="auto, cpu, cuda or cuda:1: runs the blocks [auto: a GPU if there is one]"
    )
    group.add_argument(
        "--max-memory", metavar="SIZE", help="hidden states above it, e.g. 4GiB, lie on disk [all in memory]"
    )


def _add_policy_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("policy")
    group.add_argument(
        "--policy",
        metavar="RULE|FILE",
        help="paper, auto (choose for every layer), or a policy.json to replay without calibration [paper]",
    )
    group.add_argument(
        "--effective-bits", type=float, metavar="B", help="auto: bits a weight on average [as many as paper]"
    )
    group.add_argument("--max-dynamic-layers", type=int, metavar="N", help="auto: per-token layers at most [no limit]")
    group.add_argument("--cost-table", metavar="FILE", help="auto: JSON of measured decode times [modelled]")
    group.add_argument(
        "--v0", type=float, metavar="X", help="inputs up to this magnitude stay as they are, static [15]"
    )
    group.add_argument("--v1", type=float, metavar="X", help="inputs from this magnitude on are per-token [150]")
    group.add_argument(
        "--equalizer",
        metavar="NAME",
        help="paper (LAE between v0 and v1), none, or at every fold site lae, smoothquant, awq or search [paper]",
    )
    group.add_argument(
        "--smoothquant-alpha", metavar="X", help="with --equalizer smoothquant: 0 to 1, or auto to search it [0.5]"
    )
    group.add_argument(
        "--range-calibrator",
        metavar="NAME",
        help="range of static scales: absmax, or percentile, mse or entropy, which clip outliers [absmax]",
    )
    group.add_argument("--percentile", type=float, metavar="P", help="of the values that percentile covers [99.99]")
    group.add_argument(
        "--exclude", nargs="+", metavar="REGEX", help="layers that keep the float type; '' for none [the head]"
    )
    group.add_argument(
        "--precision",
        nargs="+",
        metavar="REGEX=NAME",
        help="layers that run w8a8, w4a16 or float, e.g. 'down_proj$=w8a8'; the last match wins [w4a8 for all]",
    )


def _add_weight_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("weights")
    group.add_argument(
        "--group-size", type=int, metavar="N", help="128, 64, 32 or 16 channels share a weight scale [128]"
    )
    group.add_argument(
        "--weight-method",
        metavar="NAME",
        help="rtn, mse, clip, gptq, gptq+cd, adaround, two_level or integer_scale; awq and gptq+awq are"
        " --equalizer awq with clip and with gptq [rtn]",
    )
    group.add_argument(
        "--signed-scales",
        action=argparse.BooleanOptionalAction,
        help="group scales may be negative: more accurate, needs --plugin on [no]",
    )
    group.add_argument(
        "--sequential",
        action=argparse.BooleanOptionalAction,
        help="quantize block by block, with the inputs that the quantized blocks before give [no]",
    )
    group.add_argument(
        "--reconstruct-blocks",
        type=int,
        metavar="STEPS",
        help="the same, then learn the rounding of each block against the float block's output: about 100 steps [0]",
    )


def _add_verify_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("verification")
    group.add_argument("--verify", action=argparse.BooleanOptionalAction, help="compare with the FP32 model [verify]")
    group.add_argument(
        "--max-ppl-increase", metavar="RATIO", help="3%% or 0.03: above it the run fails with exit code 3 and no engine"
    )
    group.add_argument("--eval-windows", type=int, metavar="N", help="windows of held-out text [8]")
    group.add_argument("--eval-seq", type=int, metavar="TOKENS", help="tokens in a window [512]")
    group.add_argument("--decode-steps", type=int, metavar="N", help="greedy steps with the cache carried [16]")
    group.add_argument("--eval-text", metavar="DATA", help="encoders: texts that are compared [builtin]")
    group.add_argument("--eval-sentences", type=int, metavar="N", help="encoders: how many of them [200]")
    group.add_argument("--eval-data", metavar="DATA", help="as --calib-data: what is compared on [--calib-data]")
    group.add_argument(
        "--min-cosine",
        type=float,
        metavar="X",
        help="encoders: 0.97; a lower mean cosine of embeddings is exit code 3; ONNX models: of each output",
    )


def _add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--checkpoint", metavar="DIR", help="where the compressed-tensors checkpoint goes")
    group.add_argument(
        "--checkpoint-format",
        metavar="NAME",
        help="int-quantized (a byte a code, what vLLM's W4A8 reads) or pack-quantized [int-quantized]",
    )
    group.add_argument(
        "--checkpoint-per-token",
        action=argparse.BooleanOptionalAction,
        help="write every input as per-token: vLLM has no static W4A8 [as in the policy]",
    )


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", metavar="FILE", help="where the engine goes, e.g. out.plan")
    group.add_argument("--target", metavar="NAME", help="tensorrt, tensorrt-rtx or onnx [what this machine can build]")
    group.add_argument("--max-batch-size", type=int, metavar="N", help="sequences in a batch [4]")
    group.add_argument("--max-input-len", type=int, metavar="TOKENS", help="new tokens in one call [1024]")
    group.add_argument("--max-kv-len", type=int, metavar="TOKENS", help="tokens in the cache before a call [2048]")
    for name in ("min", "opt", "max"):
        group.add_argument(f"--{name}-shapes", metavar="SHAPES", help="trtexec's --minShapes: input_ids:1x1,...")
    group.add_argument("--compute-capability", nargs="+", metavar="CC", help="GPUs of an RTX engine [8.0 8.6 8.9 12.0]")
    group.add_argument("--builder-optimization-level", type=int, metavar="N", help="0 to 5 [3]")
    group.add_argument("--plugin", metavar="on|off", help="run W4A8 linears in our TensorRT plugin [off]")
    group.add_argument(
        "--embed-plugin",
        action=argparse.BooleanOptionalAction,
        help="with --plugin on, put the plugin library into the engine, which then needs none beside it [no]",
    )
    group.add_argument(
        "--fuse-projections",
        action=argparse.BooleanOptionalAction,
        help="with --plugin on, one GEMM for q, k and v, and one for gate and up [fuse-projections]",
    )
    group.add_argument("--mem-pool-size", metavar="POOLS", help="trtexec's --memPoolSize: workspace:8G")
