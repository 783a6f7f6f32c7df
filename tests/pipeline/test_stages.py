"""Resume: a stage runs exactly when its options, inputs or outputs changed, and a broken run leaves no record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fptq_export import __version__
from fptq_export.errors import UserError
from fptq_export.files import sha256_from_file
from fptq_export.options import RunOptions
from fptq_export.package.manifest import Manifest, read_manifest
from fptq_export.pipeline.stages import Stage, StageRunner

EMPTY = Manifest(
    tool_version=__version__, command="test", options=RunOptions(model="m", output=Path("o")), environment={}
)


class Workshop:
    """A run directory with two stages: `copy` (source -> middle) and `double` (middle -> final)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source, self.middle, self.final = (directory / name for name in ("source", "middle", "final"))
        self.source.write_text("a")
        self.calls: list[str] = []

    def runner(self) -> StageRunner:
        """A new process: nothing is known but what the manifest says."""
        return StageRunner(self.directory, read_manifest(self.directory) or EMPTY, Console(quiet=True))

    def copy(self, parts: Mapping[str, Any] | None = None, edited: tuple[Path, str] | None = None) -> Stage:
        """Source -> middle."""
        work = self._work("copy", lambda: self.middle.write_text(self.source.read_text()))
        return Stage("copy", parts or {}, (self.source,), (self.middle,), work, edited)

    def double(self) -> Stage:
        """Middle -> final."""
        work = self._work("double", lambda: self.final.write_text(self.middle.read_text() * 2))
        return Stage("double", {}, (self.middle,), (self.final,), work)

    def run(self, *stages: Stage) -> list[str]:
        """Run stages as a new process would; returns the names of those that did any work."""
        self.calls.clear()
        runner = self.runner()
        for stage in stages:
            runner.run(stage)
        return list(self.calls)

    def _work(self, name: str, act: Callable[[], object]) -> Callable[[], Mapping[str, Any]]:
        def work() -> Mapping[str, Any]:
            self.calls.append(name)
            act()
            return {"figure": 1}

        return work


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A fresh run directory."""
    return Workshop(tmp_path)


def test_a_second_run_does_no_work(workshop: Workshop) -> None:
    """Unchanged inputs, options and outputs skip every stage."""
    assert workshop.run(workshop.copy(), workshop.double()) == ["copy", "double"]
    assert workshop.run(workshop.copy(), workshop.double()) == []


def test_touching_a_file_without_changing_it_does_no_work(workshop: Workshop) -> None:
    """The content counts, not the modification time."""
    workshop.run(workshop.copy())
    workshop.source.write_text("a")
    workshop.middle.write_text("a")
    assert workshop.run(workshop.copy()) == []


def test_a_changed_input_runs_what_depends_on_it(workshop: Workshop) -> None:
    """Both stages follow a new source."""
    workshop.run(workshop.copy(), workshop.double())
    workshop.source.write_text("b")
    assert workshop.run(workshop.copy(), workshop.double()) == ["copy", "double"]
    assert workshop.final.read_text() == "bb"


def test_an_equal_result_stops_the_chain(workshop: Workshop) -> None:
    """A stage that runs again and writes the same bytes leaves later stages alone."""
    workshop.run(workshop.copy(), workshop.double())
    assert workshop.run(workshop.copy({"seed": 1}), workshop.double()) == ["copy"]


@pytest.mark.parametrize("damage", ["remove", "change"])
def test_a_damaged_output_is_written_again(workshop: Workshop, damage: str) -> None:
    """A file that is gone, or is not what was written, is made again."""
    workshop.run(workshop.copy())
    if damage == "remove":
        workshop.middle.unlink()
    else:
        workshop.middle.write_text("tampered")
    assert workshop.run(workshop.copy()) == ["copy"]
    assert workshop.middle.read_text() == "a"


def test_a_failed_stage_leaves_no_record_and_no_old_output(workshop: Workshop) -> None:
    """The old output is not taken for the result of the new options."""
    workshop.run(workshop.copy())

    def fail() -> Mapping[str, Any]:
        raise RuntimeError("boom")

    broken = Stage("copy", {"seed": 1}, (workshop.source,), (workshop.middle,), fail)
    with pytest.raises(RuntimeError, match="boom"):
        workshop.run(broken)
    assert not workshop.middle.exists()
    manifest = read_manifest(workshop.directory)
    assert manifest is not None
    assert "copy" not in manifest.stages


def test_leftovers_of_a_killed_run_are_removed(workshop: Workshop) -> None:
    """Temporary names, files and directories alike, do not pile up."""
    (workshop.directory / ".middle.partial").write_text("half")
    (workshop.directory / "..middle.partial.x1").mkdir()
    workshop.run(workshop.copy())
    assert sorted(path.name for path in workshop.directory.iterdir()) == ["manifest.json", "middle", "source"]


def test_an_edit_is_not_overwritten(workshop: Workshop) -> None:
    """A file that people edit is refused with the option that takes it in, also when other options changed."""
    edited = (workshop.middle, "--policy")
    workshop.run(workshop.copy(edited=edited))
    workshop.middle.write_text("mine")
    for parts in ({}, {"seed": 1}):
        with pytest.raises(UserError, match="--policy"):
            workshop.run(workshop.copy(parts, edited))
    assert workshop.middle.read_text() == "mine"


def test_an_input_that_was_changed_by_hand_is_refused(workshop: Workshop) -> None:
    """A stage that runs alone does not mix an edited file with others that belong to the original."""
    workshop.run(workshop.copy(), workshop.double())
    workshop.middle.write_text("mine")
    with pytest.raises(UserError, match="was changed"):
        workshop.run(workshop.double())


def test_a_missing_input_names_the_file(workshop: Workshop) -> None:
    """A verb that runs alone says which file it needs."""
    with pytest.raises(UserError, match="middle"):
        workshop.run(workshop.double())


def test_removed_outputs_stay_removed_until_they_are_needed(workshop: Workshop) -> None:
    """`--no-keep` costs nothing on a second run; a later stage that has to run gets its input back."""
    runner = workshop.runner()
    runner.run(workshop.copy())
    runner.run(workshop.double())
    runner.remove_outputs("copy", (workshop.middle,))
    assert not workshop.middle.exists()
    assert workshop.run(workshop.copy(), workshop.double()) == []
    workshop.final.unlink()
    assert workshop.run(workshop.copy(), workshop.double()) == ["copy", "double"]
    assert workshop.final.read_text() == "aa"


def test_the_record_says_what_was_measured(workshop: Workshop) -> None:
    """Time, memory, hashes and the stage's own figures are kept."""
    record = workshop.runner().run(workshop.copy())
    assert record.summary == {"figure": 1}
    assert record.seconds > 0
    assert record.peak_memory_bytes > 1 << 20
    assert [file.path for file in (*record.inputs, *record.outputs)] == ["source", "middle"]
    assert {len(file.sha256) for file in (*record.inputs, *record.outputs)} == {64}


def test_a_running_stage_knows_its_key(workshop: Workshop) -> None:
    """What it leaves unfinished can be told from that of other options."""
    runner = workshop.runner()
    seen: list[str] = []

    def work() -> Mapping[str, Any]:
        seen.append(runner.running_key)
        return {}

    for parts in ({}, {"seed": 1}):
        stage = Stage("copy", parts, (), (), work)
        assert runner.run(stage).key == seen[-1]
    assert seen[0] != seen[1]


def test_a_file_that_several_stages_read_is_hashed_once(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a large model would be read from disk once more for each stage that needs them."""
    hashed: list[Path] = []

    def counting(path: Path) -> str:
        hashed.append(path)
        return sha256_from_file(path)

    monkeypatch.setattr("fptq_export.package.manifest.sha256_from_file", counting)
    other = Stage("other", {}, (workshop.source,), (), dict)
    assert workshop.run(workshop.copy(), other) == ["copy"]
    assert hashed.count(workshop.source) == 1
    workshop.source.write_text("changed")
    workshop.run(other)
    assert hashed.count(workshop.source) == 2
