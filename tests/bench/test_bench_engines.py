"""Which engines run, what is saved, and that a failing one stops nothing."""

import contextlib
import threading

import numpy as np
import pytest

pytest.importorskip("torch")

from bench import content, engines, session
from bench.codec import codecs
from bench.engine import Engine, Ticket
from bench.files import sizes_in


def test_names_are_exact_where_they_can_be_and_starts_elsewhere():
    assert [e.name for e in engines.choose("ckptd")] == ["ckptd"]
    assert [e.name for e in engines.choose("dcp.async, torch.save")] == [
        "torch.save", "dcp.async thread", "dcp.async process",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no engine 'orbax'"):
        engines.choose("ckptd,orbax")


@pytest.mark.parametrize("size", [20_000_000, 64_000_000, 500_000_000, 2_000_000_000])
def test_the_state_has_about_the_size_that_was_asked_for(size):
    width, depth = content.shape_of(size)
    parameters = depth * 12 * width * width + 320 * width
    assert abs(12 * parameters - size) < 0.1 * size


def test_exponents_of_noise_have_eight_bits_and_those_of_a_constant_none():
    noise = np.random.default_rng(1).integers(0, 1 << 32, 1 << 16, np.uint32).view(np.float32)
    assert content.exponent_bits(noise) == pytest.approx(8.0, abs=0.05)
    assert content.exponent_bits(np.ones(100, np.float32)) == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_codec_gives_back_what_it_got(dtype):
    data = (
        (np.random.default_rng(2).standard_normal(1 << 17) / 50).astype(np.float32).view(np.uint8)
    )
    for name, codec in codecs(dtype, len(data)).items():
        if not isinstance(codec, str):
            stored, size = codec.encode(data)
            assert np.array_equal(codec.decode(stored), data), name
            assert size < len(data) + 1000, name


class _Whole(Engine):
    name = "whole"

    def save(self, step):
        self.path(step).write_bytes(b"x" * 100)
        return Ticket.now()

    def restores(self):
        return {"": lambda step: None}


class _Broken(_Whole):
    name = "broken"

    def save(self, step):
        raise OSError(28, "no space left")


def test_an_engine_that_fails_leaves_its_turn_to_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "choose", lambda names: [_Broken, _Whole])
    plan = session.Plan(
        {
            "size_bytes": 2_000_000, "device": "cpu", "engines": ["x"], "folder": str(tmp_path / "engines"),
            "windows": 1, "steps": 1, "restores": 1, "is_memory": False,
        }
    )  # fmt: skip
    with contextlib.closing(session.Session(plan, tmp_path / "events.jsonl")) as running:
        running.run()
    from bench.train import _read, result_of

    events = _read(tmp_path / "events.jsonl")
    assert "no space left" in result_of("broken", [events])["failed"]
    whole = result_of("whole", [events])
    assert whole["stored_bytes"] == 100
    assert whole["restores"][""]["is_same"] is False  # it gave nothing back, and that was seen
    assert len(sizes_in(tmp_path / "engines" / "whole")) == 1  # older ones were discarded


def test_a_ticket_is_durable_when_its_wait_returns():
    gate = threading.Event()
    ticket = Ticket.after(gate.wait)
    assert not ticket.done.is_set()
    gate.set()
    assert ticket.wait_durable() > 0


def test_a_ticket_raises_what_its_wait_raised():
    def fail():
        raise OSError(5, "lost")

    with pytest.raises(OSError, match="lost"):
        Ticket.after(fail).wait_durable()
