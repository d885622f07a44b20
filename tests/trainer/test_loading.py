"""Checkpoints as plain dicts, and restores without a Checkpointer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptd
from ckptd.errors import (
    CheckpointNotFoundError,
    CorruptError,
    LayoutError,
    StoreError,
)


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"scale": torch.tensor([2.0]), "calls": 7}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def make() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": Extra(2, 3), "head": nn.Linear(3, 3, bias=False)})
    model["tail"] = nn.Linear(3, 3, bias=False)
    model["tail"].weight = model["head"].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {
        "model": model, "optimizer": optimizer, "schedule": schedule, "epoch": 4,
        "nested": {"list": [torch.arange(3), "x"], "half": torch.ones(2, dtype=torch.bfloat16)},
        "mean": torch.ones(2), "mine": ckptd.PerRank({"at": 3}), "rng": ckptd.RNGState(),
    }  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with ckptd.Checkpointer(tmp_path / "root", daemon=False) as ckpt:
        state = make()
        ckpt.save(1, {**state, "epoch": 1}, wait=True)
        ckpt.save(2, state, metrics={"loss": 0.5}, wait=True)
    return tmp_path / "root"


def test_a_checkpoint_opens_as_what_was_saved_by_its_names(root: Path) -> None:
    state, loaded = make(), ckptd.load(root)
    assert loaded.keys() == state.keys()
    extra = loaded["model"].pop("body._extra_state")
    assert (extra["calls"], extra["scale"].item()) == (7, 2.0)
    held = state["model"].state_dict()
    assert loaded["model"].keys() == held.keys() - {"body._extra_state"}
    assert all(torch.equal(loaded["model"][key], held[key]) for key in loaded["model"])
    assert loaded["model"]["tail.weight"] is loaded["model"]["head.weight"], "still tied"
    moment = state["optimizer"].state[state["model"]["head"].weight]["exp_avg"]
    assert torch.equal(loaded["optimizer"]["state"]["model.head.weight"]["exp_avg"], moment)
    assert loaded["optimizer"]["groups"][0]["lr"] == 0.25
    assert loaded["schedule"]["step_size"] == 3
    assert (loaded["epoch"], loaded["mine"]) == (4, {"at": 3})
    assert torch.equal(loaded["nested"]["list"][0], torch.arange(3))
    assert loaded["nested"]["half"].dtype is torch.bfloat16
    assert torch.equal(loaded["mean"], torch.ones(2))


def test_a_state_dict_of_a_load_fits_the_bare_module(root: Path) -> None:
    model = nn.ModuleDict({"head": nn.Linear(3, 3, bias=False)})
    wanted = make()["model"]["head"].weight
    model.load_state_dict(ckptd.load(root, select="model.head.*")["model"])
    assert torch.equal(model["head"].weight, wanted)


def test_an_older_step_can_be_loaded(root: Path) -> None:
    assert ckptd.load(root, step=1)["epoch"] == 1
    with pytest.raises(CheckpointNotFoundError):
        ckptd.load(root, step=3)


def test_select_reads_only_what_fits(root: Path) -> None:
    assert ckptd.load(root, select="epoch") == {"epoch": 4}
    loaded = ckptd.load(root, select=["model.body.*", "*/model.head.weight/step"])
    assert loaded["model"].keys() >= {"body.weight", "body.bias"}
    assert "head.weight" not in loaded["model"]
    assert loaded["optimizer"]["state"].keys() == {"model.head.weight"}
    with pytest.raises(LayoutError, match="fits no name"):
        ckptd.load(root, select="modell.*")


def test_dtype_casts_all_floating_tensors_but_moments(root: Path) -> None:
    loaded = ckptd.load(root, dtype=torch.float64)
    assert loaded["model"]["head.weight"].dtype is torch.float64
    assert loaded["nested"]["half"].dtype is torch.float64
    assert loaded["nested"]["list"][0].dtype is torch.int64
    assert loaded["optimizer"]["state"]["model.head.weight"]["exp_avg"].dtype is torch.float32


@pytest.mark.parametrize(
    "where", ["meta", torch.device("meta"), {"cpu": "meta"}, lambda storage, _: storage]
)
def test_map_location_takes_all_that_torch_load_takes(root: Path, where: Any) -> None:
    """On the meta device there are shapes without contents, and nothing is read."""
    for chunk in (root / "chunks").rglob("*-0001"):
        chunk.unlink()
    if callable(where):
        with pytest.raises(CorruptError):
            ckptd.load(root, map_location=where)
    else:
        mean = ckptd.load(root, map_location=where)["mean"]
        assert (mean.device.type, mean.shape) == ("meta", (2,))


def test_what_was_on_a_device_that_is_not_here_opens_on_the_cpu(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptd.trainer import loading

    read = loading.read_manifest

    def elsewhere(*arguments: Any) -> Any:
        import msgspec

        found = read(*arguments)
        tensors = tuple(msgspec.structs.replace(t, device="xpu:3") for t in found.tensors)
        return msgspec.structs.replace(found, tensors=tensors)

    monkeypatch.setattr(loading, "read_manifest", elsewhere)
    assert ckptd.load(root)["model"]["head.weight"].device.type == "cpu"


def test_a_damaged_checkpoint_is_an_error_and_not_an_older_one(root: Path) -> None:
    for chunk in (root / "chunks").rglob("*-000000000002-*"):
        data = bytearray(chunk.read_bytes())
        data[-1] ^= 1
        chunk.write_bytes(data)
    with pytest.raises(CorruptError):
        ckptd.load(root)


def test_a_load_writes_nothing(root: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*"))
    ckptd.load(root)
    ckptd.restore(root, {"model": make()["model"]})
    assert sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*")) == before


def test_an_empty_root_and_none_at_all_are_errors(tmp_path: Path) -> None:
    with ckptd.Checkpointer(tmp_path / "root", daemon=False):
        pass
    for call in (ckptd.load, lambda p: ckptd.restore(p, {"a": 1})):
        with pytest.raises(CheckpointNotFoundError):
            call(tmp_path / "root")
        with pytest.raises((CheckpointNotFoundError, StoreError)):
            call(tmp_path / "no-root")
    assert not (tmp_path / "no-root").exists()


def test_restore_fills_live_objects_and_tells_what_it_took(root: Path) -> None:
    model = make()["model"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state: dict[str, Any] = {"model": model, "epoch": 0}
    resumed = ckptd.restore(root, state)
    assert (resumed.step, resumed.metrics, state["epoch"]) == (2, {"loss": 0.5}, 4)
    assert torch.equal(model["head"].weight, make()["model"]["head"].weight)
    assert "model.body.weight" not in resumed.unused


def test_what_goes_along_with_training_comes_back(tmp_path: Path) -> None:
    """Schedulers, a gradient scaler, an averaged copy and a loader with a position."""

    def companions(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 3)
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.5)
        average = torch.optim.swa_utils.AveragedModel(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (8 + seed))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for _ in range(seed):
            loss = scaler.scale(model(torch.ones(1, 3)).sum())
            optimizer.zero_grad()
            loss.backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            average.update_parameters(model)
        return {
            "model": model, "optimizer": optimizer, "average": average, "scaler": scaler,
            "schedule": schedule,
        }  # fmt: skip

    state, back = companions(3), companions(1)
    with ckptd.Checkpointer(tmp_path / "root", daemon=False) as ckpt:
        ckpt.save(1, state, wait=True)
    resumed = ckptd.restore(tmp_path / "root", back)
    assert (resumed.missing, resumed.unused) == ((), ())
    assert back["scaler"].state_dict() == state["scaler"].state_dict()
    assert back["schedule"].state_dict() == state["schedule"].state_dict()
    assert int(back["average"].n_averaged) == 3
    for name in ("model", "average"):
        held = state[name].state_dict()
        assert all(torch.equal(v, held[k]) for k, v in back[name].state_dict().items())
    assert back["optimizer"].param_groups[0]["lr"] == state["optimizer"].param_groups[0]["lr"]
