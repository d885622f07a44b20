"""From events to figures."""

from bench import train
from bench.memory import Sample, Watch, parse_rollup


def plain(*spans_s):
    return {"event": "plain", "at": 0.0, "spans_s": list(spans_s)}


def window(number, *, engine="x", span_s=5.0, steps=2, **facts):
    base = {"pause_s": 0.5, "durable_s": 3.0, "copy_s": 0.1, "stored_bytes": 10}
    return {
        "event": "window", "engine": engine, "window": number, "span_s": span_s, "steps": steps,
        **base, **facts,
    }  # fmt: skip


def test_a_window_is_compared_with_the_plain_steps_on_both_its_sides():
    events = [plain(1.0, 1.0), window(1), plain(3.0, 3.0, 3.0), window(2), plain(3.0)]
    first, second = train.windows_of(events)
    assert first["plain_s"] == 3.0
    assert first["overhead_s"] == 5.0 - 2 * 3.0
    assert second["plain_s"] == 3.0


def test_first_saves_do_not_count_as_warm_ones():
    events = [plain(1.0), window(0, pause_s=9.0), plain(1.0), window(1), plain(1.0), window(2)]
    found = train.result_of("x", [events])
    assert found["pause_s"].high == 0.5
    assert found["pause_s"].count == 2
    assert found["first_pause_s"].median == 9.0


def test_rounds_are_put_together_and_other_engines_left_out():
    rounds = [
        [plain(1.0), window(1, pause_s=1.0), plain(1.0), window(1, engine="y", pause_s=7.0)],
        [plain(1.0), window(1, pause_s=3.0), plain(1.0)],
    ]
    assert train.result_of("x", rounds)["pause_s"].median == 2.0


def test_an_engine_that_failed_says_why_and_keeps_its_figures():
    events = [
        plain(1.0),
        window(1),
        plain(1.0),
        {"event": "failed", "engine": "x", "why": "no disk"},
    ]
    found = train.result_of("x", [events])
    assert found["failed"] == "no disk"
    assert found["pause_s"].median == 0.5


def test_one_wrong_restore_marks_the_row():
    def restore(*, is_same):
        return {
            "event": "restore", "engine": "x", "way": "", "kind": "hot", "span_s": 1.0,
            "is_same": is_same,
        }  # fmt: skip

    found = train.result_of("x", [[restore(is_same=True), restore(is_same=False)]])
    assert found["restores"][""]["is_same"] is False


def test_memory_counts_from_the_most_that_training_alone_took():
    watch = Watch("a marker that no process has", interval_s=3600.0)
    watch.stop()
    watch.samples = [
        Sample(1.0, 100, 0),
        Sample(1.5, 140, 0),
        Sample(2.5, 150, 60),
        Sample(3.5, 90, 90),
    ]
    marks = {"base": 0.5, "saves": 2.0, "restores": 3.0, "end": 4.0}
    found = train.memory_of([{"event": name, "at": at} for name, at in marks.items()], watch)
    assert found == {"save_memory_bytes": 70, "save_shared_bytes": 60, "restore_memory_bytes": 40}


def test_cached_files_are_no_memory_of_a_process():
    text = b"Rss: 9 kB\nPss:  100 kB\nPss_Anon: 50 kB\nPss_File: 20 kB\nPss_Shmem: 30 kB\n"
    assert parse_rollup(text) == (50 * 1024, 30 * 1024)
