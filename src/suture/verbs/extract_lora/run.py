"""From whole models back to an adapter: deltas cut to a low rank, with the error that this makes.

The best approximation of a matrix by one of rank r keeps its r largest singular values (Eckart and
Young, 1936). Where every model is the base with adapters on it, the sum of their deltas is known as
a product already, and is cut without ever being multiplied out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from suture.checkpoints.adapters import CONFIG, CONV1D, WEIGHTS, Adapted, LowRank, Product
from suture.checkpoints.checkpoint import Checkpoint, is_from_hub, ties_embeddings
from suture.checkpoints.views import Same
from suture.errors import MissingExtraError, NonFiniteError, OutputError, Problems, RecipeError
from suture.merges.apply import Stage, checkpoint_fingerprint
from suture.runs.card import adapter_card
from suture.runs.workspace import workspace
from suture.stream.vector import align
from suture.tensors.roles import EVERYTHING, role_of, tied_to
from suture.tensors.spec import DTYPES, dtype_named, listed
from suture.version import __version__

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise MissingExtraError("extracting an adapter", "models") from error

SMALL = 2048
"""Up to this length of its shorter side the spectrum of a dense delta is computed in full."""
_OVERSAMPLED, _ROUNDS = 16, 4
_CHUNK = 1 << 24
_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class Fitted:
    """How well one tensor's delta was fitted."""

    rank: int
    norm: float
    """Frobenius norm of the delta."""
    error: float
    """Frobenius norm of what is missing, over that of the delta."""
    exact_factors: bool
    """Whether the delta was known as a product, and not read from whole tensors."""


@dataclass(frozen=True)
class Extracted:
    """What was written, and what it lost."""

    out: Path
    tensors: Mapping[str, Fitted]
    saved: tuple[str, ...]
    """Tensors that stand in the adapter as they are."""
    left_out: Mapping[str, float]
    """Changed tensors that are not in the adapter, with the norm of their change."""
    error: float
    """Norm of everything that is missing, over that of the whole task vector."""
    parameters: int
    """Numbers in the adapter."""
    restricted: bool = False
    """Whether it must not be passed on, because the base or a model must not."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "out": str(self.out)}


@dataclass
class _Pending:
    """The adapter while it grows."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    fitted: dict[str, Fitted] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    left_out: dict[str, float] = field(default_factory=dict)
    biases: bool = False
    tying: bool = False
    flipped: bool = False


@dataclass(frozen=True)
class _How:
    """What was asked for."""

    rank: int | None
    energy: float | None
    save_others: bool
    dtype: torch.dtype


def extract_lora(  # noqa: PLR0913  one keyword for each option of the command
    base: Checkpoint,
    models: Checkpoint | Sequence[Checkpoint],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    weights: Sequence[float] | None = None,
    save_others: bool = False,
    dtype: str = "float32",
    stage: Stage | None = None,
) -> Extracted:
    """Write the adapter of rank ``rank`` that is nearest to ``sum w_i (model_i - base)``.

    Args:
        base: what the adapter will be put on.
        models: tuned models, or bases with adapters on them; several are added up.
        out: the folder to write, as PEFT reads it.
        rank: of every module; ``None`` keeps all that adapters hold, and is not possible where a
            model is no base with adapters on it.
        energy: keep only as many ranks of each module as hold this share of its squared norm.
        weights: the factor of each model; by default 1.
        save_others: put what has no low rank, such as norms and biases, into the adapter whole.
        dtype: of the factors.
        stage: is told when reading begins, and of how much; gives what is told of each tensor.

    Raises:
        SutureError: a model does not fit the base, or the folder cannot be written; all problems
            at once.
    """
    found = [models] if isinstance(models, Checkpoint) else list(models)
    factors = [1.0] * len(found) if weights is None else [float(w) for w in weights]
    place = Path(out)
    problems = Problems()
    how = _checked(base, found, factors, place, _How(rank, energy, save_others, torch.float32),
                   dtype, problems)  # fmt: skip
    problems.raise_if_any()
    pending = _Pending()
    progress = stage and stage("extract", sum(c.nbytes for c in (base, *found)))
    for name in EVERYTHING.names(base.specs):
        _fit(name, base, found, factors, how, pending)
        if progress is not None:
            progress(name, sum(c.specs[name].nbytes for c in (base, *found)))
    squares = sum((f.norm * f.error) ** 2 for f in pending.fitted.values())
    squares += sum(n**2 for n in pending.left_out.values())
    whole = sum(f.norm**2 for f in pending.fitted.values())
    whole += sum(n**2 for n in pending.left_out.values())
    report = Extracted(
        place, pending.fitted, tuple(pending.saved), pending.left_out,
        math.sqrt(squares / whole) if whole else 0.0,
        sum(t.numel() for t in pending.tensors.values()),
        any(checkpoint.restricted for checkpoint in (base, *found)),
    )  # fmt: skip
    if not pending.tensors:
        low = "nothing that changed has a low rank; --save-others writes it as it is"
        text = low if pending.left_out else "the models do not differ from the base"
        raise RecipeError(f"{place}: no adapter to write: {text}")
    _publish(place, pending, report, base, found, factors)
    return report


def _checked(
    base: Checkpoint, models: Sequence[Checkpoint], factors: Sequence[float], out: Path, how: _How,
    dtype: str, problems: Problems,
) -> _How:  # fmt: skip
    for model in models:
        align(base, model, problems, buffers=True)
    if not models or len(factors) != len(models):
        problems.add(RecipeError, f"weights: {len(factors)} for {len(models)} model(s)")
    if any(not math.isfinite(w) for w in factors):
        problems.add(RecipeError, f"weights: numbers, not {list(factors)}")
    if how.rank is not None and (type(how.rank) is not int or how.rank < 1):
        problems.add(RecipeError, f"rank: a whole number from 1, not {how.rank!r}")
    if how.energy is not None and not 0 < how.energy <= 1:
        problems.add(RecipeError, f"energy: the share that is kept, in (0, 1], not {how.energy}")
    whole = [m for m in models if not isinstance(m, Adapted)]
    if how.rank is None and how.energy is None and whole:
        problems.add(
            RecipeError,
            f"rank: {whole[0].label} is no base with adapters on it, so say which rank its deltas "
            "are cut to (--rank), or how much of them is kept (--energy)",
        )
    wanted = "F32"
    with problems.collecting():
        wanted = dtype_named(dtype)
    if out.exists():
        problems.add(OutputError, f"{out}: exists; name another folder")
    elif not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        problems.add(OutputError, f"{out}: cannot write in {out.absolute().parent}")
    return _How(how.rank, how.energy, how.save_others, _TORCH[wanted])


# -- one tensor ------------------------------------------------------------------------------------


def _fit(
    name: str, base: Checkpoint, models: Sequence[Checkpoint], factors: Sequence[float], how: _How,
    pending: _Pending,
) -> None:  # fmt: skip
    kind = _kind(name, base)
    terms = [_terms(model, base, name) for model in models]
    known = [t for t in terms if t is not None]
    if len(known) == len(terms) and not any(known):
        return  # no model changes it
    if kind is not None and len(known) == len(terms):
        products = [Product(p.left, p.right, p.scale * w)
                    for part, w in zip(known, factors, strict=True) for p in part]  # fmt: skip
        for part in (part for p in products for part in (p.left, p.right)):
            _refuse_wild(name, int((~np.isfinite(part)).sum()), (base, *models))
        left, right, fitted = _cut_product(products, how)
    else:
        delta = _dense(name, base, models, factors)
        norm = float(delta.double().norm())
        if norm == 0:
            return
        if kind is None:
            _whole(name, norm, base, models, factors, how, pending)
            return
        left, right, fitted = _cut_dense(delta, name, how)
    if fitted.norm == 0:
        return
    pending.fitted[name] = fitted
    module = name.removesuffix(".weight")
    pending.ranks[module] = fitted.rank
    key = f"base_model.model.{module}."
    if kind == "linear":
        parts = {"lora_A.weight": right, "lora_B.weight": left}
    else:
        parts = {"lora_A.weight": left.T, "lora_B.weight": right.T}
        pending.flipped = pending.flipped or kind == "transposed"
    if kind == "embedding":
        parts = {f"lora_embedding_{k[5]}": v for k, v in parts.items()}
    pending.tensors |= {key + k: v.contiguous() for k, v in parts.items()}


def _kind(name: str, base: Checkpoint) -> str | None:
    """How PEFT would lay factors to this tensor; ``None`` where it has no low rank."""
    spec = base.specs[name]
    if len(spec.shape) != 2 or not name.endswith(".weight") or name in base.aliases.values():
        return None
    role = role_of(name).kind
    if role in ("embedding", "position"):
        return None if role == "embedding" and ties_embeddings(base.config) else "embedding"
    if role in ("norm", "scale"):
        return None
    flips = base.config.get("model_type") in (
        "gpt2",
        "openai-gpt",
        "imagegpt",
        "decision_transformer",
    )
    return "transposed" if flips and CONV1D.search(name.removesuffix(".weight")) else "linear"


def _terms(model: Checkpoint, base: Checkpoint, name: str) -> list[Product] | None:
    """What a model adds to the base's tensor, as products; ``None`` where that is not known."""
    if model is base:
        return []
    lens = model.lenses.get(name) if isinstance(model, Adapted) else None
    if isinstance(lens, Same) and lens.origin[1] == name:
        return _terms(lens.origin[0], base, name)
    if isinstance(lens, LowRank) and not lens.magnitude and lens.kind != "bias":
        below = _terms(lens.origin[0], base, name) if lens.origin[1] == name else None
        return None if below is None else [*below, lens.product()]
    return None


def _dense(
    name: str, base: Checkpoint, models: Sequence[Checkpoint], factors: Sequence[float]
) -> Tensor:
    """``sum w_i (model_i - base)``, float32; the difference of float64 weights in float64.

    Raises:
        NonFiniteError: a weight is no number, or the sum is too large for float32.
    """
    start = base[name]
    total = torch.zeros(start.shape)
    for model, factor in zip(models, factors, strict=True):
        delta = np.asarray(model[name] - start, np.float32)
        total.add_(torch.from_numpy(delta), alpha=factor)
    _refuse_wild(name, int((~total.isfinite()).sum()), (base, *models))
    return total


def _refuse_wild(name: str, wild: int, read: Sequence[Checkpoint]) -> None:
    if wild:
        labels = listed([checkpoint.label for checkpoint in read])
        raise NonFiniteError(
            f"{name}: the difference of {labels} has {wild} NaN or infinite values, and nothing is "
            "near those; `suture inspect MODEL --check` tells which of them is broken"
        )


def _cut_product(products: Sequence[Product], how: _How) -> tuple[Tensor, Tensor, Fitted]:
    """Cut ``sum scale_i left_i right_i`` to its rank; only matrices of the factors' size are made.

    With ``L = Q_l T_l`` and ``R^T = Q_r T_r`` the singular values of ``L R`` are those of the small
    matrix ``T_l T_r^T``.
    """
    left = torch.cat([torch.from_numpy(p.left).double() * p.scale for p in products], 1)
    right = torch.cat([torch.from_numpy(p.right).double() for p in products], 0)
    tall, core = torch.linalg.qr(left)
    wide, other = torch.linalg.qr(right.T)
    u, s, vt = torch.linalg.svd(core @ other.T)
    size = len(s)
    norm = float(s.norm())
    keep = _kept(s, norm, how, float(s[0]) * size * 1e-12 if size else 0.0)
    root = s[:keep].sqrt()
    b = (tall @ u[:, :keep] * root).to(how.dtype)
    a = (root[:, None] * (vt[:keep] @ wide.T)).to(how.dtype)
    missing = _product_norm(torch.cat([left, -b.double()], 1), torch.cat([right, a.double()], 0))
    return b, a, Fitted(keep, norm, missing / norm if norm else 0.0, True)


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of ``left @ right``, through the triangles of both."""
    one, other = torch.linalg.qr(left)[1], torch.linalg.qr(right.T)[1]
    return float((one @ other.T).norm())


def _cut_dense(delta: Tensor, name: str, how: _How) -> tuple[Tensor, Tensor, Fitted]:
    norm = float(delta.double().norm())
    short = min(delta.shape)
    if short <= SMALL or how.energy is not None or how.rank is None or how.rank * 4 > short:
        left, right, keep = _by_spectrum(delta, norm, how)
    else:
        left, right, keep = _by_sampling(delta, name, norm, how)
    b, a = left.to(how.dtype), right.to(how.dtype)
    return b, a, Fitted(keep, norm, _distance(delta, b, a) / norm, False)


def _by_spectrum(delta: Tensor, norm: float, how: _How) -> tuple[Tensor, Tensor, int]:
    """The best fit: the leading eigenvectors of the smaller Gram matrix, in float64."""
    flip = delta.shape[0] < delta.shape[1]
    tall = delta.T if flip else delta
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    step = max(1, _CHUNK // tall.shape[1])
    for start in range(0, len(tall), step):
        part = tall[start : start + step].double()
        gram += part.T @ part
    values, vectors = torch.linalg.eigh(gram)
    s = values.flip(0).clamp(min=0).sqrt()
    keep = _kept(s, norm, how, float(s[0]) * 1e-7)
    right = vectors.flip(1)[:, :keep]
    root = s[:keep].sqrt()
    left = tall @ right.float() / root.float()
    other = (right * root).T.float()
    return (other.T, left.T, keep) if flip else (left, other, keep)


def _by_sampling(delta: Tensor, name: str, norm: float, how: _How) -> tuple[Tensor, Tensor, int]:
    """Nearly the best fit, from a few random directions (Halko et al. 2011, algorithm 4.4)."""
    assert how.rank is not None
    draw = torch.Generator().manual_seed(sum(name.encode()) * 1_000_003 + len(name))
    sample = torch.randn(delta.shape[1], how.rank + _OVERSAMPLED, generator=draw)
    basis = torch.linalg.qr(delta @ sample)[0]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis)[0])[0]
    u, s, vt = torch.linalg.svd((basis.T @ delta).double(), full_matrices=False)
    keep = _kept(s, norm, how, float(s[0]) * 1e-7)
    root = s[:keep].sqrt()
    return basis @ (u[:, :keep] * root).float(), (root[:, None] * vt[:keep]).float(), keep


def _kept(s: Tensor, norm: float, how: _How, dust: float) -> int:
    """How many singular values are kept, at least one."""
    keep = int((s > dust).sum())
    if how.energy is not None:
        share = torch.cumsum(s**2, 0) / max(norm**2, 1e-300)
        keep = min(keep, int((share < how.energy - 1e-12).sum()) + 1)
    return max(1, min(keep, how.rank or keep))


def _distance(delta: Tensor, left: Tensor, right: Tensor) -> float:
    total = 0.0
    step = max(1, _CHUNK // delta.shape[1])
    for start in range(0, len(delta), step):
        part = left[start : start + step].float() @ right.float()
        total += float((delta[start : start + step] - part).double().square().sum())
    return math.sqrt(total)


# -- what has no low rank --------------------------------------------------------------------------


def _whole(
    name: str, norm: float, base: Checkpoint, models: Sequence[Checkpoint],
    factors: Sequence[float], how: _How, pending: _Pending,
) -> None:  # fmt: skip
    """Put a tensor into the adapter as it is, with the others of its module; or leave it out."""
    module, _, last = name.rpartition(".")
    if not how.save_others or not module:
        pending.left_out[name] = norm
        return
    weight = f"{module}.weight"
    if last == "bias" and weight in base and _kind(weight, base):
        key = f"base_model.model.{module}.base_layer.bias"
        pending.tensors[key] = _result(name, base, models, factors)
        pending.saved.append(name)
        pending.biases = True
        return
    pending.saved.append(name)
    if module in pending.modules:
        return
    pending.modules.append(module)
    for other in base:
        if other.rpartition(".")[0] == module:
            key = f"base_model.model.{other}"
            pending.tensors[key] = _result(other, base, models, factors)
    for copy, original in tied_to({*base.specs, *base.aliases, "lm_head.weight"}).items():
        if original == name and ties_embeddings(
            base.config
        ):  # PEFT reads a tied tensor under both names
            pending.tying = True
            same = pending.tensors[f"base_model.model.{name}"].clone()
            pending.tensors[f"base_model.model.{copy}"] = same


def _result(
    name: str, base: Checkpoint, models: Sequence[Checkpoint], factors: Sequence[float]
) -> Tensor:
    if not DTYPES[base.specs[name].dtype].computable:
        return base.tensor(name)
    if len(models) == 1 and factors[0] == 1:
        return models[0].tensor(name)
    start = torch.from_numpy(base[name])
    return (start + _dense(name, base, models, factors)).to(_TORCH[base.specs[name].dtype])


# -- the folder ------------------------------------------------------------------------------------


def _publish(
    out: Path, pending: _Pending, report: Extracted, base: Checkpoint,
    models: Sequence[Checkpoint], factors: Sequence[float],
) -> None:  # fmt: skip
    from suture.training.models import save_shared

    record = _record(report, base, models, factors)
    texts = {
        CONFIG: json.dumps(_config(pending, base), indent=2, sort_keys=True) + "\n",
        "suture.json": json.dumps(record, indent=2) + "\n",
        "README.md": adapter_card(
            base,
            models,
            [f.rank for f in report.tensors.values()],
            report.error,
            out.name,
            restricted=report.restricted,
        ),
    }
    with workspace(out, "extract-lora") as space:
        made = space.fresh()
        save_shared(pending.tensors, made / WEIGHTS, {"format": "pt"})
        for name, text in texts.items():
            (made / name).write_text(text, encoding="utf-8")
        space.publish()


def _config(pending: _Pending, base: Checkpoint) -> dict[str, Any]:
    ranks = list(pending.ranks.values()) or [1]
    usual = max(set(ranks), key=lambda r: (ranks.count(r), r))
    pattern = {m: r for m, r in sorted(pending.ranks.items()) if r != usual}
    kinds = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    architecture = str((base.config.get("architectures") or [""])[0])
    return {
        "peft_type": "LORA",
        "task_type": next((k for end, k in kinds.items() if architecture.endswith(end)), None),
        "base_model_name_or_path": base.label if is_from_hub(base) else str(base.path),
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,  # so that the scale is 1
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "use_dora": False,
        "bias": "all" if pending.biases else "none",
        "fan_in_fan_out": pending.flipped,
        "target_modules": sorted(pending.ranks),
        "modules_to_save": sorted(pending.modules) or None,
        **({"ensure_weight_tying": True} if pending.tying else {}),
    }


def _record(
    report: Extracted, base: Checkpoint, models: Sequence[Checkpoint], factors: Sequence[float]
) -> dict[str, Any]:
    return {
        "suture": __version__,
        "schema": 1,
        "kind": "adapter",
        **({"restricted": True} if report.restricted else {}),
        "inputs": {
            "base": {"path": base.label, "fingerprint": checkpoint_fingerprint(base)},
            "models": [
                {"path": m.label, "weight": w, "fingerprint": checkpoint_fingerprint(m)}
                for m, w in zip(models, factors, strict=True)
            ],
        },
        "results": {k: v for k, v in report.to_dict().items() if k not in ("out", "restricted")},
    }


def report_lines(report: Extracted) -> list[str]:
    """What to tell at the end, a line each."""
    lines = [f"{'tensor':<56}{'rank':>6}{'norm':>11}{'error':>11}"]
    for name, row in report.tensors.items():
        lines.append(f"{name:<56}{row.rank:>6}{row.norm:>11.4g}{row.error:>11.3g}")
    for name, norm in report.left_out.items():
        lines.append(f"{name:<56}{'-':>6}{norm:>11.4g}{'left out':>11}")
    if report.saved:
        lines.append(f"{len(report.saved)} tensors are in the adapter as they are")
    if report.left_out:
        lines.append(f"{len(report.left_out)} changed tensors have no low rank and were left out; "
                     "--save-others writes them as they are")  # fmt: skip
    lines.append(
        f"wrote {report.out}: {report.parameters:,} numbers, relative error of the whole "
        f"difference {report.error:.3g}"
    )
    if report.restricted:
        lines.append("restricted: this adapter must not be passed on")
    return lines


__all__ = ["Extracted", "Fitted", "extract_lora", "report_lines"]
