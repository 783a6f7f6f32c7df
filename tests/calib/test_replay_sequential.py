"""A replay keeps codes that were made block by block, or says why it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from calib.batches import CalibrationOptions, token_batches
from calib.choose_equalization import EqualizerOptions
from calib.decide import PolicyOptions, decide_policy
from calib.load import Checkpoint, model_from_checkpoint, stored_dtype
from calib.replay import replay_policy
from calib.sequential import Sequential
from calib.stats import Stats
from fptq_export.errors import UserErrors
from fptq_export.policy import write_policy
from fptq_export.progress import NoProgress
from fptq_export.sites import Sites

LAYER = "model.layers.1"
Q, DOWN, UP = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp.up_proj"
Document = dict[str, Any]


@pytest.fixture(scope="module")
def made(
    llama: Checkpoint,
    sites: Sites,
    make_stats: Callable[[dict[str, float]], Stats],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A policy quantized block by block, equalized at every site. Not to be changed; no Hessians lie beside it."""
    path = tmp_path_factory.mktemp("sequential") / "policy.json"
    batches = token_batches(CalibrationOptions(dataset="random", size=2, seq=16), None, 512)
    plan = Sequential(lambda: model_from_checkpoint(llama, stored_dtype(llama)), batches)
    wanted = PolicyOptions(group_size=16, weight_method="gptq", equalization=EqualizerOptions("lae"))
    policy, arrays = decide_policy(sites, make_stats({}), llama, wanted, NoProgress(), sequential=plan)
    write_policy(policy, arrays, path)
    return path


@pytest.fixture
def replay(made: Path, tmp_path: Path, sites: Sites, llama: Checkpoint) -> Callable[..., dict[str, Any]]:
    """Edit a copy, replay it; gives its arrays."""

    def run(edit: Callable[[Document], object]) -> dict[str, Any]:
        document = json.loads(made.read_text())
        edit(document)
        path = tmp_path / "policy.json"
        path.write_text(json.dumps(document))
        path.with_suffix(".safetensors").write_bytes(made.with_suffix(".safetensors").read_bytes())
        _, arrays = replay_policy(path, sites, llama, NoProgress())
        return arrays.read_all()

    return run


Replay = Callable[[Callable[[Document], object]], dict[str, Any]]


def test_untouched_codes_are_kept_bit_for_bit(made: Path, replay: Replay) -> None:
    """They follow from text that a replay does not have, and they need no Hessians."""
    before, after = load_file(made.with_suffix(".safetensors")), replay(lambda document: None)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_input_may_run_otherwise_with_the_codes_as_they_are(made: Path, replay: Replay) -> None:
    """A tier is no part of the weight."""
    edit = {"activation": "per_token", "activation_scale": None}
    after = replay(lambda document: document["layers"][DOWN].update(edit))
    before = load_file(made.with_suffix(".safetensors"))
    assert np.array_equal(before[f"{DOWN}.weight_codes"], after[f"{DOWN}.weight_codes"])


def test_layer_without_the_entry_is_quantized_anew(made: Path, replay: Replay) -> None:
    """This is what the messages below advise."""

    def edit(document: Document) -> None:
        del document["layers"][DOWN]["sequential"]
        document["layers"][DOWN]["weight_method"] = "rtn"

    before, after = load_file(made.with_suffix(".safetensors")), replay(edit)
    differing = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {f"{DOWN}.weight_codes"} <= differing <= {f"{DOWN}.weight_codes", f"{DOWN}.weight_scales"}


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        ({"weight_method": "rtn"}, "weight_method", "made with gptq"),
        ({"group_size": 32}, "group_size", "made with 16"),
        ({"signed_scales": True}, "signed_scales", "made with False"),
        ({"precision": "w8a8", "group_size": None, "weight_method": "rtn"}, "sequential", "set it to null"),
        (
            {"precision": "float", "activation": None, "activation_scale": None, "group_size": None},
            "sequential",
            "set it to null",
        ),
    ],
)
def test_codes_that_do_not_fit_the_entry_are_refused(
    replay: Replay, change: Document, place: str, message: str
) -> None:
    """Stored codes under another name, size or sign would be a policy that says what does not run."""
    with pytest.raises(UserErrors) as caught:
        replay(lambda document: document["layers"][Q].update(change))
    assert any(
        problem.path.endswith(f'["{Q}"].{place}') and message in problem.message for problem in caught.value.problems
    )


def test_codes_of_another_equalization_are_refused(replay: Replay) -> None:
    """Without its site's entry, the reader and the producer of the tensor have columns and rows of other weights."""

    def edit(document: Document) -> None:
        del document["equalization"][UP]
        document["layers"][DOWN]["activation_scale"] = None

    with pytest.raises(UserErrors) as caught:
        replay(edit)
    assert {problem.path for problem in caught.value.problems} == {
        f'$.layers["{path}"].sequential' for path in (UP, DOWN)
    }
