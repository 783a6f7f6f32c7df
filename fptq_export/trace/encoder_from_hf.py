"""A Hugging Face encoder, or that of an encoder-decoder -> an ONNX graph to hidden states, without weights.

It reads tokens; an encoder of speech reads mel features, and its convolutions stay in float. There is no cache, no head
and no pooler. Positions are those that the model counts itself. Tracing works as for language models (`from_hf`): under
`FakeTensorMode`, from the config alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fptq_export.errors import UserError
from fptq_export.halves import cut_to_encoder, encoder_path, feature_shape
from fptq_export.tasks import ENCODER, SEQ2SEQ_ENCODER, Task, auto_class, build_options, reads_features
from fptq_export.trace.fake_tracing import fake_tracing
from fptq_export.trace.from_hf import (
    OPSET,
    TORCH_DTYPES,
    TracedModel,
    computed_buffers,
    refuse_stacked_weights,
    tied_parameters,
    user_errors_from_torch,
)
from fptq_export.trace.graph_names import name_dimensions, name_initializers
from fptq_export.trace.model_linears import linears_from_model, roles_from_model

__all__ = ["traced_encoder_from_config"]

_FEATURES = "input_features"
_OUTPUT = "last_hidden_state"
_SAMPLE_BATCH, _SAMPLE_SEQUENCE = 2, 3
"""Different and above 1, so that they are not taken for one dimension and none is specialized."""
_UNBOUNDED = 1 << 30
"""torch.export writes infinity, or the largest integer, where it found no limit."""


class _Encoder(nn.Module):
    """The module at a path of the model as a function of tokens: one output."""

    def __init__(self, model: nn.Module, path: str, uses_cache: bool) -> None:
        super().__init__()
        self.wrapped = model
        self._path = path
        self._options = {"use_cache": False} if uses_cache else {}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states [batch, sequence, hidden] after the last layer and its norm."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        encoder = self.wrapped.get_submodule(self._path)
        output = encoder(input_ids=input_ids, attention_mask=attention_mask, **types, **self._options)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


class _SpeechEncoder(nn.Module):
    """The module at a path of the model as a function of mel features: one output."""

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        self.wrapped = model
        self._path = path

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        """Hidden states [batch, positions, hidden] after the last layer and its norm."""
        hidden: torch.Tensor = self.wrapped.get_submodule(self._path)(input_features).last_hidden_state
        return hidden


def traced_encoder_from_config(
    config: PretrainedConfig, dtype: str, *, trust_remote_code: bool = False, task: Task = ENCODER
) -> TracedModel:
    """Trace an encoder from its config alone.

    Args:
        config: Config of the model; its weights are not needed.
        dtype: `fp16`, `bf16` or `fp32`: the type of weights and activations.
        trust_remote_code: Whether code from the model repository may run.
        task: The body of an encoder, or the encoder of an encoder-decoder.

    Returns:
        The graph with inputs `input_ids`, `attention_mask` and, where the model tells segments apart,
        `token_type_ids`, all int64 [batch, sequence], and the output `last_hidden_state` [batch, sequence, hidden];
        batch and sequence are dynamic. Of an encoder of speech the one input is `input_features` [batch, mel bins,
        frames] in the graph's type, and only batch is dynamic.

    Raises:
        UserError: The model does not take tokens, or torch cannot trace it.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with fake_tracing():
        with no_init_weights():  # some draw weights by the values of others, and fake tensors have none
            model = _body(config, dtype, trust_remote_code, task)
        half = task == SEQ2SEQ_ENCODER
        tied = model.get_expanded_tied_weights_keys(all_submodels=True) if half else tied_parameters(model)
        path = encoder_path(model) if half else ""
        encoder = cut_to_encoder(model) if half else model
        speech = half and reads_features(config)
        names = [] if speech else _input_names(config, encoder)
        refuse_stacked_weights(model, convolutions=speech)
        with user_errors_from_torch(model):
            if speech:
                shape = (_SAMPLE_BATCH, *feature_shape(encoder, config))
                sample = {_FEATURES: torch.zeros(shape, dtype=TORCH_DTYPES[dtype])}
                graph, max_sequence = _graph_from_module(_SpeechEncoder(model, path), sample, dynamic=1)
            else:
                sample = _sample_tokens(names)
                graph, max_sequence = _graph_from_module(_Encoder(model, path, _uses_cache(encoder)), sample, dynamic=2)
    name_initializers(graph)
    name_dimensions(graph, dict.fromkeys(sample, ("batch", None, None) if speech else ("batch", "sequence")))
    return TracedModel(
        graph,
        computed_buffers(lambda: _body(config, dtype, trust_remote_code, task)),
        tied,
        linears_from_model(model),
        roles_from_model(model),
        max_sequence,
    )


def _body(config: PretrainedConfig, dtype: str, trust_remote_code: bool, task: Task) -> PreTrainedModel:
    try:
        model: PreTrainedModel = auto_class(config, task).from_config(
            config,
            dtype=TORCH_DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            **build_options(config, task),
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"model type {config.model_type!r}",
            f"no encoder can be built from its config ({str(error).splitlines()[0]})",
            "export a model that turns tokens into hidden states (BERT, RoBERTa, ESM-2, ...)",
        ) from error
    model.eval()
    return model


def _parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


def _input_names(config: PretrainedConfig, model: nn.Module) -> list[str]:
    """Inputs of the graph. Models with one segment type only have the parameter, but tokenizers fill in nothing."""
    parameters = _parameters(model)
    missing = {"input_ids", "attention_mask"} - parameters
    if missing:
        cause = f"takes no {' and no '.join(sorted(missing))}"
        raise UserError(type(model).__name__, cause, "export a model that turns tokens into hidden states")
    types = "token_type_ids" in parameters and (getattr(config, "type_vocab_size", None) or 0) > 1
    return ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]


def _uses_cache(model: nn.Module) -> bool:
    """Whether the model has to be told not to return a cache: decoders whose body is used do."""
    return "use_cache" in _parameters(model)


def _sample_tokens(names: list[str]) -> dict[str, torch.Tensor]:
    shape = (_SAMPLE_BATCH, _SAMPLE_SEQUENCE)
    # One tensor an input: torch.export takes one tensor in two places for one input.
    return {name: (torch.ones if name == "attention_mask" else torch.zeros)(shape, dtype=torch.long) for name in names}


def _graph_from_module(
    module: nn.Module, sample: Mapping[str, torch.Tensor], dynamic: int
) -> tuple[ir.Model, int | None]:
    """The graph of a module on samples by input, whose first `dynamic` dimensions are; and the longest sequence."""
    dims = dict.fromkeys(range(dynamic), torch.export.Dim.AUTO)
    program = torch.export.export(module, tuple(sample.values()), dynamic_shapes=(dims,) * len(sample), strict=False)
    exported = torch.onnx.export(
        program,
        (),
        input_names=list(sample),
        output_names=[_OUTPUT],
        opset_version=OPSET,
        optimize=False,
        verbose=False,
    )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return exported.model, _max_sequence(program)


def _max_sequence(program: torch.export.ExportedProgram) -> int | None:
    """The upper end of the sequence's range, which torch narrows to the size of a table of positions."""
    inputs = (node for node in program.graph.nodes if node.op == "placeholder" and node.name == "input_ids")
    ids = next(inputs, None)
    if ids is None:
        return None
    limit = program.range_constraints[ids.meta["val"].shape[1].node.expr].upper
    return int(limit) if limit < _UNBOUNDED else None
