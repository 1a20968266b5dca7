"""The benchmark's page: made of its results, and what README says of speed is what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import measure, schedule
from benchmarks.bench import RESULTS, SIZES, cells, parsed
from benchmarks.contenders import CP, CP_READ_BACK, DIRECTIONS, NO_VERIFY, RESHARD, taking_part
from benchmarks.results import Cell, Results, Row, Sample, Skipped, Start, load
from benchmarks.schedule import Pace, Rounds, share
from benchmarks.shapes import GB, model

pytest.importorskip("matplotlib", reason="draws the charts")
from benchmarks import charts, page

MIB = 1 << 20


def cell(direction: str, gb: float, **seconds: float) -> Cell:
    """A cell of two rounds, in which a contender takes so many seconds, and 0.2 more."""
    names = {"cp": CP, "back": CP_READ_BACK, "own": RESHARD, "bare": NO_VERIFY}
    rows = []
    for name, took in seconds.items():
        samples = [
            Sample(number, took + 0.2 * number, 50 * MIB, 0.5, int(2 * gb * GB), int(gb * GB), 3, 4)
            for number in range(2)
        ]
        rows.append(Row(names.get(name, name), samples))
    return Cell(direction, gb, int(gb * GB), rows, [Skipped("zero_to_fp32", "no time left")])


def results() -> Results:
    machine = {
        "platform": "Linux", "processor": "Example 9000", "cores": 2, "memory_nbytes": 16 * GB,
        "load_average": 0.1, "python": "3.12", "packages": {"torch": "2.0"},
    }  # fmt: skip
    found = [
        cell("zero2", 0.5, own=0.9, bare=0.7, cp=0.7, back=0.9),
        cell("zero2", 1.0, own=1.7, bare=1.3, cp=1.5, back=1.9, ds_to_universal=19.9),
        cell("fp8", 1.0, own=1.0, cp=1.0),
        Cell("zero3", 1.0, 0, [], [Skipped(RESHARD, "needs 99 GB of disk")]),
    ]
    options = {"sizes": [0.5, 1.0], "rounds": 2}
    starts = [Start("reshard convert", [0.11, 0.12, 0.13], [0.1, 0.2, 0.3])]
    return Results(machine, options, found, starts)


class TestPage:
    def test_medians_ratios_and_slopes(self) -> None:
        text = page.page(results())
        assert text.startswith("# Performance\n")  # as every page of `reshard help`
        assert (
            "| ZeRO-2 to Hugging Face | 1 | 1.80 s | 2.00 s | 0.90 | 50 MiB "
            "| `ds_to_universal` 20.0 s, 50 MiB |" in text
        )
        # 1.0 s at 0.5 GB and 1.8 s at 1 GB.
        assert "| `reshard` | 1.00 | 1.80 | 0.20 | 1.60 |" in text
        assert (
            "| `reshard` | 2 | 1.80 | 1.70 to 1.90 | 0.90 | 0.50 | 50 | 0 | 2.00 | 1.00 | 0.01 |"
            in text
        )
        assert "ZeRO-3 to Hugging Face, 1 GB: `reshard` (needs 99 GB of disk)" in text
        assert "| `reshard convert` | 0.120 | 0.200 |" in text
        assert page.NOTES.read_text(encoding="utf-8") in text

    def test_large_sizes_are_shown_by_themselves(self) -> None:
        found = results().with_cells([cell("zero2", 8.0, own=9.9, cp=11.0, back=14.9)])
        assert (
            "| ZeRO-2 to Hugging Face | 8 | 2 | 10.0 s | 9.90 to 10.1 | 15.0 s | 14.9 to 15.1 "
            "| 0.67 | 50 |" in page.page(found)
        )
        assert "From 8 to 8 GB, where not all fits into memory, reshard takes 0.67" in page.readme(
            found
        )
        # The line through the other sizes stays what it was.
        assert "| `reshard` | 1.00 | 1.80 | 0.20 | 1.60 |" in page.page(found)
        assert "Large models" not in page.page(results())

    def test_cells_that_were_measured_again_replace_the_old(self) -> None:
        again = cell("zero2", 1.0, own=2.7, back=2.9)
        empty = Cell("fp8", 1.0, 0, [], [Skipped(RESHARD, "no time left")])
        found = results().with_cells([again, empty])
        assert [one.gb for one in found.of("zero2")] == [0.5, 1.0]
        assert found.of("zero2")[1] == again
        assert found.of("fp8") == results().of("fp8")

    def test_a_busy_machine_is_named(self) -> None:
        found = results()
        assert "other work" not in page.page(found) + page.readme(found)
        found.machine["load_average"] = 3.0
        assert "other work" in page.page(found)
        assert "other work" in page.readme(found)

    def test_readme_says_what_the_page_says(self) -> None:
        words = page.readme(results())
        assert "an Example 9000" in words
        assert "| 1.80 s | 2.00 s | 0.90 |" in words
        assert "0.12 s of processor time" in words
        assert "From 0.5 to 1 GB of weights, the peak memory goes from 50 to 50 MiB." in words

    def test_it_is_read_again_as_it_was_written(self, tmp_path: Path) -> None:
        results().save(tmp_path / "results.json")
        assert load(tmp_path / "results.json") == results()

    def test_the_same_results_give_the_same_charts(self, tmp_path: Path) -> None:
        drawn = [charts.save(results(), tmp_path / name) for name in ("one", "other")]
        texts = [[path.read_text(encoding="utf-8") for path in paths] for paths in drawn]
        assert texts[0] == texts[1]
        for text in texts[0]:
            assert "ZeRO-2 to Hugging Face" in text
            assert RESHARD in text
        assert ["ds_to_universal" in text for text in texts[0]] == [False, True, True]


@pytest.mark.skipif(not RESULTS.exists(), reason="nothing was published yet")
class TestWhatIsPublished:
    def test_the_page_and_readme_are_made_of_the_results(self) -> None:
        found = load(RESULTS)
        how = "run: python -m benchmarks.bench --page"
        assert page.PAGE.read_text(encoding="utf-8") == page.page(found), how
        words = page.README.read_text(encoding="utf-8")
        assert words.partition(page.BEGIN)[2].partition(page.END)[0] == page.readme(found), how


class TestSchedule:
    @pytest.mark.parametrize(
        ("left", "rounds"),
        [
            (5, Rounds(1, 0)),  # what was begun is ended
            (25, Rounds(2, 0)),
            (59, Rounds(5, 0)),
            (60, Rounds(2, 1)),
            (75, Rounds(3, 1)),
            (129, Rounds(5, 1)),
            (130, Rounds(5, 2)),
            (9999, Rounds(5, 2)),
        ],
    )
    def test_a_few_rounds_of_our_own_come_first_then_the_peers(
        self, left: float, rounds: Rounds
    ) -> None:
        assert schedule.rounds(left, 10, 40, Rounds(5, 2)) == rounds

    def test_cells_share_what_is_left_by_their_costs(self) -> None:
        costs = [10.0, 30.0, 60.0]
        assert share(200, costs, 0) == 20
        assert share(180, costs, 1) == 60
        assert share(120, costs, 2) == 120

    def test_guesses_are_corrected_by_what_was_measured(self) -> None:
        pace = Pace()
        assert pace.expect(("zero2", RESHARD), 7) == 7
        pace.note(("zero2", RESHARD), 6, 3)
        assert pace.expect(("zero2", RESHARD), 7) == 3.5
        assert pace.expect(("zero3", RESHARD), 7) == 7

    def test_every_direction_has_its_cells_and_small_ones_come_first(self) -> None:
        planned = cells(SIZES, [])
        assert {direction.key for direction, _ in planned} == {one.key for one in DIRECTIONS}
        sizes = [gb for _, gb in planned]
        assert sizes == sorted(sizes)
        assert [gb for direction, gb in planned if direction.key == "zero2"] == list(SIZES)
        assert [gb for direction, gb in planned if direction.key == "fp8"] == [1.0]

    def test_groups_are_chosen(self) -> None:
        chosen = parsed(["--only", "reshard,cp", "--sizes", "0.5,1"])
        names = [one.name for one in taking_part(DIRECTIONS[0], chosen.only)]
        assert names == [RESHARD, NO_VERIFY, CP_READ_BACK]
        assert chosen.sizes == [0.5, 1.0]
        other = [one.name for one in taking_part(DIRECTIONS[0], ["reshard"], "elsewhere")]
        assert other == [RESHARD, "other reshard", NO_VERIFY, "other reshard --no-verify"]


@pytest.mark.slow
def test_models_have_the_size_that_is_asked_for() -> None:
    for gb in (*SIZES, 16):
        assert abs(2 * model(gb).numel / GB / gb - 1) < 0.05


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/PID/io")
def test_bytes_and_calls_of_a_command_and_its_children(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    script = f'cat "$1/file" > "$1/copy" && echo {measure.MARK} && cat "$1/copy" > /dev/null'
    ran = measure.run(["sh", "-c", script, "sh", str(tmp_path)])
    assert ran.calls is not None
    # cat may copy by read and write, or by copy_file_range.
    assert 2 << 20 <= ran.calls.read < 3 << 20
    assert 1 << 20 <= ran.calls.written < 3 << 20
    assert ran.calls.reads > 1
    assert ran.marked is not None
    assert 0 < ran.marked <= ran.seconds
