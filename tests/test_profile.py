"""What ``inspect`` and ``diff`` say is what numpy says, whatever the number of threads."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from making import CONFIG, Raw, Tensors, llama, packed, read_model, save_model
from suture.analysis.profile import diff, inspect_model
from suture.checkpoints.checkpoint import Checkpoint, open_checkpoint
from suture.errors import MismatchError, NonFiniteError
from suture.tensors.roles import layer_key, role_of


def models(tmp_path: Path, base: Tensors, tuned: Tensors) -> tuple[Checkpoint, Checkpoint]:
    one, other = save_model(tmp_path / "base", base), save_model(tmp_path / "tuned", tuned)
    return open_checkpoint(one), open_checkpoint(other)


def expected(names: list[str], base: Tensors, tuned: Tensors) -> dict[str, Any]:
    """A row of the profile in float64, from the definition."""
    start = np.concatenate([base[n].values.ravel().astype(np.float64) for n in names])
    end = np.concatenate([tuned[n].values.ravel().astype(np.float64) for n in names])
    delta = end - start
    lengths = math.sqrt(start @ start), math.sqrt(end @ end)
    return {
        "elements": len(delta),
        "changed": int((delta != 0).sum()),
        "norm": math.sqrt(delta @ delta),
        "relative_norm": math.sqrt(delta @ delta) / lengths[0] if lengths[0] else None,
        "largest": float(np.abs(delta).max(initial=0)),
        "cosine": start @ end / (lengths[0] * lengths[1]) if all(lengths) else None,
    }


def check(row: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in ("elements", "changed"):
        assert row[key] == wanted[key], key
    for key in ("norm", "relative_norm", "largest"):
        assert row[key] == pytest.approx(wanted[key], rel=2e-6, abs=1e-12), key
    assert row["cosine"] == pytest.approx(wanted["cosine"], abs=2e-6)
    assert row["changed_share"] == row["changed"] / max(1, row["elements"])


# ---------------------------------------------------------------------------------------- diff


@pytest.mark.parametrize(
    "dtypes", [("F32", "F32"), ("BF16", "BF16"), ("F16", "F32"), ("F64", "F64")]
)
def test_a_profile_is_what_numpy_says(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    """Norms, changed entries, largest and cosine: in all, by layer, by role, by tensor."""
    base = llama(0, dtype=dtypes[0])
    tuned = llama(1, base, dtype=dtypes[1])
    tuned["model.norm.weight"] = packed(base["model.norm.weight"].values, dtypes[1])  # unchanged
    found = diff(*models(tmp_path, base, tuned))

    names = sorted(base)
    check(found["total"], expected(names, base, tuned))
    assert list(found["tensors"]) == names
    for name, row in found["tensors"].items():
        check(row, expected([name], base, tuned))
    for section, key in (("layers", layer_key), ("roles", lambda n: role_of(n).kind)):
        assert set(found[section]) == {key(n) for n in names}
        for group, row in found[section].items():
            check(row, expected([n for n in names if key(n) == group], base, tuned))
    assert found["tensors"]["model.norm.weight"]["changed"] == 0
    assert found["tensors"]["model.norm.weight"]["norm"] == 0


def test_layers_are_in_their_order(tmp_path: Path) -> None:
    """Layer 10 comes after layer 9, and what belongs to no layer stands together."""
    base = llama(0, layers=12, hidden=2, vocabulary=2)
    layers = list(
        diff(*models(tmp_path, base, llama(1, base, layers=12, hidden=2, vocabulary=2)))["layers"]
    )
    numbers = [int(k.rpartition(".")[2]) for k in layers if k.startswith("model.layers.")]

    assert numbers == list(range(12))
    assert {k for k in layers if not k.startswith("model.layers.")} == {
        "(embedding)",
        "(head)",
        "(norm)",
    }


def test_equal_models_differ_in_nothing(tmp_path: Path) -> None:
    """Zero everywhere, and a cosine of one."""
    found = diff(*models(tmp_path, llama(0), llama(0)))

    assert found["total"]["changed"] == 0
    assert found["total"]["norm"] == 0
    assert found["total"]["cosine"] == pytest.approx(1)


def test_zeros_have_no_direction(tmp_path: Path) -> None:
    """A tensor of zeros has no cosine and no relative norm: absent, not a division by zero."""
    base = {"a.weight": packed(np.zeros(4)), "e.weight": Raw("F32", (0,), b"")}
    tuned = {"a.weight": packed([0, 3, 4, 0]), "e.weight": Raw("F32", (0,), b"")}
    found = diff(*models(tmp_path, base, tuned))

    assert found["tensors"]["a.weight"]["cosine"] is None
    assert found["tensors"]["a.weight"]["relative_norm"] is None
    assert found["tensors"]["a.weight"]["norm"] == 5
    assert found["tensors"]["e.weight"]["changed_share"] == 0
    assert found["total"]["cosine"] is None


def test_opposite_models_point_in_opposite_directions(tmp_path: Path) -> None:
    """The cosine reaches minus one and goes no further, whatever rounding does."""
    base = {"a.weight": packed(np.linspace(0.1, 7, 999))}
    found = diff(*models(tmp_path, base, {"a.weight": packed(-base["a.weight"].values)}))

    assert -1 <= found["total"]["cosine"] < -1 + 1e-12


@given(data=st.data())
def test_profiles_of_any_numbers(tmp_path_factory: Any, data: st.DataObject) -> None:
    """For any finite float32 numbers of moderate size the profile is numpy's."""
    size = data.draw(st.integers(1, 30))
    number = st.floats(-1e6, 1e6, width=32)
    draw = [data.draw(st.lists(number, min_size=size, max_size=size)) for _ in range(2)]
    base, tuned = ({"a.weight": packed(np.array(x, np.float32))} for x in draw)
    where = tmp_path_factory.getbasetemp() / "numbers"
    row = diff(*models(where, base, tuned))["tensors"]["a.weight"]
    wanted = expected(["a.weight"], base, tuned)

    assert row["norm"] == pytest.approx(wanted["norm"], rel=1e-5, abs=1e-30)
    assert row["largest"] == pytest.approx(wanted["largest"], rel=1e-6)
    if wanted["cosine"] is not None and row["cosine"] is not None:
        assert row["cosine"] == pytest.approx(wanted["cosine"], abs=1e-4)


def test_integers_have_no_delta(tmp_path: Path) -> None:
    """Buffers are not profiled, equal or not."""
    one, other = (llama(0) | {"model.ids": packed([i, i], "I64")} for i in (1, 2))
    found = diff(*models(tmp_path, one, other))

    assert "model.ids" not in found["tensors"]
    assert found["total"]["changed"] == 0


def test_buffers_of_one_model_are_named(tmp_path: Path) -> None:
    """A diff goes on without them, and says on which side they are."""
    ids = packed([1, 2], "I64")
    base, tuned = models(tmp_path, llama(0) | {"model.position_ids": ids}, llama(1))

    assert diff(base, tuned)["only_in_base"] == ["model.position_ids"]
    assert diff(base, tuned)["only_in_tuned"] == []


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    """A norm of NaN would be a report of nothing; the tensor is named."""
    tuned = llama(0) | {"model.norm.weight": packed(np.full(16, np.nan))}

    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight holds 16"):
        diff(*models(tmp_path, llama(0), tuned))


def test_unlike_models_are_refused(tmp_path: Path) -> None:
    """Names and shapes must agree, and all that do not are named."""
    tuned = {n: raw for n, raw in llama(0).items() if n != "model.norm.weight"}
    tuned["lm_head.weight"] = packed(np.zeros((24, 8)))

    with pytest.raises(MismatchError) as caught:
        diff(*models(tmp_path, llama(0), tuned))
    assert "model.norm.weight" in str(caught.value)
    assert "lm_head.weight is [24, 8], not [24, 16]" in str(caught.value)


# ------------------------------------------------------------------------------------- inspect


def test_inspect_counts_what_is_there(tmp_path: Path) -> None:
    """Tensors, elements and bytes in all, by dtype and by role; each tensor counts once."""
    tensors = llama(0, dtype="BF16") | {
        "model.norm.weight": packed(np.zeros(16)),
        "model.ids": packed([1, 2], "I64"),
        "x.f8": Raw("F8_E4M3", (3,), b"abc"),
    }
    found = inspect_model(
        open_checkpoint(save_model(tmp_path / "m", tensors, config=CONFIG, shards=2))
    )

    assert found["tensors"] == len(tensors)
    assert found["files"] == 2
    assert found["bytes"] == sum(len(raw.data) for raw in tensors.values())
    assert found["vocabulary"] == 24
    assert found["layers"] == 2
    assert set(found["dtypes"]) == {"bfloat16", "float32", "i64", "f8_e4m3"}
    assert found["roles"]["buffer"]["tensors"] == 2
    assert found["roles"]["embedding"] == {"tensors": 1, "elements": 384, "bytes": 768}
    for section in ("dtypes", "roles"):
        for key in ("tensors", "elements", "bytes"):
            total = sum(row[key] for row in found[section].values())
            assert total == found[key], (section, key)
    assert "integrity" not in found


def test_inspect_lists_every_tensor(tmp_path: Path) -> None:
    """Dtype, shape, role, layer, bytes and file of each, where they are asked for."""
    model = open_checkpoint(save_model(tmp_path / "model", llama(0, dtype="BF16")))

    rows = inspect_model(model, each=True)["each"]

    assert rows.keys() == model.specs.keys()
    name = next(n for n in rows if n.endswith("layers.1.self_attn.q_proj.weight"))
    assert rows[name] == {
        "dtype": "bfloat16", "shape": list(model.specs[name].shape), "role": "q", "layer": 1,
        "bytes": model.specs[name].nbytes, "file": "model.safetensors",
    }  # fmt: skip
    assert "each" not in inspect_model(model)


def test_inspect_reads_nothing_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers are enough for everything but the check."""

    def never(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(Checkpoint, "read_at", never)

    assert inspect_model(open_checkpoint(save_model(tmp_path / "m", llama(0))))["tensors"] == 21


def test_the_check_finds_what_is_wrong(tmp_path: Path) -> None:
    """Values that are no numbers, by tensor and count; the same bytes twice; tied tensors apart."""
    tensors = llama(0)
    values = tensors["model.layers.1.mlp.up_proj.weight"].values.copy()
    values.flat[[0, 5, -1]] = np.nan, np.inf, -np.inf
    tensors["model.layers.1.mlp.up_proj.weight"] = packed(values)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"]
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = packed(np.ones(16))
    config = {**CONFIG, "tie_word_embeddings": True}
    where = save_model(tmp_path / "m", tensors, config=config)
    found = inspect_model(open_checkpoint(where), check=True)["integrity"]

    assert found["nonfinite"] == {"model.layers.1.mlp.up_proj.weight": 3}
    pair = [f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up")]
    assert found["duplicates"] == [pair]
    assert found["constant_groups"] == 1
    assert found["untied"] == ["lm_head.weight"]
    assert not found["ok"]


def test_a_sound_model_is_sound(tmp_path: Path) -> None:
    """Nothing to report, and a copy of a tensor alone is no fault."""
    found = inspect_model(open_checkpoint(save_model(tmp_path / "m", llama(0))), check=True)

    assert found["integrity"] == {
        "nonfinite": {}, "duplicates": [], "constant_groups": 0, "untied": [], "ok": True,
    }  # fmt: skip


def test_counts_are_exact_when_many_threads_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of one tensor are seen by several threads at once, and no count is lost."""
    from suture.analysis import profile

    size = 6 << 20
    values = np.zeros(size, np.float32)
    values[:: 1 << 10] = np.nan
    where = save_model(tmp_path / "m", {"a.weight": packed(values)})
    real = profile.sweep

    def finely(*arguments: Any, **how: Any) -> None:
        real(*arguments, **{**how, "threads": 6, "block": 1 << 11})

    monkeypatch.setattr(profile, "sweep", finely)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        found = inspect_model(open_checkpoint(where), check=True)
    finally:
        sys.setswitchinterval(interval)

    assert found["integrity"]["nonfinite"] == {"a.weight": size >> 10}


def test_large_twins_are_compared_to_the_end(tmp_path: Path) -> None:
    """Tensors of several pieces are the same only when their last element is, too."""
    values = np.arange((1 << 20) + 5, dtype=np.float32)
    other = values.copy()
    other[-1] = 0
    tensors = {"a.weight": packed(values), "b.weight": packed(values), "c.weight": packed(other)}
    found = inspect_model(open_checkpoint(save_model(tmp_path / "m", tensors)), check=True)

    assert found["integrity"]["duplicates"] == [["a.weight", "b.weight"]]


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    """What was announced as read adds up to all bytes."""
    model = open_checkpoint(save_model(tmp_path / "m", llama(0)))
    told: list[int] = []
    inspect_model(model, check=True, progress=lambda _, more: told.append(more))

    assert sum(told) == sum(len(raw.data) for raw in read_model(tmp_path / "m").values())
