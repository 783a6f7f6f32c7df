"""What a careful colleague would point out about a run before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fptq_export.package.manifest import FileRecord
from fptq_export.policy import Policy
from fptq_export.report.blocks import Note, Notes, Section, Text
from fptq_export.report.documents import RunDocuments
from fptq_export.report.layers import LayerFigures
from fptq_export.report.numbers import plural
from fptq_export.verify.encoder_report import EncoderReport
from fptq_export.verify.graph_report import GraphReport
from fptq_export.verify.report import LARGE_INCREASE, VerifyReport

__all__ = ["FEW_STEPS", "remarks", "remarks_section"]

LOW_COSINE = 0.97
"""Mean cosine of embeddings, or cosine of an output, below which it is named."""
FEW_TOKENS = 8192
"""Fewer tokens of calibration or of held-out text than that say little about other text."""
FEW_STEPS = 4.0
"""INT8 steps, of 127, of the median channel: with fewer, an input keeps about two bits of most channels."""
_MOST_NAMES = 4


def remarks_section(documents: RunDocuments, layers: tuple[LayerFigures, ...]) -> Section:
    """All remarks, the serious ones first."""
    found = sorted(remarks(documents, layers), key=lambda note: note.level != "warning")
    blocks = (Notes(tuple(found)),) if found else (Text("Nothing to point out."),)
    return Section("warnings", "Warnings", blocks)


def remarks(documents: RunDocuments, layers: tuple[LayerFigures, ...]) -> Iterator[Note]:
    """Everything worth a second look, in the order of the road."""
    yield from _file_remarks(documents)
    yield from _calibration_remarks(documents)
    if documents.policy is not None:
        yield from _policy_remarks(documents.policy, layers)
    yield from _accuracy_remarks(documents)
    yield from _engine_remarks(documents)


def _file_remarks(documents: RunDocuments) -> Iterator[Note]:
    written: dict[str, FileRecord] = {}
    for record in documents.manifest.stages.values():
        written |= {file.path: file for file in record.outputs}
    changed = [
        name for name, file in written.items() if not file.removed and _changed(documents.directory / name, file)
    ]
    if changed:
        words = f"{_names(changed)} changed after the run wrote it; what was measured is about the file as it was."
        yield Note("warning", f"{words} The same command again brings all stages up to date.")
    gone = [name for name, file in written.items() if not file.removed and not (documents.directory / name).is_file()]
    if gone:
        yield Note("note", f"{_names(gone)} is no longer there.")
    if documents.evaluated is not None:
        hashes = {file.sha256 for file in written.values()}
        systems = [record.system for record in documents.evaluated.systems if set(record.files.values()) - hashes]
        of_run = [system for system in systems if system != "float"]
        if of_run:
            words = f"eval.json was measured on other files than those of this run ({', '.join(of_run)})."
            yield Note("warning", f"{words} Next: {documents.command('eval')}")


def _changed(path: Path, record: FileRecord) -> bool:
    """By its size; a file that is not there has not changed. `inspect` compares hashes."""
    return path.is_file() and path.stat().st_size != record.bytes


def _calibration_remarks(documents: RunDocuments) -> Iterator[Note]:
    options, record = documents.manifest.options, documents.manifest.stages.get("calibrate")
    if record is None:
        return
    if options.calib_dataset == "random" and options.calib_data is None:
        words = "Calibrated on random tokens: ranges of real text differ. Next: --calib-dataset with text like yours"
        yield Note("warning", words)
    if options.calib_dataset == "builtin" and options.calib_data is None:
        words = "Calibrated on the built-in English text. Text of your own use gives ranges that fit it better"
        yield Note("note", f"{words}: --calib-dataset FILE.")
    tokens = record.summary.get("tokens")
    if isinstance(tokens, int) and tokens < FEW_TOKENS:
        yield Note("warning", f"Calibration saw only {tokens} tokens: rare large values may be missing. --calib-size N")
    if options.trust_remote_code:
        yield Note("note", "Code that came with the model was run (--trust-remote-code).")


def _policy_remarks(policy: Policy, layers: tuple[LayerFigures, ...]) -> Iterator[Note]:
    floats = [path for path, layer in policy.layers.items() if layer.precision == "float"]
    floats += [path for path, entry in policy.convolutions.items() if entry.precision == "float"]
    if floats:
        yield Note("note", f"{plural(len(floats), 'layer')} not quantized: {_names(floats)}. The policy says why.")
    refused = [
        path
        for path, layer in policy.layers.items()
        if layer.activation == "per_token"
        and layer.input_absmax is not None
        and policy.rule.v0 < layer.input_absmax < policy.rule.v1
    ]
    if refused and policy.rule.equalizer == "paper":
        words = (
            f"{plural(len(refused), 'input')} between v0 and v1 could not be equalized, for the graph has no exact fold"
        )
        yield Note("note", f"{words} there: {_names(refused)}. They are quantized token by token.")
    few = [layer.path for layer in layers if layer.levels is not None and layer.levels < FEW_STEPS]
    if few:
        words = (
            f"The median channel of {plural(len(few), 'static input')} reaches fewer than {FEW_STEPS:g} of 127 INT8"
            f" steps ({_names(few)}): most of such an input is rounded away. Lower --v0, another --equalizer, --rotate"
            " or --precision 'LAYER=w4a16' keep more of it."
        )
        yield Note("warning", words)


def _accuracy_remarks(documents: RunDocuments) -> Iterator[Note]:
    report = documents.verified
    if report is None:
        yield Note("warning", f"The accuracy of the quantized graph is not known. Next: {documents.command('verify')}")
    if documents.debugged is not None and (bad := documents.debugged.bad_layers):
        words = f"{plural(len(bad), 'layer')} worse than the steps of its integers explain: {_names(list(bad))}"
        yield Note("warning", f"{words}. The section about errors says what is wrong there.")
    if isinstance(report, VerifyReport):
        if report.perplexity_increase > LARGE_INCREASE:
            words = (
                f"Perplexity rose by {report.perplexity_increase:.1%}, more than {LARGE_INCREASE:.0%}. Next:"
                " --preset accurate, --policy auto, --rotate, or layers in float with --exclude"
            )
            yield Note("warning", words)
        if not report.cache.within_bound:
            yield Note("warning", "Decode steps do not continue the prefill: the KV cache is not carried correctly.")
        if report.reference_perplexity.tokens < FEW_TOKENS:
            words = f"Perplexity stands on {report.reference_perplexity.tokens} tokens only"
            yield Note("note", f"{words}. More: {documents.command('eval', '--eval-windows', '0')}")
    if isinstance(report, EncoderReport) and report.embeddings.mean < LOW_COSINE:
        words = f"Embeddings have a mean cosine of {report.embeddings.mean:.4f} with those of the original model"
        yield Note("warning", f"{words}, less than {LOW_COSINE}. Next: --preset accurate or smaller groups")
    if isinstance(report, GraphReport):
        low = [found.name for found in report.outputs if found.cosine is not None and found.cosine < LOW_COSINE]
        if low:
            yield Note("warning", f"{_names(low)}: cosine with the original output below {LOW_COSINE}.")
        if not report.held_out:
            yield Note("note", "Accuracy was measured on the calibration data. Next: --eval-data with other inputs")


def _engine_remarks(documents: RunDocuments) -> Iterator[Note]:
    build, policy = documents.manifest.stages.get("build"), documents.policy
    if build is None:
        yield Note("note", "No engine was built yet.")
        return
    figures = build.summary
    w4a8 = [layer for layer in policy.layers.values() if layer.precision == "w4a8"] if policy is not None else []
    if w4a8 and not figures.get("plugin_linears"):
        words = (
            "Without the plugin, TensorRT multiplies in floating point after it unpacked the 4-bit weights: as"
            " accurate, as small, but slow for long prompts and large batches. Next: --plugin on"
        )
        yield Note("warning", words)
        dynamic = sum(layer.activation == "per_token" for layer in w4a8)
        if dynamic:
            words = f"{plural(dynamic, 'per-token layer')} without plugin: scales are found by separate operators"
            yield Note("note", f"{words} at run time, which costs launches.")
    if unfused := figures.get("unfused"):
        words = f"{plural(len(unfused), 'layer')} unpacked in a kernel of their own: {_names(list(unfused))}"
        yield Note("warning", f"{words}. Their weights are written to memory once more for each token.")
    if in_float := figures.get("float_convolutions"):
        yield Note("note", f"{_names(list(in_float))}: quantized convolutions that TensorRT multiplies in float.")
    if warned := figures.get("warnings"):
        words = f"TensorRT gave {plural(len(warned), 'warning')}, the first: {warned[0]}"
        yield Note("note", f"{words} All of them are in build.log.")


def _names(names: list[str]) -> str:
    """The first few of a list."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
