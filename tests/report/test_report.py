"""What stands in a report, and that nothing missing, foreign or odd stops it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from fptq_export.build.engine_facts import EngineFacts
from fptq_export.build.proof import Expected, Proof, ProofEntry
from fptq_export.diff.options import Thresholds
from fptq_export.diff.report import CandidateDiff, DiffReport, GreedyFigures, PartFigures, RunRecord
from fptq_export.errors import UserError
from fptq_export.files import write_json_model
from fptq_export.options import RunOptions
from fptq_export.package.manifest import Manifest, write_manifest
from fptq_export.progress import NoProgress
from fptq_export.report.accuracy_section import accuracy_section
from fptq_export.report.blocks import Missing, Report, Section, Table
from fptq_export.report.cost_sections import cost_section
from fptq_export.report.documents import RunDocuments, read_documents
from fptq_export.report.html import html_from_report
from fptq_export.report.layer_sections import policy_section, ranges_section
from fptq_export.report.layers import layer_figures, panels_from_layers
from fptq_export.report.markdown import markdown_from_report
from fptq_export.report.plots import limits_with_zero
from fptq_export.report.remarks import FEW_STEPS, remarks
from fptq_export.report.run import report_from_run, run_report
from fptq_export.report.run_sections import command_section, proof_section
from fptq_export.report.summary_section import summary_section
from fptq_export.roofline import DEVICES
from fptq_export.roofline.measured import CostEntry, CostTable
from fptq_export.verify.encoder_report import CosineFigures, EncoderReport, RetrievalFigures
from fptq_export.verify.graph_report import GraphReport, OutputFigures
from tests.report.synthetic_run import (
    BAD_LAYER,
    BLOCKS,
    CHANNELS,
    EQUALIZED,
    HOSTILE,
    LARGE,
    SECTIONS,
    verify_report,
    write_run,
)

FLOAT32_STEP = 2.0**-23
"""A float32 division of m by s = m, and the median of 64 such quotients, are off by no more than one rounding."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every file. Not to be changed."""
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def report(run: Path) -> Report:
    """Its report."""
    return report_from_run(run)


def section(report: Report, name: str) -> Section:
    return next(found for found in report.sections if found.id == name)


def words(found: Section) -> str:
    return markdown_from_report(Report("t", "g", (found,)))


def bare_run(directory: Path) -> Path:
    """A manifest, and nothing else."""
    directory.mkdir(parents=True)
    options = RunOptions(model="m", output=directory)
    write_manifest(Manifest(tool_version="0.1.0", command="c", options=options, environment={}), directory)
    return directory


def notes(documents: RunDocuments) -> str:
    return "\n".join(f"{note.level}: {note.text}" for note in remarks(documents, layer_figures(documents)))


def test_every_section_is_in_the_report(report: Report) -> None:
    """The contents are the same for every run, so that a reader finds them."""
    assert tuple(found.id for found in report.sections) == SECTIONS


def test_run_without_any_result_names_the_commands(tmp_path: Path) -> None:
    """A missing file is a sentence with the command that makes it, never an error."""
    run = bare_run(tmp_path / "a run")
    report = report_from_run(run)
    assert tuple(found.id for found in report.sections) == SECTIONS
    named = {
        found.id: [block.command or "" for block in found.blocks if isinstance(block, Missing)]
        for found in report.sections
    }
    quoted = f"'{run}'"
    assert f"fptq-export verify {quoted}" in named["accuracy"]
    assert f"fptq-export eval {quoted}" in named["accuracy"]
    assert f"fptq-export diff {quoted}" in named["accuracy"]
    assert f"fptq-export debug {quoted}" in named["layer-error"]
    assert f"fptq-export build {quoted} --engine out.plan" in named["proof"]
    for name in ("summary", "policy", "ranges", "calibration", "cost"):
        assert named[name], name


def test_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    """The error names the directory and how to make a run there."""
    with pytest.raises(UserError, match=r"is not a run directory") as caught:
        run_report(tmp_path, None, None, NoProgress())
    assert str(tmp_path) in caught.value.where


def test_missing_library_names_the_pip_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib the message says what to install."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(UserError, match=r"pip install 'fptq-export\[report\]'") as caught:
        run_report(run, None, None, NoProgress())
    assert caught.value.cause == "needs matplotlib"


def test_ranges_before_and_after_come_from_the_stored_arrays(run: Path) -> None:
    """An equalized input shows both ranges, and the steps its median channel reaches are those after equalization."""
    layers = {layer.path: layer for layer in layer_figures(read_documents(run))}
    equalized = layers["model.layers.7.mlp.down_proj"]
    assert equalized.before == LARGE
    assert equalized.after == pytest.approx(EQUALIZED, rel=FLOAT32_STEP, abs=0.0)
    assert equalized.levels == pytest.approx(127.0, rel=2 * FLOAT32_STEP, abs=0.0)
    plain = layers["model.layers.7.self_attn.q_proj"]
    assert plain.after is None
    median = 127.0 * (CHANNELS + 1) / 2 / CHANNELS
    assert plain.levels == pytest.approx(median, rel=CHANNELS * FLOAT32_STEP, abs=0.0)


def test_layers_are_drawn_by_role_and_block(run: Path) -> None:
    """One panel for each kind of input, with all blocks in it."""
    panels = panels_from_layers(
        tuple(layer for layer in layer_figures(read_documents(run)) if layer.before), of_inputs=True
    )
    titles = [f"input of {name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
    assert [panel.title for panel in panels] == titles
    assert all(panel.places == tuple(range(BLOCKS)) for panel in panels)


def test_figures_of_layers_are_drawn_layer_by_layer(run: Path) -> None:
    """Layers that read one tensor are one mark for its range, and one each for what is their own, as their error is."""
    first = layer_figures(read_documents(run))[: 3 * BLOCKS]
    twins = tuple(
        dataclasses.replace(layer, path=layer.path.replace("q_proj", "k_proj"))
        for layer in first
        if layer.path.endswith("q_proj")
    )
    shared = panels_from_layers((*first, *twins), of_inputs=True)
    assert shared[0].title == "input of self_attn.q_proj, self_attn.k_proj"
    own = panels_from_layers((*first, *twins), of_inputs=False)
    assert [panel.title for panel in own] == [
        "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "self_attn.k_proj"
    ]  # fmt: skip
    assert sum(len(panel.layers) for panel in own) == len(first) + len(twins)


def test_axis_shows_whole_marks() -> None:
    """Half a mark, 2.25 points of a panel of 85, fits beyond the outermost values and at zero."""
    for values in ([27.3, 20.0], [-1.0, 0.5], [0.0]):
        low, high = limits_with_zero(values)
        room = 2.25 / 85 * (high - low)
        assert low + room <= min(0.0, *values)
        assert high - room >= max(0.0, *values)


def test_layers_without_blocks_are_drawn_in_order(run: Path) -> None:
    """Names of an ONNX graph need no block: its layers stand in one row."""
    layers = layer_figures(read_documents(run))[:3]
    renamed = tuple(dataclasses.replace(layer, path=f"conv_{layer.number}") for layer in layers)
    (panel,) = panels_from_layers(renamed, of_inputs=True)
    assert panel.places == (1, 2, 3)
    assert not panel.in_blocks


def test_policy_table_has_every_layer_with_its_reason(report: Report) -> None:
    """No layer is left out, the float one neither."""
    table = next(block for block in section(report, "policy").blocks if isinstance(block, Table))
    assert len(table.rows) == 3 * BLOCKS + 1
    assert table.rows[-1][-1].text == "excluded by lm_head"


def test_summary_speaks_of_accuracy_size_and_proof(report: Report) -> None:
    """The four things a reader wants first, with their figures."""
    text = words(section(report, "summary"))
    assert "90 of its 91 layers" in text
    assert "1.0 MiB (25%)" in text
    assert "a little higher: 7.54 after 7.39 (+2.0%)" in text
    assert "The proof holds: the engine's own layer list shows 90 linears with 4-bit weights, as" in text


@pytest.mark.parametrize(
    ("increase", "word"),
    [(-0.02, "It is lower"), (0.005, "practically unchanged"), (0.1, "noticeably higher"), (0.9, "much higher")],
)
def test_words_follow_the_increase(run: Path, increase: float, word: str) -> None:
    """A reader who does not know perplexity learns whether the change is large."""
    documents = dataclasses.replace(read_documents(run), verified=verify_report(increase))
    assert word in words(summary_section(documents))


def test_decode_time_is_called_a_model_and_measured_tables_are_used(run: Path) -> None:
    """Modelled times say so for each GPU; times from a table name their device and what the table lacks."""
    entry = CostEntry(
        precision="w4a8", activation="static", group_size=64, in_features=CHANNELS, out_features=CHANNELS,
        microseconds=3.0,
    )  # fmt: skip
    table = CostTable(device="My GPU", entries=(entry,))
    text = words(cost_section(dataclasses.replace(read_documents(run), costs=table)))
    assert "Modelled, not measured" in text
    assert [device.name for device in DEVICES if f"| {device.name} |" not in text] == []
    static = 2 * BLOCKS  # equalized layers run as static ones do
    assert f"Measured on My GPU: {3 * static} µs for {static} linears; the table has no time of the other 31." in text


def test_frontier_and_evaluation_are_tables(report: Report) -> None:
    """Each budget is a row, and each text and task too, with the error of measurement."""
    cost, accuracy = words(section(report, "cost")), words(section(report, "accuracy"))
    assert cost.count("| other budget |") == 3
    assert "0.7 ± 0.1 | 0.65 |" in accuracy
    assert "perplexity, mine.txt: 1 x 501 tokens" in accuracy


def test_warnings_name_what_matters(run: Path) -> None:
    """Little calibration, a large increase, float layers, no plugin, per-token layers and the builder's words."""
    documents = dataclasses.replace(read_documents(run), verified=verify_report(0.3))
    found = notes(documents)
    for text in (
        "warning: Calibration saw only 128 tokens",
        "warning: Perplexity rose by 30.0%, more than 5%",
        "note: 1 layer not quantized: lm_head",
        "warning: Without the plugin",
        f"note: {BLOCKS} per-token layers without plugin",
        "note: TensorRT gave 1 warning, the first: be careful.",
    ):
        assert text in found


def test_measured_layer_errors_replace_the_command(run: Path, report: Report) -> None:
    """With debug.json every layer has a row, the bad layer and its fault are named, and no command is."""
    found = section(report, "layer-error")
    assert not any(isinstance(block, Missing) for block in found.blocks)
    assert f"**warning** {BAD_LAYER}: its scale is ten times too small" in words(found)
    tables = {block.id: block for block in found.blocks if isinstance(block, Table)}
    assert len(tables["table-debug"].rows) == 3 * BLOCKS
    assert f"warning: 1 layer worse than the steps of its integers explain: {BAD_LAYER}" in notes(read_documents(run))


def test_diff_is_a_table_of_parts(run: Path) -> None:
    """With diff.json prefill and decode of each candidate are rows, and where greedy text parts is said."""
    verified = verify_report()
    part = PartFigures(
        reference_perplexity=verified.reference_perplexity, candidate_perplexity=verified.candidate_perplexity,
        perplexity_increase=0.02, logits=verified.logits, top5_agreement=0.99, psnr_db=33.3,
    )  # fmt: skip
    record = RunRecord(runs="torch fp32", files={}, seconds=1.0, peak_memory_bytes=1)
    greedy = GreedyFigures(
        reference_tokens=(1, 2), candidate_tokens=(1, 3), first_divergence=1, reference_text=None, candidate_text=None
    )
    diffed = DiffReport(
        tool_version="0.1.0", command="fptq-export diff run", environment={}, model="tiny", text="held out",
        text_sha256="0", windows=1, window_tokens=501, head_tokens=8, decode_steps=1, thresholds=Thresholds(),
        reference=record, left_out={"tensorrt": "no GPU"},
        candidates=(CandidateDiff(system="onnx", run=record, prefill=part, decode=part, greedy=greedy),),
    )  # fmt: skip
    text = words(accuracy_section(dataclasses.replace(read_documents(run), diffed=diffed)))
    for name in ("prefill", "decode"):
        assert f"| onnx | {name} | 7.537 | +2.00 | 0.01 | 0.9900 | 33.3 | 95.0 | 99.0 |" in text
    assert "Greedy text of onnx parts from the reference's at token 1." in text
    assert "tensorrt was left out: no GPU" in text
    assert "fptq-export diff" not in text


def test_broken_proof_is_the_summary(run: Path) -> None:
    """An engine that runs something else is said first, and each layer's verdict is in the table of the proof."""
    entry = ProofEntry(
        layer="q_proj", kind="linear", policy="w4a8 static g64", engine_layers=("gemm 1",), weights="FP16",
        activation="FP16", verdict="failed", evidence=(),
    )  # fmt: skip
    engine = EngineFacts(target="tensorrt-rtx", library_version="1.7", compute_capabilities=("8.9",))
    proof = Proof(
        source="the builder's log", policy_sha256="0", engine=engine, expected=Expected(), layers=(entry,),
        problems=("q_proj was widened",),
    )  # fmt: skip
    documents = dataclasses.replace(read_documents(run), proof=proof)
    assert "The proof does not hold: q_proj was widened." in words(summary_section(documents))
    text = words(proof_section(documents))
    assert "| q_proj | w4a8 static g64 | FP16 | FP16 | failed | gemm 1 |" in text
    assert "**warning** q_proj was widened" in text


def test_random_calibration_is_a_warning(tmp_path: Path) -> None:
    """Ranges of random tokens are not those of text."""
    found = notes(read_documents(write_run(tmp_path / "run", calib_dataset="random")))
    assert "warning: Calibrated on random tokens" in found


def test_edited_file_is_a_warning(tmp_path: Path) -> None:
    """A policy that was edited after the run is not the one that was measured."""
    run = write_run(tmp_path / "run")
    assert "changed after the run" not in notes(read_documents(run))
    path = run / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    assert "warning: policy.json changed after the run wrote it" in notes(read_documents(run))


def test_static_input_with_few_steps_is_a_warning(run: Path) -> None:
    """A range that a few channels stretch leaves the others almost nothing."""
    documents = read_documents(run)
    few = tuple(dataclasses.replace(layer, levels=FEW_STEPS / 2) for layer in layer_figures(documents)[:1])
    found = [note.text for note in remarks(documents, few) if note.level == "warning"]
    assert any("1 static input reaches fewer than 4 of 127" in text for text in found)


def test_broken_cache_is_a_warning(run: Path) -> None:
    """Decode steps that do not continue the prefill are named, in the warnings and beside the accuracy."""
    broken = verify_report()
    broken = broken.model_copy(update={"cache": broken.cache.model_copy(update={"within_bound": False})})
    documents = dataclasses.replace(read_documents(run), verified=broken)
    assert "warning: Decode steps do not continue the prefill" in notes(documents)
    assert "does NOT explain that" in words(accuracy_section(documents))


def test_encoder_gets_its_own_words(run: Path) -> None:
    """An encoder is told by cosines; perplexity is not mentioned, and no command that refuses encoders is named."""
    cosine = CosineFigures(vectors=200, mean=0.95, min=0.5)
    verified = EncoderReport(
        reference="torch fp32", candidate="model.w4a8.onnx", text="builtin", hidden_size=64, hidden=cosine,
        embeddings=cosine, retrieval=RetrievalFigures(top1_agreement=0.9, nearest=5, overlap=0.8),
    )  # fmt: skip
    documents = dataclasses.replace(read_documents(run), verified=verified, evaluated=None)
    text = words(summary_section(documents)) + words(accuracy_section(documents))
    assert "their mean cosine is 0.9500" in text
    assert "erplexity" not in text
    assert "fptq-export eval" not in text
    assert "warning: Embeddings have a mean cosine of 0.9500" in notes(documents)


def test_graph_of_the_user_gets_its_own_words(run: Path) -> None:
    """An ONNX graph is told by its worst output, and data that calibration saw is pointed out."""
    output = OutputFigures(name="y", elements=9, cosine=0.5, sqnr_db=3.0, max_abs_error=1.0, equal=None)
    verified = GraphReport(
        reference="m.onnx", candidate="model.w4a8.onnx", data="x.npz", held_out=False, batches=1, outputs=(output,)
    )
    documents = dataclasses.replace(read_documents(run), verified=verified)
    assert "the least cosine of 1 output is 0.5000" in words(summary_section(documents))
    found = notes(documents)
    assert "warning: y: cosine with the original output below" in found
    assert "note: Accuracy was measured on the calibration data" in found


def test_both_halves_get_a_report(tmp_path: Path) -> None:
    """The directory above an encoder and a decoder gives one report for each, in folders of the output."""
    for half in ("encoder", "decoder"):
        bare_run(tmp_path / "t5" / half)
    files = run_report(tmp_path / "t5", tmp_path / "out", None, NoProgress())
    assert [found.html.relative_to(tmp_path) for found in files] == [
        Path("out/encoder/report.html"),
        Path("out/decoder/report.html"),
    ]
    assert all(found.html.is_file() and found.markdown.is_file() for found in files)


def test_same_run_gives_the_same_bytes(run: Path, report: Report) -> None:
    """A report can be kept under version control: pictures do not depend on the time or on what was drawn before."""
    documents = read_documents(run)
    drawn = (ranges_section(documents, layer_figures(documents)), cost_section(documents))
    assert drawn == (section(report, "ranges"), section(report, "cost"))


def test_page_carries_all_it_needs(report: Report) -> None:
    """No address, no file beside it: only the names of XML vocabularies look like addresses."""
    page = re.sub(r' xmlns(:\w+)?="[^"]*"', "", html_from_report(report))
    assert re.findall(r"https?://|<link|<img|@import|src=|url\((?!#)", page) == []
    assert page.count("<svg") == 7


def test_markdown_shows_foreign_text_as_it_is(tmp_path: Path) -> None:
    """Names and commands can hold no markup: no HTML, no new column, no end of the code block."""
    command = f"fptq-export {HOSTILE} ```\n# heading"
    documents = read_documents(write_run(tmp_path / "run", command=command, hostile_name=HOSTILE))
    sections = (policy_section(documents, layer_figures(documents)), command_section(documents))
    text = markdown_from_report(Report(HOSTILE, HOSTILE, sections))
    outside_code = text.replace(command, "")
    assert "<script" not in outside_code
    rows = [line for line in outside_code.splitlines() if "script&gt;" in line and line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [9]
    assert f"````\n{command}\n````" in text


def test_damaged_document_is_named(tmp_path: Path) -> None:
    """A file that is there and cannot be read is an error with its name, not a gap in the report."""
    run = write_run(tmp_path / "run")
    (run / "eval.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"not valid JSON") as caught:
        report_from_run(run)
    assert caught.value.where.endswith("eval.json")


def test_evaluation_of_other_files_is_a_warning(tmp_path: Path) -> None:
    """eval.json of an earlier policy is not about this run."""
    run = write_run(tmp_path / "run")
    documents = read_documents(run)
    evaluated = documents.evaluated
    assert evaluated is not None
    systems = tuple(record.model_copy(update={"files": {"model.w4a8.onnx": "old"}}) for record in evaluated.systems)
    write_json_model(evaluated.model_copy(update={"systems": systems}), run / "eval.json")
    assert "warning: eval.json was measured on other files than those of this run (onnx)" in notes(read_documents(run))
