"""Two-layer checkpoints made in code; no network, one thread of torch, the same examples always."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))  # for `toy` and the twins in `slow`

import pytest
import torch
from hypothesis import HealthCheck, settings

import toy
from suture.tensors.spec import cache_folder

torch.set_num_threads(1)


def own_cache() -> None:
    """A cache for these tests, which shares but compiled kernels: nothing older may answer."""
    kernels = (cache_folder() / "kernels").resolve()
    kernels.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix="suture-cache-"))
    (own / "kernels").symlink_to(kernels)
    os.environ["SUTURE_CACHE"] = str(own)
    atexit.register(shutil.rmtree, own, ignore_errors=True)


own_cache()
settings.register_profile(
    "suture", deadline=None, derandomize=True, database=None, max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("suture")


class Family:
    """A base and three models that were made of it, on disk; nobody may change them."""

    def __init__(self, where: Path, base: toy.Tensors, models: Mapping[str, toy.Tensors]) -> None:
        self.base = base
        self.models = dict(models)
        self.base_path = toy.folder(where / "base", base)
        self.paths = {name: toy.folder(where / name, t) for name, t in models.items()}
        self.names = toy.editable(base)
        """What a merge may touch, sorted."""

    def some(self, *names: str) -> dict[str, Path]:
        """The folders of some models."""
        return {name: self.paths[name] for name in names}


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Family]:
    """Makes families once a session: ``family("bf16")``, ``family("f32", grid=True)``."""
    made: dict[tuple[str, bool], Family] = {}

    def make(flavour: str = "f32", *, grid: bool = False) -> Family:
        if (flavour, grid) not in made:
            base = toy.grid_base(flavour) if grid else toy.base_tensors(flavour)
            change = toy.on_grid if grid else toy.tuned
            models = {name: change(base, seed) for seed, name in enumerate(("ada", "bob", "cyd"))}
            made[flavour, grid] = Family(tmp_path_factory.mktemp(f"family-{flavour}"), base, models)
        return made[flavour, grid]

    return make


@pytest.fixture
def merged(tmp_path: Path) -> Callable[..., toy.Tensors]:
    """Merges in this process: ``merged("ties", models, base, density=0.2)``; see `toy.recipe`."""
    count = 0

    def run(
        method: str,
        models: Mapping[str, Path],
        base: Path | None = None,
        options: Mapping[str, Any] | None = None,
        **sections: Any,
    ) -> toy.Tensors:
        nonlocal count
        count += 1
        what = toy.recipe(method, models, base, **sections)
        return toy.run(tmp_path / f"merged-{count}", what, **(options or {}))[0]

    return run


@pytest.fixture
def other_precision() -> Iterator[None]:
    """accelerate fixes the precision for the life of a process; tests want more than one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
